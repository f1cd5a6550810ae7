"""A low-rank repair as a LoRA adapter over the fine-tune, readable by peft.

W' = W_f + t left @ right becomes lora_B = left [d_out, r], lora_A = right [r, d_in] and a scale of
lora_alpha / r = t: the strength is a dial in the adapter's config. Every matrix keeps its own rank
(rank_pattern), so nothing is padded or scaled away. Blocks of a fused projection share its adapter:
their rows are zero outside the block. Here: turning edits into factors, and the adapter's content.
Not here: computing the edits, and the folder's atomic writing.

Shape suffixes: _or is [d_out, r], _ri is [r, d_in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot
from realign.errors import UsageError
from realign.repair.edit import Dense, LowRank
from realign.subspace.spectrum import top_triplets

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class Factors:
    """The part of a patch that stands for one logical matrix."""

    slot: Slot
    left_or: Tensor
    right_ri: Tensor
    error: float
    """norm(E - left @ right) / norm(E); 0 where the factors are the edit itself."""

    @property
    def rank(self) -> int:
        """R."""
        return self.left_or.shape[1]


@dataclass(frozen=True, eq=False)
class Patch:
    """The content of an adapter folder."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    """Rank by module."""
    edit_ranks: Mapping[str, int]
    """Of that, the rank of the repair's edit."""
    error: float
    """The largest norm(E - patch) / norm(E) of any matrix; 0 where the patch is exact."""
    model_bytes: int
    """Bytes of the tensors of the model under it."""
    extends_adapter: bool = False
    """Whether it holds the factors of the adapter that was repaired, too."""
    sidecars: Mapping[str, Path | bytes] = field(default_factory=dict[str, "Path | bytes"])
    """Small files that belong beside it, by relative name."""

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter's weights."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        ranks = self.edit_ranks.values()
        return {
            "extends_adapter": self.extends_adapter,
            "modules": len(self.ranks),
            "rank": {"min": min(ranks), "mean": sum(ranks) / len(ranks), "max": max(ranks)},
            "edit_ranks": dict(self.edit_ranks),
            "nbytes": self.nbytes,
            "model_bytes": self.model_bytes,
            "error": self.error,
        }


def factor(slot: Slot, edit: LowRank | Dense, *, max_rank: int | None = None) -> Factors:
    """The edit of one matrix as factors of at most `max_rank`.

    Raises:
        UsageError: the edit is dense, or of too large a rank for factors to be the smaller form,
            and no `max_rank` allows to truncate it.
    """
    if isinstance(edit, LowRank) and (max_rank is None or edit.rank <= max_rank):
        return Factors(slot, _stored(edit.left), _stored(edit.right), 0.0)
    if max_rank is None:
        d_out, d_in = edit.dense().shape
        raise UsageError(
            f"the edit of {slot.key} [{d_out}, {d_in}] has too large a rank for a LoRA patch",
            "write the checkpoint (without --patch), choose a smaller rank, or truncate with "
            "--max-patch-rank K; the truncation error is reported",
        )
    left, right, error = _truncated(edit, max_rank)
    return Factors(slot, _stored(left), _stored(right), error)


