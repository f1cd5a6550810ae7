"""Spectra and singular vectors, all from one float64 eigendecomposition of the smaller side.

Here: the Gram matrix of the smaller side, its eigenvalues (squared singular values) in descending
order with the rounding tail set to zero, and the singular vectors on either side. Not here: how an
eigenproblem is solved (`eigen`), how many vectors to keep (`entropy`), what to do with them
(`projector`).

Why the Gram: on the smaller side in float64 it gives the same ranks as a float64 SVD at a fraction
of its time. What is lost, singular values below about 1e-7 of the largest, is set to zero rather
than trusted. The large Gram and the d x d projectors are never formed.

Shape suffixes: o is d_out, i is d_in, n the smaller of the two, k the number of kept triples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from realign.subspace.eigen import Eigenpairs, eigenpairs, eigenpairs_batch, eigenvalues
from realign.subspace.lapack import syrk_upper

Side = Literal["both", "left", "right"]

GRAM_ROWS = 512
"""Rows or columns upcast at once while a Gram matrix is accumulated: bounds the float64 copy."""
GRAM_ENTRIES = 2**21
"""Up to so many entries, twice the rows: each time the whole Gram matrix is read and written."""


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The energies of a matrix.

    Attributes:
        energies: [n] float64, sigma_i^2 in descending order, the rounding tail exactly 0.
    """

    energies: Tensor

    @property
    def singular_values(self) -> Tensor:
        """sigma_i [n], float64, descending."""
        return self.energies.sqrt()


@dataclass(frozen=True, eq=False)
class Triplets:
    """The leading singular triples of a matrix: M is close to u diag(s) v^T.

    Attributes:
        u: [d_out, k] float64, orthonormal columns; [d_out, 0] if only the right side was asked for.
        s: [k] float64, descending.
        v: [d_in, k] float64, orthonormal columns; [d_in, 0] if only the left side was asked for.
    """

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One eigendecomposition of a matrix, from which any number of triples can be taken.

    The vectors are worked out when they are asked for: ask for the largest number first.

    Attributes:
        matrix: the matrix M [d_out, d_in] as given.
        pairs: of the Gram matrix of the smaller side.
    """

    matrix: Tensor
    pairs: Eigenpairs

    @property
    def energies(self) -> Tensor:
        """sigma_i^2 [n], float64, descending."""
        return self.pairs.values

    def leading(self, k: int) -> Tensor:
        """The k largest energies, or all; cheaper than these if vectors of them follow."""
        return self.pairs.leading(k)

    @property
    def smaller_is_left(self) -> bool:
        """Whether the vectors of the smaller side are the left ones (d_out <= d_in)."""
        return self.matrix.shape[0] <= self.matrix.shape[1]

    def left(self, k: int) -> Tensor:
        """Return the first k left singular vectors [d_out, k]."""
        if self.smaller_is_left:
            return self.pairs.top(k)
        return self._other_side(k)

    def right(self, k: int) -> Tensor:
        """Return the first k right singular vectors [d_in, k]."""
        if not self.smaller_is_left:
            return self.pairs.top(k)
        return self._other_side(k)

    def triplets(self, k: int, *, side: Side = "both") -> Triplets:
        """Return the first k triples; the side not asked for has no columns."""
        d_out, d_in = self.matrix.shape
        new = self.energies.new_empty
        return Triplets(
            u=self.left(k) if side != "right" else new(d_out, 0),
            s=self.energies[:k].sqrt(),
            v=self.right(k) if side != "left" else new(d_in, 0),
        )

    def _other_side(self, k: int) -> Tensor:
        """M^T u_i / sigma_i or M v_i / sigma_i, made orthonormal by one QR.

        The QR takes the columns in order of their energy, so that a weak direction loses what
        rounding leaked into it from a strong one. It also completes the basis where sigma_i is 0.
        """
        known_nk = self.pairs.top(k)
        matrix = _workable(self.matrix)
        if self.smaller_is_left:
            matrix = matrix.T
        image = known_nk.new_empty(matrix.shape[0], k)
        for start in range(0, matrix.shape[0], GRAM_ROWS):
            rows = slice(start, start + GRAM_ROWS)
            torch.matmul(matrix[rows].to(torch.float64), known_nk, out=image[rows])
        basis, triangle = torch.linalg.qr(image)
        signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
        return basis * signs.to(basis)


def gram(m: Tensor) -> Tensor:
    """Return the smaller of M M^T and M^T M, [n, n] float64, exactly symmetric.

    An entry that is not finite makes entries of the result so.
    """
    upper = _upper_gram(m).triu_()
    return upper + upper.triu(1).T


def spectrum(m: Tensor) -> Spectrum:
    """Return the squared singular values of M [d_out, d_in], without any vectors.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    return Spectrum(eigenvalues(_upper_gram(m), overwrite=True))


