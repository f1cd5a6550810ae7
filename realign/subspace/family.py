"""A fine-tune measured against the known alignment subspace of its family, in one pass.

The alignment vector a = W_ref - W_base of a family is decomposed once: U_k, S_k, V_k per matrix.
With t = W_sub - W_ref, the task vector of any of its fine-tunes, and P_k a = U_k S_k V_k^T:

    relative distance   norm(t) / norm(W_ref)
    energy              norm(U_k^T t) / norm(t); its square over its chance level k / d_out (excess)
    retained_k          1 + <t, P_k a> / <P_k a, P_k a>,  <t, P_k a> = sum S_i (u_i^T t v_i)

None of them needs the base, singular values of t or a projector: t passes by in blocks, and only
U_k^T t [k, d_in] is kept. `retained_k` is 1 for t = 0, 0 for t = -a, and "alignment retained" where
the subspace is all of a; otherwise it is another quantity and must not be called by that name.

Here: the sums of one matrix and their ratios. Not here: which tensors there are and how they are
read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from realign.subspace.drift import STORAGE_PRECISION
from realign.subspace.spectrum import Triplets
from realign.subspace.sums import Sums, ratio

BLOCK = 2**19
"""Entries worked on at once: few enough to stay in the processor's cache."""
RUN = 2**12
"""Entries whose squares are summed in the dtype of the block."""
FEWEST_ROWS = 64
"""Rows worked on at once where they are long: each time, all of U_k^T t is read and written."""


@dataclass(frozen=True)
class FamilyTerms(Sums):
    """Numerators and denominators of one matrix, or their sums over several.

    Attributes:
        matrices: number of matrices.
        task: <t, t>.
        reference: <W_ref, W_ref>.
        known: number of matrices that have a subspace.
        known_task: <t, t> of these.
        projected: norm(U_k^T t)^2.
        chance: (k / d_out) <t, t>.
        cross: <t, P_k a>.
        alignment: <P_k a, P_k a>.
        k: number of directions.
        below_storage_precision: matrices whose t may be rounding of the stored weights.
    """

    matrices: int = 0
    task: float = 0.0
    reference: float = 0.0
    known: int = 0
    known_task: float = 0.0
    projected: float = 0.0
    chance: float = 0.0
    cross: float = 0.0
    alignment: float = 0.0
    k: int = 0
    below_storage_precision: int = 0

    def metrics(self) -> FamilyMetrics:
        """Return the ratios; None where the denominator is 0."""
        distance = ratio(self.task, self.reference)
        squared = ratio(self.projected, self.known_task)
        retained = ratio(self.cross, self.alignment)
        return FamilyMetrics(
            matrices=self.matrices,
            relative_distance=None if distance is None else math.sqrt(distance),
            energy=None if squared is None else math.sqrt(squared),
            energy_squared=squared,
            excess=ratio(self.projected, self.chance),
            retained_k=None if retained is None else 1.0 + retained,
            k=self.k,
            known=self.known,
            below_storage_precision=self.below_storage_precision,
        )


@dataclass(frozen=True)
class FamilyMetrics:
    """The ratios of `FamilyTerms`; None where they are undefined.

    Attributes:
        matrices: number of matrices behind the distance.
        relative_distance: norm(t) / norm(W_ref).
        energy: norm(U_k^T t) / norm(t).
        energy_squared: its square, the share of the task vector's energy in the subspace.
        excess: the square over its chance level.
        retained_k: 1 kept, 0 undone, above 1 amplified, within the k known directions.
        k: number of directions.
        known: number of matrices that have a subspace, which the last five stand for.
        below_storage_precision: number of matrices whose t may be rounding.
    """

    matrices: int
    relative_distance: float | None
    energy: float | None
    energy_squared: float | None
    excess: float | None
    retained_k: float | None
    k: int
    known: int
    below_storage_precision: int


