"""LoRA arithmetic and configuration: which tensors an adapter changes and by how much.

The one place of this room that computes: W + s B A (arXiv:2106.09685, equation 3, with s = alpha/r,
or alpha/sqrt(r) for rank-stabilised LoRA, arXiv:2312.03732) and its DoRA form m (W + s B A) / norm
(arXiv:2402.09353, equation 5). The order of operations is that of peft's `merge_and_unload`, so
that in float32 the result is the same bit for bit. Not here: finding and reading the files
(`adapter`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from realign.errors import CheckpointError

# Initialisations that change the base weights: the saved factors only make sense over those.
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Types without weights of their own to merge: virtual tokens, prefixes, prompts inside layers.
_PROMPTS = frozenset(
    ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
     "CPT", "CARTRIDGE")
)  # fmt: skip
_ROUTERS = frozenset(("XLORA", "POLY"))

# Options under which the adapter is more than W + s B A.
_NOT_ADDITIVE = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
}

BLOCK_ELEMENTS = 2**26
"""A LoRA product is formed in row blocks of at most this many entries (256 MB in float32)."""


@dataclass(frozen=True)
class LoraConfig:
    """What adapter_config.json says about the arithmetic."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    fan_in_fan_out: bool
    ties_weights: bool
    """`ensure_weight_tying`: trained embeddings are meant for the tied head, too."""
    token_indices: Mapping[str, tuple[int, ...]]
    """Rows replaced by trained tokens, by module name (the last parts)."""
    parameters: tuple[str, ...] = ()
    """Bare parameters with LoRA (stacks of experts), by the last parts of their names."""

    def rank_of(self, module: str) -> int:
        """The rank of one target module or parameter."""
        return int(_by_pattern(self.rank_pattern, self._target(module), self.rank))

    def scale_of(self, module: str) -> float:
        """The factor s of one target module or parameter."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, self._target(module), self.alpha)
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def _target(self, module: str) -> str:
        """How the patterns name a module: by its weight where that is the target."""
        weight = f"{module}.weight"
        if any(weight == name or weight.endswith(f".{name}") for name in self.parameters):
            return weight
        return module


def _by_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    for key, value in pattern.items():  # the first key that matches the end of the name wins
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def parse_lora_config(folder: Path, config: Mapping[str, Any]) -> LoraConfig:
    """Check that an adapter is a LoRA that can be merged, and read its numbers.

    Raises:
        CheckpointError: another PEFT type, a variant that does not merge, or missing numbers.
    """
    kind = str(config.get("peft_type", "unknown")).upper()
    if kind != "LORA":
        _refuse_type(folder, kind)
    for key, what in _NOT_ADDITIVE.items():
        if config.get(key):
            _refuse(folder, f"an adapter with {what}", "it is not a plain sum of weights")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_ALTERS_BASE):
        _refuse(
            folder,
            f"a LoRA initialised with {init}",
            "it is valid only over base weights that this initialisation has altered",
        )
    try:
        tokens = config.get("trainable_token_indices") or {}
        if isinstance(tokens, list):
            tokens = {"embed_tokens": tokens}
        return LoraConfig(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rank_pattern={str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={
                str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()
            },
            rank_stabilised=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            fan_in_fan_out=bool(config.get("fan_in_fan_out")),
            ties_weights=bool(config.get("ensure_weight_tying")),
            token_indices={
                str(k): tuple(int(i) for i in v) for k, v in cast(dict[str, Any], tokens).items()
            },
            parameters=tuple(str(each) for each in config.get("target_parameters") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} is incomplete or malformed: {error!r}",
            "export the adapter again with peft",
        ) from None


def _refuse_type(folder: Path, kind: str) -> None:
    if kind in _PROMPTS:
        raise CheckpointError(
            f"{folder} is an adapter of type {kind}: it changes what the model reads, not its "
            "weights, and cannot be merged",
            "give the model under it; there is nothing of the adapter to repair in weight space",
        )
    if kind in _ROUTERS:
        raise CheckpointError(
            f"{folder} is an adapter of type {kind}: it mixes several adapters anew for every "
            "token, and cannot be merged",
            "merge one of its adapters with peft (merge_and_unload, save_pretrained) and give the "
            "merged folder",
        )
    _refuse(folder, f"an adapter of type {kind}", "realign reads LoRA and DoRA adapters")


def _refuse(folder: Path, what: str, why: str) -> None:
    raise CheckpointError(
        f"{folder} is {what}: {why}",
        "merge it with peft (merge_and_unload, save_pretrained) and give the merged folder",
    )


@dataclass(frozen=True, eq=False)
class Factors:
    """The trained factors of one module, in at least float32."""

    a: Tensor
    """[r, d_in]; for an embedding [r, vocabulary]; for a stack [experts, r, d_in]."""
    b: Tensor
    """[d_out, r]; for an embedding [width, r]; for a stack [experts, d_out, r]."""
    scale: float
    transposed: bool
    """The weight is stored as [d_in, d_out] (Conv1D) or [vocabulary, width] (embedding)."""
    magnitude: Tensor | None
    """DoRA's m, one per output."""

    @property
    def stacked(self) -> bool:
        """Whether there is one product per expert."""
        return self.a.dim() == 3

    @property
    def rows(self) -> int:
        """Rows of the stored weight; the experts of a stack."""
        if self.stacked:
            return self.a.shape[0]
        return self.a.shape[1] if self.transposed else self.b.shape[0]

    @property
    def columns(self) -> int:
        """Entries in one row of the stored weight."""
        if self.stacked:
            return self.b.shape[1] * self.a.shape[2]
        return self.b.shape[0] if self.transposed else self.a.shape[1]

    @property
    def block_rows(self) -> int:
        """Stored rows that are merged at once.

        A fixed division of each matrix, whatever rows are asked for: the rounding of a product may
        depend on its shape, and two reads of one row must agree. A transposed DoRA matrix is one
        block, because its norms run over all stored rows.
        """
        if self.transposed and self.magnitude is not None:
            return self.rows
        return min(self.rows, max(1, BLOCK_ELEMENTS // max(1, self.columns)))

    def merge(self, weight: Tensor, start: int) -> Tensor:
        """Merge into stored rows [start, start + len(weight)), a block of `block_rows`.

        Returns:
            The merged rows in the dtype of `weight`.
        """
        stop = start + weight.shape[0]
        if self.stacked:
            delta = self.b[start:stop] @ self.a[start:stop]
            delta = (delta.mT if self.transposed else delta) * self.scale
        elif self.transposed:
            delta = (self.b @ self.a[:, start:stop]).T * self.scale
        else:
            delta = (self.b[start:stop] @ self.a) * self.scale
        dtype = weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        if self.magnitude is None:
            return (weight.to(wide) + delta).to(dtype)
        if self.transposed:
            norm = torch.linalg.norm(weight.T + delta.T, dim=1)
            factor = (self.magnitude / norm).view(1, -1)
        else:
            norm = torch.linalg.norm(weight + delta, dim=1)
            factor = (self.magnitude[start:stop] / norm).view(-1, 1)
        return (factor * (weight + delta)).to(dtype)
