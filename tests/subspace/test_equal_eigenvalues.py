"""Matrices with many equal singular values: sparse changes by single units, projectors.

The routine that makes single vectors gives up on some of them. What it makes, or what takes its
place, is checked against the matrix itself: orthonormal, and turned into its own multiple.
"""

from __future__ import annotations

import pytest
import torch
from support.subspace_support import matrix
from torch import Tensor

from realign.errors import CheckpointError, NonFiniteError
from realign.model.moments import Moments
from realign.repair.methods.scatter import output_spectrum
from realign.subspace import lapack
from realign.subspace.eigen import decomposing
from realign.subspace.lapack import (
    all_vectors,
    apply_reflectors,
    leading_vectors,
    pivoted_cholesky,
    syrk_upper,
    tridiagonal_values,
    tridiagonalise,
)
from realign.subspace.spectrum import decompose, numerical_rank
from realign.subspace.tridiagonal import are_eigenvectors, tridiagonal_vectors


def single_units(n: int, share: float, *, seed: int) -> Tensor:
    """A change by one unit in the last place of a few entries, up or down."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.rand(n, n, generator=generator) < share
    return moved * torch.sign(torch.randn(n, n, generator=generator)) * 2**-10


def assert_eigenvectors(c: Tensor, top: Tensor, values: Tensor) -> None:
    eye = torch.eye(top.shape[1], dtype=torch.float64)
    assert float((top.T @ top - eye).abs().max()) <= 1e-11
    assert float((c @ top - top * values).abs().max()) <= 1e-11 * float(c.abs().max())


def split(diagonal: Tensor, beside: Tensor) -> Tensor:
    return diagonal.diag() + beside[:-1].diag(1) + beside[:-1].diag(-1)


@pytest.mark.parametrize(("n", "share", "count"), [(256, 0.0045, 40), (512, 0.002, 20)])
def test_sparse_changes_by_single_units(n: int, share: float, count: int) -> None:
    given_up = 0
    for seed in range(count):
        change = single_units(n, share, seed=seed)
        found = decompose(change)
        k = max(1, numerical_rank(found.energies) // 3)
        c = change.double() @ change.double().T
        assert_eigenvectors(c, found.left(k), found.energies[:k])
        diagonal, beside, _ = tridiagonalise(c.contiguous())
        given_up += leading_vectors(-diagonal, -beside, k) is None
    assert given_up < count  # the fast routine is still the one that usually does it


@pytest.mark.parametrize("n", [64, 257])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_projectors_and_their_sums(n: int, share: float) -> None:
    rank = int(n * share)
    q = torch.linalg.qr(matrix(n, n, seed=n)).Q
    blocks = torch.block_diag(*(torch.ones(4, 4) / 4 for _ in range(n // 4)))
    for exact in (
        torch.eye(n, dtype=torch.float64),
        torch.diag((torch.arange(n) < rank).double()),
        blocks.double(),
        q[:, :rank] @ q[:, :rank].T,
        q[:, :rank] @ q[:, :rank].T + q[:, : rank // 2] @ q[:, : rank // 2].T,
        torch.linalg.qr(matrix(n, n, seed=1)).Q,
    ):
        found = decompose(exact)
        k = min(rank, numerical_rank(found.energies))
        c = exact @ exact.T
        assert_eigenvectors(c, found.left(k), found.energies[:k])
        both = found.triplets(k)
        assert torch.allclose(both.v.T @ both.v, torch.eye(k, dtype=torch.float64), atol=1e-11)


@pytest.mark.parametrize("wide", [False, True])
def testall_vectors_by_either_routine(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:  # sizes that 32 bits do not hold, at a size that memory does
        monkeypatch.setattr(lapack, "INT_MAX", 4000)
    for change in (single_units(90, 0.01, seed=3), torch.eye(70), matrix(80, 80, seed=1)):
        c = change.double() @ change.double().T
        work = c.clone()
        diagonal, beside, factors = tridiagonalise(work)
        rows = all_vectors(diagonal, beside)
        assert are_eigenvectors(rows, tridiagonal_values(diagonal, beside), diagonal, beside)
        apply_reflectors(work, factors, rows)
        assert_eigenvectors(c, rows.T, torch.linalg.eigvalsh(c))


def test_vectors_that_are_none_are_seen() -> None:
    c = matrix(60, 60, seed=4)
    diagonal, beside, _ = tridiagonalise(c @ c.T)
    values = tridiagonal_values(diagonal, beside)[:40]
    rows = tridiagonal_vectors(diagonal, beside, 40)
    assert are_eigenvectors(rows, values, diagonal, beside)
    t = split(diagonal, beside)
    assert torch.allclose(t @ rows.T, rows.T * values, atol=1e-11 * float(t.abs().max()))

    def spoilt(number: int, by: Tensor) -> Tensor:
        worse = rows.clone()
        worse[number] = by
        return worse

    for worse in (
        spoilt(3, rows[4]),
        spoilt(3, rows[3] * (1 + 1e-8)),
        spoilt(3, rows[3] + 1e-8 * rows[30]),
        spoilt(3, torch.full_like(rows[3], float("nan"))),
        spoilt(3, torch.zeros_like(rows[3])),
        rows.flip(0),  # orthonormal, but of other values
    ):
        assert not are_eigenvectors(worse.contiguous(), values, diagonal, beside)


@pytest.mark.parametrize("place", [(2, 2), (0, 3), (3, 0), None])
def test_a_factor_of_what_is_not_finite_is_refused(place: tuple[int, int] | None) -> None:
    c = torch.eye(6, dtype=torch.float64)
    if place is None:
        c.fill_(float("nan"))
    else:
        c[place] = float("inf") if place == (2, 2) else float("nan")
    moments = Moments(kind="input", n=9, s1=torch.zeros(6, dtype=torch.float64), s2=c)
    with pytest.raises(NonFiniteError):
        output_spectrum(moments, torch.ones(8, 6), "none")


def test_the_tensor_is_named() -> None:
    huge = torch.full((4, 4), 1e200, dtype=torch.float64)
    name = "here.weight"
    with pytest.raises(NonFiniteError, match=rf"^{name}: a matrix to be"), decomposing(name):
        decompose(huge)
    with pytest.raises(CheckpointError, match=rf"^{name}: .* not converge"), decomposing(name):
        torch.linalg.cholesky(-torch.eye(3))


def test_what_would_write_over_other_memory_is_an_error() -> None:
    """With plain exceptions, which `python -O` keeps."""
    c, ten = torch.eye(5, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    single, strided = c.float(), torch.eye(10, dtype=torch.float64)[::2, ::2]
    for wrong in (
        lambda: syrk_upper(c, torch.zeros(4, 3, dtype=torch.float64), by_rows=False),
        lambda: syrk_upper(c, torch.zeros(5, 3), by_rows=False),
        lambda: syrk_upper(strided, c, by_rows=False),
        lambda: tridiagonalise(single),
        lambda: tridiagonalise(strided),
        lambda: tridiagonalise(c[:, :4].contiguous()),
        lambda: tridiagonal_values(ten, ten[:9]),
        lambda: tridiagonal_values(ten.float(), ten.float()),
        lambda: tridiagonal_vectors(ten, ten[:9], 3),
        lambda: tridiagonal_vectors(ten, ten, 11),
        lambda: tridiagonal_vectors(ten, ten, 0),
        lambda: apply_reflectors(c, ten, c.clone()),
        lambda: apply_reflectors(c, ten[:5], torch.zeros(2, 4, dtype=torch.float64)),
        lambda: apply_reflectors(c, ten[:5], torch.zeros(5, 2, dtype=torch.float64).T),
        lambda: pivoted_cholesky(c[:0, :0]),
        lambda: pivoted_cholesky(c[:3].clone()),
        lambda: pivoted_cholesky(c.to("meta")),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_sizes_beyond_32_bits_are_an_error() -> None:
    with pytest.raises(OverflowError):
        lapack.pointer(2**31)
    with pytest.raises(OverflowError):
        lapack.pointer(-(2**31) - 1)
