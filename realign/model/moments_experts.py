"""Activation moments of routed experts: each expert sees the tokens that are sent to it.

transformers keeps the experts of a layer stacked in one module, whose forward pass is given all
tokens and their routing. A hook there reads both, and sums for every expert over its own tokens,
padding excluded: the inputs of its gate and up projections are the tokens, those of its down
projection are computed as the module computes them. How sums are kept is in `accumulate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from realign.model.accumulate import MomentKind, Precision, Sums, standardise_tokens

Part = Literal["up", "down"]
_PARTS: dict[str, Part] = {
    "gate_up_proj": "up",
    "gate_proj": "up",
    "up_proj": "up",
    "down_proj": "down",
}


@dataclass
class ExpertProbe:
    """One thing to accumulate for one expert: the requests `keys` all get it."""

    expert: int
    parameter: str
    kind: MomentKind
    rows: tuple[int, int] | None
    """Output rows of the expert's matrix; None: all."""
    keys: list[str] = field(default_factory=lambda: [])
    sums: Sums | None = None


class ExpertWatch:
    """The probes of one module that holds a stack of experts."""

    def __init__(
        self, path: str, module: Any, precision: Precision, *, diagonal: bool = False
    ) -> None:
        """Take a module; `failure` says why nothing can be measured there."""
        self.diagonal = diagonal
        self.path = path
        self.module = module
        self.precision: Precision = precision
        self.probes: dict[tuple[int, str, str, tuple[int, int] | None], ExpertProbe] = {}
        self.failure = _unusual(module)
        self._names = list(inspect.signature(module.forward).parameters)

    def request(
        self,
        key: str,
        *,
        expert: int,
        parameter: str,
        kind: MomentKind,
        rows: tuple[int, int] | None,
    ) -> None:
        """Ask for the moments of one logical matrix.

        Args:
            key: the slot's.
            expert: its index.
            parameter: "gate_up_proj", "down_proj", ...
            kind: "input", "output" or "token".
            rows: of the expert's matrix [d_out, d_in]; no matter for inputs.
        """
        # Gate and up read the same vectors: one set for both.
        place = _PARTS.get(parameter, parameter) if kind == "input" else parameter
        rows = None if kind == "input" else rows
        probe = self.probes.setdefault(
            (expert, place, kind, rows), ExpertProbe(expert, parameter, kind, rows)
        )
        probe.keys.append(key)

    def hook(self, keep: Callable[[], Tensor]) -> Any:
        """The forward pre-hook; `keep` gives the flags [rows, length] of the batch under way."""

        def see(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.failure:
                return
            given = dict(zip(self._names, args, strict=False)) | kwargs
            tensors = [each for each in given.values() if isinstance(each, Tensor)]
            routing = [each for each in tensors if not each.is_floating_point()]
            flags = keep().flatten()
            if len(routing) != 1 or not tensors or tensors[0] is routing[0]:
                self.failure = "its routing is not among its inputs"
                return
            tokens = tensors[0].reshape(-1, tensors[0].shape[-1])
            choice = routing[0].reshape(len(tokens), -1) if len(tokens) else routing[0]
            if len(tokens) != len(flags):
                self.failure = f"its inputs of shape {tuple(tensors[0].shape)} are not the batch's"
                return
            self._add(tokens, choice, flags)

        return see

    def _add(self, tokens: Tensor, choice: Tensor, flags: Tensor) -> None:
        by_expert: dict[int, list[ExpertProbe]] = {}
        for probe in self.probes.values():
            by_expert.setdefault(probe.expert, []).append(probe)
        for expert, probes in by_expert.items():
            mine = (choice == expert).any(dim=1) & flags
            x = tokens[mine]
            inner: Tensor | None = None
            for probe in probes:
                v = x
                if _PARTS[probe.parameter] == "down":
                    inner = self._inner(x, expert) if inner is None else inner
                    v = inner
                if probe.kind != "input":
                    v = self._multiply(v, probe.parameter, expert, bias=False)
                    v = v if probe.rows is None else v[:, slice(*probe.rows)]
                if probe.sums is None:
                    probe.sums = Sums(
                        int(v.shape[1]), v.device, self.precision, diagonal=self.diagonal
                    )
                if probe.kind == "token":
                    v = standardise_tokens(v.to(probe.sums.dtype))
                probe.sums.add(v)

    def _inner(self, x: Tensor, expert: int) -> Tensor:
        """What the down projection of an expert is fed with."""
        module = self.module
        if not module.has_gate:
            return module.act_fn(self._multiply(x, "up_proj", expert, bias=True))
        return module._apply_gate(self._multiply(x, "gate_up_proj", expert, bias=True))

    def _multiply(self, x: Tensor, parameter: str, expert: int, *, bias: bool) -> Tensor:
        weight = getattr(self.module, parameter)[expert]
        weight = weight.T if self.module.is_transposed else weight
        added = getattr(self.module, f"{parameter}_bias")[expert] if self.module.has_bias else None
        return linear(x, weight, added if bias else None)


def _unusual(module: Any) -> str:
    """Why a module is not the library's common stack of experts; empty where it is."""
    wanted = ("has_gate", "has_bias", "is_transposed")
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    if all(hasattr(module, name) for name in (*wanted, first, "down_proj")) and all(
        isinstance(getattr(module, name), Tensor) and getattr(module, name).dim() == 3
        for name in (first, "down_proj")
    ):
        return ""
    return "it does not hold its experts in the library's common form"


def share_rows(
    module: Any, parameter: str, share: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The rows of an expert's matrix that one of several stored tensors becomes."""
    if share is None:
        return None
    index, count = share
    stack: torch.Tensor = getattr(module, parameter)
    rows = int(stack.shape[2 if module.is_transposed else 1]) // count
    return index * rows, (index + 1) * rows