class Scratch(threading.local):
    """Memory for the blocks under work, of its own in every thread that asks.

    Used again for every block it stays in the cache, and is not mapped afresh.
    """

    def __init__(self) -> None:
        """Start with none."""
        self._memory = torch.empty(0)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return memory of that shape, good until this thread asks again."""
        size = math.prod(shape)
        if self._memory.numel() < size or self._memory.dtype != dtype:
            self._memory = torch.empty(size, dtype=dtype)
        return self._memory[:size].view(shape)


class BlockSums:
    """What a run of rows or of columns of one matrix adds to its sums, worked out by one thread.

    Attributes:
        task: <t, t>.
        reference: <W_ref, W_ref>.
        precision: relative spacing of the stored weights, 0 where it does not matter.
        image: U_k^T t over the rows seen [k, width], None without a subspace.
    """

    def __init__(self, width: int, u_ok: Tensor | None, scratch: Scratch) -> None:
        """Start with nothing seen.

        Args:
            width: columns of the run.
            u_ok: left singular vectors of the whole matrix [d_out, k]; None: the distance alone.
            scratch: memory to work in.
        """
        self.task = self.reference = self.precision = 0.0
        self.image: Tensor | None = None
        self._width = width
        self._u_ok = u_ok
        self._scratch = scratch

    def add(self, reference: Tensor, subject: Tensor, *, row: int = 0, column: int = 0) -> None:
        """Take a part of the run; all parts have the dtypes of the first.

        Args:
            reference: [rows, columns] of W_ref, in the dtype it has on disk; the fastest dimension
                may be either.
            subject: the same part of W_sub.
            row: where the part begins in the matrix.
            column: where the part begins in the run.
        """
        assert reference.shape == subject.shape, (tuple(reference.shape), tuple(subject.shape))
        rows, columns = reference.shape
        dtypes = (reference.dtype, subject.dtype)
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        self.precision = max(STORAGE_PRECISION.get(each, 0.0) for each in dtypes)
        u_rk = image = None
        if self._u_ok is not None:
            u_rk = self._u_ok[row : row + rows].to(dtype)
            if self.image is None:
                self.image = torch.zeros(u_rk.shape[1], self._width, dtype=dtype)
            image = self.image[:, column : column + columns]
        turned = reference.stride(0) < reference.stride(1)
        if turned:  # entries are upcast much faster in the order in which they lie
            reference, subject = reference.T, subject.T
        height, length = reference.shape
        step = max(FEWEST_ROWS, BLOCK // max(1, length))
        for start in range(0, height, step):
            part = slice(start, min(start + step, height))
            t, changed = self._difference(reference[part], subject[part], dtype)
            if u_rk is None or image is None or not changed:  # most tensors may be untouched
                continue
            if turned:
                image[:, part].addmm_(u_rk.T, t.T)
            else:
                image.addmm_(u_rk[part].T, t)

    def _difference(
        self, reference: Tensor, subject: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, bool]:
        """Return t, good until the next call, and whether it is not 0; add the sums of squares.

        Few calls on many entries: threads that work at once wait for each other at every call.
        """
        rows, columns = reference.shape
        both = self._scratch.empty(2, rows, columns, dtype=dtype)
        w, t = both
        w.copy_(reference)
        t.copy_(subject).sub_(w)
        size, task = _squares(both)
        self.reference += size
        self.task += task
        return t, task != 0.0


class FamilyMeter:
    """Takes the blocks of one matrix of both checkpoints as they pass, each entry once."""

    def __init__(self, d_in: int, triplets: Triplets | None = None) -> None:
        """Start with nothing seen.

        Args:
            d_in: columns of the matrix; tensors of other shapes are taken as one row.
            triplets: the known subspace [d_out, k], [k], [d_in, k]; None gives the distance alone.
        """
        self._known = triplets if triplets is not None and triplets.s.numel() else None
        self._task = self._reference = self._precision = 0.0
        k = self._known.s.numel() if self._known else 0
        self._image_ki = torch.zeros(k, d_in, dtype=torch.float64)

    def add(self, reference: Tensor, subject: Tensor, *, row: int = 0, column: int = 0) -> None:
        """Take a block of the matrix: [rows, columns] of both, where it begins in the matrix."""
        block = self.block(reference.shape[1])
        block.add(reference, subject, row=row)
        self.take(block, column=column)

    def block(self, width: int | None = None, scratch: Scratch | None = None) -> BlockSums:
        """Return empty sums, for one thread to fill.

        Args:
            width: columns of the run, all of the matrix by default.
            scratch: memory to work in, if there is some to share.
        """
        width = self._image_ki.shape[1] if width is None else width
        return BlockSums(width, self._known.u if self._known else None, scratch or Scratch())

    def take(self, sums: BlockSums, *, column: int = 0) -> None:
        """Add the sums of a run that begins at this column; always in the same order."""
        self._task += sums.task
        self._reference += sums.reference
        self._precision = max(self._precision, sums.precision)
        if sums.image is not None:
            self._image_ki[:, column : column + sums.image.shape[1]] += sums.image

    def terms(self) -> FamilyTerms:
        """Return the sums; not finite where an entry is not."""
        below = 0.0 < self._task < self._precision**2 * self._reference
        plain = FamilyTerms(
            matrices=1,
            task=self._task,
            reference=self._reference,
            below_storage_precision=int(below),
        )
        if self._known is None:
            return plain
        s_k = self._known.s.to(torch.float64)
        along_k = (self._image_ki * self._known.v.T).sum(dim=1)
        return plain + FamilyTerms(
            known=1,
            known_task=self._task,
            projected=float(self._image_ki.square().sum()),
            chance=s_k.numel() / self._known.u.shape[0] * self._task,
            cross=float(torch.dot(s_k, along_k)),
            alignment=float(s_k.square().sum()),
            k=s_k.numel(),
        )


def merge_family(terms: Iterable[FamilyTerms]) -> FamilyTerms:
    """Return the sum of the terms of several matrices."""
    return sum(terms, start=FamilyTerms())


def _squares(both: Tensor) -> tuple[float, float]:
    """The sums of squares of two blocks that lie together: of runs in their dtype, then float64.

    A product of stacked rows and columns is a dot of BLAS for each, twice as fast as torch's norm.
    Runs are short enough that BLAS sums each in one thread, whatever the number of its threads.
    """
    values: Any = both.view(2, -1).numpy()
    whole = values.shape[1] // RUN * RUN
    total = np.zeros(2)
    for part in (values[:, :whole].reshape(2, -1, RUN), values[:, None, whole:]):
        if part.size:
            with np.errstate(over="ignore"):  # infinity is what the caller looks for
                dots = np.matmul(part[..., None, :], part[..., :, None])
            total += dots.sum(axis=(1, 2, 3), dtype=np.float64)
    return float(total[0]), float(total[1])