def build_patch(factors: Mapping[str, Factors], finetuned: Checkpoint, *, strength: float) -> Patch:
    """The adapter's tensors and config.

    Args:
        factors: by slot key; every matrix that is edited.
        finetuned: the checkpoint under the patch.
        strength: t, written as lora_alpha = t r.

    Raises:
        UsageError: a matrix that LoRA cannot reach (one expert of a fused stack), or linear layers
            stored both ways round.
    """
    by_tensor: dict[str, list[Factors]] = {}
    for each in factors.values():
        by_tensor.setdefault(each.slot.tensor, []).append(each)
    if len({part.slot.transposed for part in factors.values()}) > 1:
        raise UsageError(
            "the model stores some linear layers transposed and some not: one LoRA patch cannot "
            "hold both",
            "write the checkpoint (without --patch)",
        )
    prefix = _module_prefix(finetuned)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, parts in by_tensor.items():
        shape = finetuned.tensors[name].shape
        if len(shape) != 2 or not name.endswith(".weight"):
            raise UsageError(
                f"{name} of shape {list(shape)} is no linear layer: LoRA cannot reach it",
                "write the checkpoint (without --patch)",
            )
        module = prefix + name.removesuffix(".weight")
        left_or, right_ri = _fused(parts, d_out=shape[1] if parts[0].slot.transposed else shape[0])
        ranks[module] = left_or.shape[1]
        tensors[f"base_model.model.{module}.lora_A.weight"] = right_ri
        tensors[f"base_model.model.{module}.lora_B.weight"] = left_or
    common = max(ranks.values(), default=1)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(finetuned),
        "revision": finetuned.commit,
        "inference_mode": True,
        "r": common,
        "lora_alpha": number(strength * common),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(part.slot.transposed for part in factors.values()),
        "target_modules": sorted(ranks),
        "rank_pattern": dict(sorted(ranks.items())),
        "alpha_pattern": {name: number(strength * rank) for name, rank in sorted(ranks.items())},
    }
    return Patch(
        dict(sorted(tensors.items())),
        config,
        ranks=dict(sorted(ranks.items())),
        edit_ranks=dict(sorted(ranks.items())),
        error=max((part.error for part in factors.values()), default=0.0),
        model_bytes=sum(info.nbytes for info in finetuned.tensors.values()),
    )


def _truncated(edit: LowRank | Dense, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best approximation of E of a given rank (Eckart-Young), and its relative error."""
    if isinstance(edit, Dense):
        kept = top_triplets(edit.delta, rank)
        total = float(edit.delta.double().square().sum())
        tail = total - float(kept.s.square().sum())
        scale = kept.s.sqrt()
        left, right = kept.u * scale, scale[:, None] * kept.v.T
    else:
        # E = Q_1 (R_1 R_2^T) Q_2^T: only the small middle matrix is decomposed.
        q1, r1 = torch.linalg.qr(edit.left.double())
        q2, r2 = torch.linalg.qr(edit.right.double().T)
        u, s, vt = torch.linalg.svd(r1 @ r2.T)
        scale = s[:rank].sqrt()
        left, right = q1 @ (u[:, :rank] * scale), (scale[:, None] * vt[:rank]) @ q2.T
        total, tail = float(s.square().sum()), float(s[rank:].square().sum())
    return left, right, math.sqrt(max(tail, 0.0) / total) if total > 0 else 0.0


def _fused(parts: list[Factors], *, d_out: int) -> tuple[Tensor, Tensor]:
    """The factors of a whole stored matrix from those of its row blocks."""
    if len(parts) == 1 and parts[0].slot.rows is None:
        return parts[0].left_or, parts[0].right_ri
    rank = sum(part.rank for part in parts)
    left_or = parts[0].left_or.new_zeros(d_out, rank)
    at = 0
    for part in parts:
        start, stop = part.slot.rows or (0, part.left_or.shape[0])
        left_or[start:stop, at : at + part.rank] = part.left_or
        at += part.rank
    return left_or, torch.cat([part.right_ri for part in parts])


def _module_prefix(finetuned: Checkpoint) -> str:
    """What the causal model puts before the names of a checkpoint of its bare decoder."""
    import transformers

    names: list[str] = list(finetuned.config.get("architectures") or [])
    kind: Any = getattr(transformers, names[0], None) if names else None
    prefix = str(getattr(kind, "base_model_prefix", "") or "")
    if not prefix or any(name.startswith(f"{prefix}.") for name in finetuned.tensors):
        return ""
    return f"{prefix}."


def base_name(finetuned: Checkpoint) -> str:
    """How the adapter names the fine-tune: the Hub id where it came from there, else the folder."""
    if finetuned.commit is None:
        return str(finetuned.folder.resolve())
    return finetuned.source.removeprefix("hf://").partition("@")[0]


def _stored(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32).contiguous().clone()


def number(value: float) -> int | float:
    """A number as a config spells it: 4, not 4.0."""
    return int(value) if float(value).is_integer() else value
