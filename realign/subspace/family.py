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
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from realign.subspace.drift import STORAGE_PRECISION
from realign.subspace.spectrum import Triplets
from realign.subspace.sums import Sums, ratio

BLOCK = 2**17
"""Entries worked on at once: few enough to stay in the processor's cache."""


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


@dataclass(frozen=True, eq=False)
class BlockSums:
    """What one block of a matrix adds to its sums.

    Attributes:
        task: <t, t>.
        reference: <W_ref, W_ref>.
        precision: relative spacing of the stored weights, 0 where it does not matter.
        image: U_k^T t over the block's rows [k, columns], None without a subspace.
    """

    task: float
    reference: float
    precision: float
    image: Tensor | None


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
        """Take a block of the matrix: `sums`, then `take`."""
        self.take(self.sums(reference, subject, row=row), column=column)

    def sums(self, reference: Tensor, subject: Tensor, *, row: int = 0) -> BlockSums:
        """Work a block out without changing the meter: several threads may do that at once.

        Args:
            reference: [rows, columns] of W_ref, in the dtype it has on disk.
            subject: the same block of W_sub.
            row: where the block begins in the matrix.
        """
        assert reference.shape == subject.shape, (tuple(reference.shape), tuple(subject.shape))
        rows, columns = reference.shape
        dtypes = (reference.dtype, subject.dtype)
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        step = max(1, min(rows, BLOCK // max(1, columns)))
        weight, delta = (torch.empty(step, columns, dtype=dtype) for _ in range(2))
        u_rk = None if self._known is None else self._known.u[row : row + rows].to(dtype)
        image = None if u_rk is None else torch.zeros(u_rk.shape[1], columns, dtype=dtype)
        task = size = 0.0
        for start in range(0, rows, step):
            count = min(step, rows - start)
            part = slice(start, start + count)
            w, t = weight[:count], delta[:count]
            w.copy_(reference[part])
            t.copy_(subject[part]).sub_(w)
            size += _squared(w)
            task += _squared(t)
            if u_rk is not None and image is not None:
                image.addmm_(u_rk[part].T, t)
        precision = max(STORAGE_PRECISION.get(each, 0.0) for each in dtypes)
        return BlockSums(task, size, precision, image)

    def take(self, sums: BlockSums, *, column: int = 0) -> None:
        """Add the sums of a block that begins at this column; always in the same order."""
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


def _squared(block: Tensor) -> float:
    """The sum of squares: along rows in the block's dtype, over them in float64."""
    return float(torch.linalg.vector_norm(block, dim=1).to(torch.float64).square().sum())
