"""The fast form of E = factor (W_aligned - W_minus): every entry read once, in scratch that stays.

What `Method.edit` and `apply_edit` compute for such a method, bit for bit, without allocating: a
block of entries is upcast into buffers that stay in the processor's cache, and all figures are
taken while it is there. The sums that the figures need also show whether every entry is finite,
which saves a pass over each checkpoint. Not here: which methods have this form
(`Method.linear_edit`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from realign.checkpoint.buffers import Buffers
from realign.repair.apply import Effect
from realign.repair.edit import Dense, Difference, Edit, Unchanged

BLOCK = 1 << 17
"""Entries in work at once: below it calls cost more than arithmetic, above it memory does."""

_TYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))


@dataclass
class _Sums:
    """The figures of one chunk as they are added up, in float64."""

    edited: bool = False
    changed: int = 0
    finetuned_sq: float = 0.0
    task_sq: float = 0.0
    difference_sq: float = 0.0  # before the factor
    edit_task: float = 0.0
    realised: float = 0.0


class EntryWork:
    """Edits chunks of any shape by a difference; each thread has scratch of its own."""

    def __init__(self, linear: Difference, *, vector: str | None, strength: float) -> None:
        """Settle the factors.

        Args:
            linear: what the method says of its edits.
            vector: the checkpoint that makes the method's safety vector, if it has one.
            strength: t.
        """
        self._linear, self._vector = linear, vector
        # One after the other, as `edit` and `apply_edit` do: two roundings, not one.
        self._factors = [each for each in (linear.factor, strength) if each != 1.0]
        self._scale = linear.factor * strength
        self._exact = linear.exact and strength == 1.0
        self._buffers = Buffers()
        self._own = threading.local()

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether this form can take these tensors: all of at most float32, all of one shape."""
        minus = self._linear.minus
        return (
            set(tensors) == {"finetuned", "aligned", minus}
            and self._vector in {None, minus}
            and all(tensor.dtype in _TYPES for tensor in tensors.values())
            and len({tensor.shape for tensor in tensors.values()}) == 1
        )

    def edit(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Edit, Effect]:
        """W(t) in the dtype of the fine-tune, what kind of edit it was, and its effect.

        Nothing is checked for finiteness; where `Effect.is_finite`, everything is finite.
        """
        finetuned = tensors["finetuned"]
        stored = self._buffers.empty(tuple(finetuned.shape), finetuned.dtype)
        parts = (finetuned, tensors["aligned"], tensors[self._linear.minus], stored)
        sums = _Sums()
        with torch.inference_mode():  # a third off the cost of a call
            for rows in zip(*(part.reshape(-1).split(BLOCK) for part in parts), strict=True):
                self._block(*rows, sums=sums)
        edit = Dense(torch.empty(0)) if sums.edited else Unchanged(self._linear.zero)
        return stored, edit, self._effect(sums, finetuned.numel())

    def _block(
        self, finetuned: Tensor, aligned: Tensor, minus: Tensor, out: Tensor, *, sums: _Sums
    ) -> None:
        """Write one block of W(t) to `out` and add its figures up."""
        w, a, e, r = self._scratch(finetuned.numel())
        w.copy_(finetuned)
        a.copy_(aligned)
        r.copy_(minus)
        torch.sub(a, r, out=e)
        difference_sq = float(torch.dot(e, e))
        torch.sub(w, a, out=a)  # the task vector
        sums.finetuned_sq += float(torch.dot(w, w))
        sums.task_sq += float(torch.dot(a, a))
        if difference_sq == 0.0 and not bool(e.any()):
            out.copy_(finetuned)
            return
        sums.edited = True
        sums.difference_sq += difference_sq
        for factor in self._factors:
            e.mul_(factor)
        sums.edit_task += float(torch.dot(e, a))
        torch.add(w, e, out=r)
        out.copy_(aligned if self._exact else r)
        r.copy_(out)
        r.sub_(w)
        sums.realised += float(torch.dot(r, e))
        sums.changed += int(np.count_nonzero(r.numpy() != 0.0))  # several times torch's speed

    def _effect(self, sums: _Sums, numel: int) -> Effect:
        edit_sq = sums.difference_sq * self._scale**2
        return Effect(
            numel=numel,
            changed=sums.changed,
            max_edit=(edit_sq / max(1, numel)) ** 0.5,
            edit_sq=edit_sq,
            realised=sums.realised,
            finetuned_sq=sums.finetuned_sq,
            task_sq=sums.task_sq,
            edit_task=sums.edit_task,
            safety_sq=None if self._vector is None else sums.difference_sq,
        )

    def _scratch(self, numel: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if not hasattr(self._own, "buffers"):
            self._own.buffers = torch.empty(4, BLOCK).unbind()
        w, a, e, r = self._own.buffers
        if numel == BLOCK:
            return w, a, e, r
        return w[:numel], a[:numel], e[:numel], r[:numel]
