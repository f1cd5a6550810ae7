"""Spectra and singular vectors, all from one float64 eigendecomposition of the smaller side.

Here: the Gram matrix of the smaller side, its eigenvalues (squared singular values) in descending
order with the rounding tail set to zero, and the singular vectors on either side. Not here: how
many of them to keep (`entropy`) and what to do with them (`projector`).

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

from realign.errors import NonFiniteError

Side = Literal["both", "left", "right"]

EPS = torch.finfo(torch.float64).eps

GRAM_COLUMNS = 2048
"""Columns upcast at once while a Gram matrix is accumulated: bounds the float64 copy."""


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

    Attributes:
        matrix: the matrix M [d_out, d_in] as given.
        energies: [n] float64, sigma_i^2, descending.
        vectors: [n, n] float64, the singular vectors of the smaller side as columns.
    """

    matrix: Tensor
    energies: Tensor
    vectors: Tensor

    @property
    def smaller_is_left(self) -> bool:
        """Whether `vectors` are left singular vectors (d_out <= d_in)."""
        return self.matrix.shape[0] <= self.matrix.shape[1]

    def left(self, k: int) -> Tensor:
        """Return the first k left singular vectors [d_out, k]."""
        if self.smaller_is_left:
            return self.vectors[:, :k]
        return self._other_side(k)

    def right(self, k: int) -> Tensor:
        """Return the first k right singular vectors [d_in, k]."""
        if not self.smaller_is_left:
            return self.vectors[:, :k]
        return self._other_side(k)

    def triplets(self, k: int, *, side: Side = "both") -> Triplets:
        """Return the first k triples; the side not asked for has no columns."""
        d_out, d_in = self.matrix.shape
        new = self.vectors.new_empty
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
        known_nk = self.vectors[:, :k]
        matrix = _workable(self.matrix)
        if self.smaller_is_left:
            matrix = matrix.T
        image = matrix.to(torch.float64) @ known_nk
        basis, triangle = torch.linalg.qr(image)
        signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
        return basis * signs.to(basis)


def gram(m: Tensor) -> Tensor:
    """Return the smaller of M M^T and M^T M, [n, n] float64, exactly symmetric.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    long_by_columns = _workable(m) if m.shape[0] <= m.shape[1] else _workable(m).T
    n, length = long_by_columns.shape
    out_nn = torch.zeros(n, n, dtype=torch.float64, device=long_by_columns.device)
    for start in range(0, length, GRAM_COLUMNS):
        block = long_by_columns[:, start : start + GRAM_COLUMNS].to(torch.float64)
        out_nn.addmm_(block, block.T)
    return _symmetrised(out_nn)


def spectrum(m: Tensor) -> Spectrum:
    """Return the squared singular values of M [d_out, d_in], without any vectors.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    return symmetric_spectrum(gram(m))


def decompose(m: Tensor) -> Decomposition:
    """Decompose M [d_out, d_in] once; the triples are taken from the result.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    energies, vectors = symmetric_eigenpairs(gram(m))
    return Decomposition(matrix=m, energies=energies, vectors=vectors)


def top_triplets(m: Tensor, k: int | None = None, *, side: Side = "both") -> Triplets:
    """Return the leading k singular triples of M [d_out, d_in], all min(d_out, d_in) by default.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
    """
    n = min(m.shape)
    return decompose(m).triplets(n if k is None else min(k, n), side=side)


def symmetric_spectrum(c: Tensor) -> Spectrum:
    """Return the eigenvalues of a positive semi-definite C [n, n], as energies."""
    return Spectrum(_clean(torch.linalg.eigvalsh(_symmetrised(_workable(c))).flip(0)))


def symmetric_eigenpairs(c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues [n] (descending, cleaned) and eigenvectors [n, n] of a PSD matrix."""
    values, vectors = torch.linalg.eigh(_symmetrised(_workable(c)))
    return _clean(values.flip(0)), vectors.flip(1)


def top_eigenvectors(c: Tensor, r: int) -> Tensor:
    """Return the eigenvectors [n, r] of the r largest eigenvalues of a PSD matrix C [n, n]."""
    return symmetric_eigenpairs(c)[1][:, :r]


def numerical_rank(energies: Tensor) -> int:
    """Return how many energies are above the rounding tail; directions below it are arbitrary."""
    return int(torch.count_nonzero(energies))


def _workable(m: Tensor) -> Tensor:
    """Move to a device that knows float64; Apple's does not."""
    m = m.detach()
    return m.cpu() if m.device.type == "mps" else m


def _symmetrised(c: Tensor) -> Tensor:
    c = c.to(torch.float64)
    if not bool(torch.isfinite(c).all()):
        raise NonFiniteError(
            "a matrix to be decomposed holds NaN or infinity",
            "one of the checkpoints is damaged: check the tensor named above",
        )
    return (c + c.T).mul_(0.5)


def _clean(descending: Tensor) -> Tensor:
    """Set to 0 what is negative or below lambda_1 n eps: rounding, not signal."""
    if descending.numel() == 0:
        return descending
    floor = descending[0].clamp(min=0.0) * (descending.numel() * EPS)
    return torch.where(descending > floor, descending, torch.zeros_like(descending))
