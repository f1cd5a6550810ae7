"""What watches single layers while moments are collected: one probe for each, fed by a hook.

The pass over the sequences is in `moments`, experts that see only their own tokens in
`moments_experts`, the sums in `accumulate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from realign.model.accumulate import MomentKind, Precision, Sums, standardise_tokens

# How many layer inputs are remembered to recognise one that is fed to several layers.
_RECENT = 4


@dataclass
class Run:
    """What the hooks need to know about the batch under way."""

    keep: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))  # [rows, length]
    recent: list[tuple[Tensor, Probe]] = field(default_factory=lambda: [])

    def turn_to(self, keep: Tensor) -> None:
        """Go on with another batch, of which these positions count."""
        self.keep = keep
        self.recent.clear()

    def kept(self, activation: Tensor, *, flat_is_whole: bool) -> Tensor | None:
        """The kept positions' vectors [N, d]; None where rows are not the batch's positions."""
        if activation.dim() == 4 and activation.shape[1] == 1:  # one latent head (DeepSeek)
            activation = activation.squeeze(1)
        if activation.shape[:-1] == self.keep.shape:
            return activation[self.keep]
        if flat_is_whole and activation.shape[:-1] == (self.keep.numel(),):
            return activation[self.keep.flatten()]
        return None


@dataclass
class Probe:
    """One distinct thing to accumulate: the requests `keys` all get it."""

    kind: MomentKind
    path: str
    module: Any
    rows: tuple[int, int] | None
    transposed: bool
    precision: Precision
    keys: list[str]
    diagonal: bool = False
    sums: Sums | None = None
    leader: Probe | None = None  # the probe fed with the very same input, once known
    failure: str = ""

    @property
    def flat_is_whole(self) -> bool:
        """Whether rows that are not apart by sequence are still all positions in order."""
        # Some layers see [rows * length, d]; a routed expert sees the tokens sent to it, in an
        # order that says nothing about positions.
        return "experts" not in self.path.split(".")


def hook(probe: Probe, run: Run) -> Callable[..., None]:
    """A forward hook that adds what the probe's module sees or says at the kept positions."""

    def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if probe.failure or (probe.leader is not None and probe.leader.failure):
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            probe.failure = "the module does not map one tensor to one tensor"
            return
        if probe.kind == "input" and _follows(probe, x, run):
            return
        kept = run.kept(x, flat_is_whole=probe.flat_is_whole)
        if kept is None:
            probe.failure = f"its inputs of shape {tuple(x.shape)} are not one vector per position"
            return
        if probe.kind != "input":
            outputs = run.kept(output, flat_is_whole=probe.flat_is_whole)
            assert outputs is not None, (tuple(x.shape), tuple(output.shape))
            kept = _without_bias(probe, kept, outputs)
            if probe.rows is not None:
                kept = kept[:, slice(*probe.rows)]
        if probe.sums is None:
            probe.sums = Sums(
                int(kept.shape[1]), kept.device, probe.precision, diagonal=probe.diagonal
            )
        if probe.kind == "token":
            kept = standardise_tokens(kept.to(probe.sums.dtype))
        probe.sums.add(kept)

    return see


def _follows(probe: Probe, x: Tensor, run: Run) -> bool:
    """Whether another probe has already taken this very tensor; settled on the first batch."""
    known = next((leader for tensor, leader in run.recent if tensor is x), None)
    if probe.leader is None:
        probe.leader = known or probe
    assert probe.leader is (known or probe), f"{probe.path}: inputs shared in some batches only"
    if known is not None:
        return True
    run.recent.append((x, probe))
    del run.recent[:-_RECENT]
    return False


def _without_bias(probe: Probe, x_nd: Tensor, y_no: Tensor) -> Tensor:
    """Outputs W x [N, d_out] at the kept positions."""
    layer = getattr(probe.module, "base_layer", probe.module)  # inside a peft layer
    bias: Tensor | None = getattr(layer, "bias", None)
    if bias is None:
        return y_no
    if layer is probe.module and y_no.dtype in (torch.float16, torch.bfloat16):
        # y has been rounded relative to the bias, which may dwarf z: multiply again instead.
        return x_nd @ (layer.weight if probe.transposed else layer.weight.T)
    wide = torch.float64 if probe.precision == "float64" else torch.float32
    return y_no.to(wide) - bias.to(wide)