def decompose(m: Tensor, *, all_energies: bool = True) -> Decomposition:
    """Decompose M [d_out, d_in] once; the triples are taken from the result.

    Args:
        m: the matrix.
        all_energies: False where the leading ones may be enough.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    pairs = eigenpairs(_upper_gram(m), overwrite=True, all_values=all_energies)
    return Decomposition(matrix=m, pairs=pairs)


def gram_batch(matrices: Tensor) -> Tensor:
    """Return the smaller Gram matrices [b, n, n], float64, of matrices [b, d_out, d_in]."""
    short_bnl = matrices.detach()
    if short_bnl.shape[1] > short_bnl.shape[2]:
        short_bnl = short_bnl.mT
    b, n, length = short_bnl.shape
    out_bnn = torch.zeros(b, n, n, dtype=torch.float64, device=matrices.device)
    for start in range(0, length, GRAM_ROWS):
        block = short_bnl[:, :, start : start + GRAM_ROWS].to(torch.float64)
        out_bnn.baddbmm_(block, block.mT)
    return out_bnn


def decompose_batch(matrices: Tensor) -> list[Decomposition]:
    """Decompose matrices of one shape [b, d_out, d_in], on an accelerator all in one call.

    Raises:
        NonFiniteError: one of them holds NaN or infinity.
    """
    if matrices.device.type in ("cpu", "mps"):
        return [decompose(m) for m in matrices]
    pairs = eigenpairs_batch(gram_batch(matrices))
    return [Decomposition(m, each) for m, each in zip(matrices, pairs, strict=True)]


def top_triplets(m: Tensor, k: int | None = None, *, side: Side = "both") -> Triplets:
    """Return the leading k singular triples of M [d_out, d_in], all min(d_out, d_in) by default.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    n = min(m.shape)
    return decompose(m).triplets(n if k is None else min(k, n), side=side)


def symmetric_spectrum(c: Tensor) -> Spectrum:
    """Return the eigenvalues of a positive semi-definite C [n, n], as energies.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    return Spectrum(eigenvalues(_workable(c)))


def numerical_rank(energies: Tensor) -> int:
    """Return how many energies are above the rounding tail; directions below it are arbitrary."""
    return int(torch.count_nonzero(energies))


def _upper_gram(m: Tensor) -> Tensor:
    """The Gram matrix of the smaller side [n, n], float64; below the diagonal is anything.

    Only one triangle is computed on the CPU, in blocks of rows or columns, whichever lie together.
    """
    m = _workable(m)
    if m.device.type != "cpu":
        return gram_batch(m[None])[0]
    short_nl = m if m.shape[0] <= m.shape[1] else m.T
    n, length = short_nl.shape
    out_nn = torch.zeros(n, n, dtype=torch.float64)
    by_rows = short_nl.stride(0) < short_nl.stride(1)
    step = max(GRAM_ROWS, min(2 * GRAM_ROWS, GRAM_ENTRIES // max(1, n)))
    for start in range(0, length, step):
        block = short_nl[:, start : start + step]
        block = (block.T if by_rows else block).to(torch.float64).contiguous()
        syrk_upper(out_nn, block, by_rows=by_rows)
    return out_nn


def _workable(m: Tensor) -> Tensor:
    """Move to a device that knows float64; Apple's does not."""
    m = m.detach()
    return m.cpu() if m.device.type == "mps" else m
