"""The arithmetic of applying an edit: W(t) = W_f + t E, in float32, added once and cast once.

Pure tensor functions, chunk by chunk, so that the float32 scratch stays small however large the
matrix. Files and plans are not known here.

Shape suffixes: _oi is [d_out, d_in]; _ri is a block of rows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from realign.repair.edit import Dense, LowRank

CHUNK_ELEMENTS = 1 << 17
"""Entries handled at once on the CPU: the scratch then stays in the second-level cache."""

DEVICE_CHUNK_ELEMENTS = 1 << 24
"""Entries handled at once on an accelerator, where small kernels cost more than memory."""


@dataclass(frozen=True)
class Effect:
    """What an edit did to the numbers of one tensor: sums over entries, so chunks add up.

    R = round(W_f + tE) - W_f is what of tE survives the cast to the output's dtype.
    """

    numel: int = 0
    changed: int = 0  # entries whose stored value differs from the fine-tune's
    max_edit: float = 0.0  # max |tE|, or a lower bound of it that is 0 only where E is
    edit_sq: float = 0.0  # <tE, tE>
    realised: float = 0.0  # <R, tE>
    finetuned_sq: float = 0.0  # <W_f, W_f>
    task_sq: float | None = None  # <D, D> with D = W_f - W_a, where W_a is at hand
    edit_task: float | None = None  # <tE, D>
    safety_sq: float | None = None  # <S, S> with S the safety vector, where it is at hand

    def __add__(self, other: Effect) -> Effect:
        return Effect(
            numel=self.numel + other.numel,
            changed=self.changed + other.changed,
            max_edit=max(self.max_edit, other.max_edit),
            edit_sq=self.edit_sq + other.edit_sq,
            realised=self.realised + other.realised,
            finetuned_sq=self.finetuned_sq + other.finetuned_sq,
            task_sq=_plus(self.task_sq, other.task_sq, empty=not self.numel),
            edit_task=_plus(self.edit_task, other.edit_task, empty=not self.numel),
            safety_sq=_plus(self.safety_sq, other.safety_sq, empty=not self.numel),
        )

    @property
    def is_finite(self) -> bool:
        """Whether all sums are finite: then so is every entry that went into them."""
        sums = (self.edit_sq, self.realised, self.finetuned_sq, self.task_sq, self.safety_sq)
        return all(each is None or math.isfinite(each) for each in sums)

    @property
    def survival(self) -> float | None:
        """<R, E> / <E, E>: 1 where rounding kept the edit, 0 where it ate it; None without edit."""
        if self.max_edit == 0.0:
            return None
        if self.edit_sq == 0.0:  # the squares underflow float32, so nothing of it can survive
            return 0.0
        return self.realised / self.edit_sq

    @property
    def relative_norm(self) -> float | None:
        """norm(E) / norm(W_f)."""
        return _ratio(self.edit_sq, self.finetuned_sq)

    @property
    def safety_share(self) -> float | None:
        """norm(E) / norm(delta_safe)."""
        return _ratio(self.edit_sq, self.safety_sq)

    @property
    def cos_task(self) -> float | None:
        """cos(E, delta_task)."""
        if self.task_sq is None or self.edit_task is None:
            return None
        scale = math.sqrt(self.edit_sq) * math.sqrt(self.task_sq)
        return self.edit_task / scale if scale > 0 else None


def apply_edit(
    finetuned: Tensor,
    edit: LowRank | Dense,
    *,
    strength: float,
    aligned: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Effect]:
    """W(t) = W_f + t E in the dtype of `finetuned`, and what the edit did.

    Args:
        finetuned: W_f [d_out, d_in], or any shape where the edit is dense.
        edit: the edit at strength 1. A `Dense` edit with a target is taken as it is, unrounded, at
            strength 1.
        strength: t.
        aligned: W_a of the same shape, for the task vector's figures.
        other: W_0 or W_u of the same shape, for the safety vector's norm.

    Returns:
        W(t), on the device of `finetuned`, and its `Effect`. Neither is checked for finiteness.
    """
    work = torch.float64 if finetuned.dtype == torch.float64 else torch.float32
    result = torch.empty_like(finetuned)
    total = Effect()
    for start, stop in row_chunks(tuple(finetuned.shape), chunk_elements(finetuned)):
        rows = slice(start, stop)
        w_ri = finetuned[rows].to(work)
        e_ri = edit_rows(edit, rows).to(device=w_ri.device, dtype=work)
        if strength != 1.0:
            e_ri = e_ri * strength
        if strength == 1.0 and isinstance(edit, Dense) and edit.target is not None:
            new_ri = edit.target[rows].to(device=w_ri.device, dtype=finetuned.dtype)
        else:
            new_ri = torch.add(w_ri, e_ri).to(finetuned.dtype)
        result[rows] = new_ri
        total = total + _effect(
            w_ri,
            e_ri,
            new_ri,
            aligned=None if aligned is None else aligned[rows],
            other=None if other is None else other[rows],
        )
    return result, total


def edit_rows(edit: LowRank | Dense, rows: slice) -> Tensor:
    """The rows of E: the product of the factors is never formed as a whole."""
    if isinstance(edit, Dense):
        return edit.delta[rows]
    return edit.left[rows] @ edit.right


def unchanged_effect(
    finetuned: Tensor, *, aligned: Tensor | None = None, other: Tensor | None = None
) -> Effect:
    """The effect of leaving a tensor, or a chunk of one that is edited elsewhere, alone."""
    work = torch.float64 if finetuned.dtype == torch.float64 else torch.float32
    total = Effect()
    for start, stop in row_chunks(tuple(finetuned.shape), chunk_elements(finetuned)):
        rows = slice(start, stop)
        total = total + _effect(
            finetuned[rows].to(work),
            None,
            finetuned[rows],
            aligned=None if aligned is None else aligned[rows],
            other=None if other is None else other[rows],
        )
    return total


def row_chunks(shape: tuple[int, ...], elements: int) -> Iterator[tuple[int, int]]:
    """Blocks of dim 0 of about `elements` entries; a scalar or an empty tensor is one block."""
    if not shape:
        yield 0, 1
        return
    per_row = max(1, math.prod(shape[1:]))
    step = max(1, elements // per_row)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def chunk_elements(tensor: Tensor) -> int:
    """How many entries of this tensor are handled at once."""
    return CHUNK_ELEMENTS if tensor.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity: one pass, no temporaries."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _effect(
    w_ri: Tensor,
    e_ri: Tensor | None,
    new_ri: Tensor,
    *,
    aligned: Tensor | None,
    other: Tensor | None,
) -> Effect:
    w = w_ri.reshape(-1)
    task = task_sq = safety_sq = None
    if aligned is not None:
        a = aligned.reshape(-1).to(device=w.device, dtype=w.dtype)
        task = w - a
        task_sq = float(torch.dot(task, task))
        if other is not None:
            safety = a - other.reshape(-1).to(device=w.device, dtype=w.dtype)
            safety_sq = float(torch.dot(safety, safety))
    sums = Effect(
        numel=w.numel(),
        finetuned_sq=float(torch.dot(w, w)),
        task_sq=task_sq,
        edit_task=None if task is None else 0.0,
        safety_sq=safety_sq,
    )
    if e_ri is None:
        return sums
    e = e_ri.reshape(-1)
    r = new_ri.reshape(-1).to(w.dtype) - w
    return replace(
        sums,
        changed=int(torch.count_nonzero(r)),
        max_edit=_largest(e),
        edit_sq=float(torch.dot(e, e)),
        realised=float(torch.dot(r, e)),
        edit_task=None if task is None else float(torch.dot(e, task)),
    )


def _largest(values: Tensor) -> float:
    """The largest magnitude in one pass, without a copy."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def _plus(left: float | None, right: float | None, *, empty: bool) -> float | None:
    if left is None:
        return right if empty else None
    return None if right is None else left + right


def _ratio(part_sq: float, whole_sq: float | None) -> float | None:
    return math.sqrt(part_sq / whole_sq) if whole_sq else None
