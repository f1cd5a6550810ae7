"""From edits to a LoRA adapter: exact factors, or the best of a given rank.

W' = W_f + t left @ right becomes lora_B = left [d_out, r], lora_A = right [r, d_in] and a scale of
lora_alpha / r = t. Here: turning the edit of one matrix into factors, and choosing what kind of
adapter they make. Not here: placing factors into modules (`patch_modules`), the adapter's content
(`patch_content`), computing edits, and writing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot
from realign.errors import UsageError
from realign.repair.edit import Dense, LowRank
from realign.repair.patch_adapter import extend_adapter
from realign.repair.patch_content import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Patch, plain_patch
from realign.repair.patch_modules import Factors, gather
from realign.subspace.eigen import decomposing
from realign.subspace.spectrum import top_triplets

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "Factors", "Patch", "build_patch", "factor"]


def factor(slot: Slot, edit: LowRank | Dense, *, max_rank: int | None = None) -> Factors:
    """The edit of one matrix as factors of at most `max_rank`.

    Raises:
        UsageError: the edit is dense, or of too large a rank for factors to be the smaller form,
            and no `max_rank` allows to truncate it.
        CheckpointError: a decomposition does not converge.
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
    with decomposing(slot.key):
        left, right, error = _truncated(edit, max_rank)
    return Factors(slot, _stored(left), _stored(right), error)


def build_patch(factors: Mapping[str, Factors], finetuned: Checkpoint, *, strength: float) -> Patch:
    """The adapter's tensors and config.

    Args:
        factors: by slot key; every matrix that is edited.
        finetuned: the checkpoint that was repaired. Where it is an adapter, the result is an
            adapter over that one's base, with the fine-tune's own factors in it.
        strength: t, written as lora_alpha = t r.

    Raises:
        UsageError: a matrix that LoRA cannot reach, or linear layers stored both ways round.
    """
    modules = gather(factors.values(), finetuned)
    error = max((part.error for part in factors.values()), default=0.0)
    if isinstance(finetuned, AdapterCheckpoint):
        return extend_adapter(modules, finetuned, strength=strength, error=error)
    return plain_patch(modules, finetuned, strength=strength, error=error)


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


def _stored(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32).contiguous().clone()
