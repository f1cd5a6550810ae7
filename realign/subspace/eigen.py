"""Eigenvalues of a positive semi-definite matrix, and as many eigenvectors as are asked for.

Ranks are chosen from all eigenvalues, but few of the vectors are kept. On the CPU a matrix is
therefore reduced to tridiagonal form once; the eigenvalues follow at once, and the leading vectors
when their number is known. Against a full `eigh` that takes a third of the time and half of the
memory: the matrix itself holds the reduction, and nothing else of its size is needed.

Here: both routes, on the CPU and on an accelerator, in float64. Not here: where the matrix comes
from (`spectrum`), and how many vectors are wanted (`entropy`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from realign.errors import CheckpointError, NonFiniteError
from realign.subspace.lapack import (
    apply_reflectors,
    tridiagonal_values,
    tridiagonalise,
)
from realign.subspace.tridiagonal import tridiagonal_vectors, trusted_vectors

EPS = torch.finfo(torch.float64).eps


class Eigenpairs(ABC):
    """The eigenvalues of a PSD matrix [n, n], and its leading eigenvectors on demand."""

    @property
    @abstractmethod
    def values(self) -> Tensor:
        """[n] float64, descending, the rounding tail exactly 0."""

    @abstractmethod
    def top(self, k: int) -> Tensor:
        """Return the eigenvectors of the k largest eigenvalues as columns [n, k], descending."""

    def leading(self, k: int) -> Tensor:
        """Return the k largest of `values`, or all; cheaper than these if `top` follows."""
        return self.values[:k]


class KnownEigenpairs(Eigenpairs):
    """All vectors are there already."""

    def __init__(self, values: Tensor, vectors: Tensor) -> None:
        self._values = values
        self._vectors = vectors

    @property
    def values(self) -> Tensor:
        """See `Eigenpairs.values`."""
        return self._values

    def top(self, k: int) -> Tensor:
        """See `Eigenpairs.top`."""
        return self._vectors[:, :k]


class _Reduced(Eigenpairs):
    """Reduced to T = Q^T C Q, tridiagonal; a vector of T costs O(n), its way back O(n^2)."""

    def __init__(self, c_nn: Tensor, *, all_values: bool = True) -> None:
        self._reflectors = c_nn
        self._diagonal, self._beside, self._factors = tridiagonalise(c_nn)
        self._values = self._all_values() if all_values else None
        self._rows_kn = c_nn.new_empty(0, c_nn.shape[0])

    @property
    def values(self) -> Tensor:
        """See `Eigenpairs.values`."""
        if self._values is None:
            self._values = self._all_values()
        return self._values

    def top(self, k: int) -> Tensor:
        """See `Eigenpairs.top`."""
        if k > self._rows_kn.shape[0]:
            self._rows_kn = self._rows_kn.new_empty(0, 0)  # freed before the larger one is made
            # The largest of C are the smallest of -C, which has the same vectors and reflectors.
            self._keep(tridiagonal_vectors(-self._diagonal, -self._beside, k))
        return self._rows_kn[:k].T

    def leading(self, k: int) -> Tensor:
        """See `Eigenpairs.leading`."""
        k = min(k, self._diagonal.numel())
        if self._values is None and k:
            found = trusted_vectors(-self._diagonal, -self._beside, k)
            # Vectors of rounding are no use to anyone: where there are some, none is kept.
            if found is not None and bool(_clean(-found[0], self._diagonal.numel())[-1]):
                self._keep(found[1])
                return -found[0]
        return self.values[:k]

    def _keep(self, rows_kn: Tensor) -> None:
        apply_reflectors(self._reflectors, self._factors, rows_kn)
        self._rows_kn = rows_kn

    def _all_values(self) -> Tensor:
        values = tridiagonal_values(self._diagonal, self._beside)
        return _clean(values.flip(0), values.numel())


class NotDefiniteError(RuntimeError):
    """A matrix that is not positive definite, and what helps."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@contextmanager
def decomposing(key: str) -> Generator[None]:
    """Name the tensor in whatever a decomposition inside cannot do.

    Args:
        key: of the slot, or of several.

    Raises:
        CheckpointError: the decomposition does not converge, or second moments are not definite.
        NonFiniteError: it was asked for a matrix that holds NaN or infinity.
    """
    try:
        yield
    except NotDefiniteError as error:
        raise CheckpointError(f"{key}: {error}", error.hint) from error
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise CheckpointError(
            f"{key}: its decomposition does not converge ({error})",
            "check the tensor in every checkpoint of the run",
        ) from error
    except NonFiniteError as error:
        raise NonFiniteError(f"{key}: {error.message}", error.hint) from error


def eigenpairs(c_nn: Tensor, *, overwrite: bool = False, all_values: bool = True) -> Eigenpairs:
    """Decompose a symmetric positive semi-definite matrix.

    Args:
        c_nn: [n, n]; on the CPU only its upper triangle (row <= column) is read.
        overwrite: give the memory of `c_nn` away, if it is float64 and contiguous.
        all_values: work out all eigenvalues at once, not only when they are asked for.

    Raises:
        NonFiniteError: it holds NaN or infinity.
        torch.linalg.LinAlgError: the decomposition does not converge.
    """
    if c_nn.device.type != "cpu":
        return eigenpairs_batch(c_nn[None])[0]
    return _Reduced(_own_copy(c_nn, overwrite=overwrite), all_values=all_values)


def eigenpairs_batch(c_bnn: Tensor) -> list[Eigenpairs]:
    """Decompose matrices [b, n, n] in one call of the device's own solver; see `eigenpairs`.

    Only the upper triangles are read.
    """
    require_finite(c_bnn)
    values_bn, vectors_bnn = torch.linalg.eigh(c_bnn.detach().to(torch.float64), UPLO="U")
    return [
        KnownEigenpairs(_clean(values.flip(0), values.numel()), vectors.flip(1))
        for values, vectors in zip(values_bn, vectors_bnn, strict=True)
    ]


def eigenvalues(c_nn: Tensor, *, overwrite: bool = False) -> Tensor:
    """Return the eigenvalues [n] alone: float64, descending, the rounding tail exactly 0.

    The arguments and errors are those of `eigenpairs`.
    """
    if c_nn.device.type == "cpu":
        return _Reduced(_own_copy(c_nn, overwrite=overwrite)).values
    require_finite(c_nn)
    values = torch.linalg.eigvalsh(c_nn.detach().to(torch.float64), UPLO="U")
    return _clean(values.flip(0), values.numel())


def _own_copy(c_nn: Tensor, *, overwrite: bool) -> Tensor:
    require_finite(c_nn)
    c_nn = c_nn.detach()
    work = c_nn.to(torch.float64).contiguous()
    shared = work.data_ptr() == c_nn.data_ptr() and work.numel() > 0
    return work.clone() if shared and not overwrite else work


def require_finite(c: Tensor) -> None:
    """Raise NonFiniteError where a matrix holds NaN or infinity, in either triangle."""
    # A sum is finite where all entries are: eigenvalues near the largest float64 do not occur.
    if not bool(torch.isfinite(c.detach().sum(dtype=torch.float64))):
        raise NonFiniteError(
            "a matrix to be decomposed holds NaN or infinity",
            "one of the checkpoints is damaged: check the tensor named above",
        )


def _clean(descending: Tensor, n: int) -> Tensor:
    """Set to 0 what is negative or below lambda_1 n eps: rounding, not signal."""
    if descending.numel() == 0:
        return descending
    floor = descending[0].clamp(min=0.0) * (n * EPS)
    return torch.where(descending > floor, descending, torch.zeros_like(descending))
