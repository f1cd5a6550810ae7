from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import matrix
from torch import Tensor

from realign.errors import NonFiniteError
from realign.subspace.eigen import eigenpairs, eigenvalues
from realign.subspace.lapack import apply_reflectors, pivoted_cholesky, tridiagonalise

SPECTRA = {
    "falling": torch.arange(1, 61, dtype=torch.float64) ** -1.0,
    "steep": torch.exp(-torch.arange(60, dtype=torch.float64)),
    "flat": torch.ones(60, dtype=torch.float64),
    "two clusters": torch.tensor([5.0] * 20 + [1.0] * 40, dtype=torch.float64),
    "low rank": torch.tensor([3.0, 2.0, 1.0] + [0.0] * 57, dtype=torch.float64),
    "tiny": 1e-30 * torch.arange(60, 0, -1, dtype=torch.float64),
    "zero": torch.zeros(60, dtype=torch.float64),
}


def with_spectrum(values: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    n = values.numel()
    q, _ = torch.linalg.qr(matrix(n, n, seed=seed))
    c = (q * values) @ q.T
    return (c + c.T) / 2, q


@pytest.mark.parametrize("name", SPECTRA)
def test_values_and_vectors_are_those_of_numpy(name: str) -> None:
    c, _ = with_spectrum(SPECTRA[name], seed=1)
    pairs = eigenpairs(c)
    expected = np.linalg.eigvalsh(c.numpy())[::-1]
    scale = float(SPECTRA[name][0])
    assert pairs.values.tolist() == pytest.approx(expected.tolist(), abs=1e-13 * scale, rel=1e-9)
    assert torch.equal(pairs.values, eigenvalues(c))
    assert bool((pairs.values[:-1] >= pairs.values[1:]).all())
    for k in (1, 3, 20, 60):
        top = pairs.top(k)
        assert top.shape == (60, k)
        assert torch.allclose(top.T @ top, torch.eye(k, dtype=torch.float64), atol=1e-12)
        residual = c @ top - top * pairs.values[:k]
        assert float(residual.abs().max()) <= 1e-13 * scale


@pytest.mark.parametrize("name, k", [("falling", 7), ("two clusters", 20), ("low rank", 3)])
def test_the_leading_space_is_the_known_one(name: str, k: int) -> None:
    c, q = with_spectrum(SPECTRA[name], seed=2)
    top = eigenpairs(c).top(k)
    assert torch.allclose(top @ top.T, q[:, :k] @ q[:, :k].T, atol=1e-11)


def test_fewer_vectors_are_the_first_ones_and_more_come_later() -> None:
    c, q = with_spectrum(SPECTRA["falling"], seed=3)
    pairs = eigenpairs(c)
    ten = pairs.top(10).clone()
    assert torch.equal(pairs.top(4), ten[:, :4])
    thirty = pairs.top(30)
    assert torch.allclose(thirty @ thirty.T, q[:, :30] @ q[:, :30].T, atol=1e-11)
    assert torch.allclose((thirty[:, :10] * ten).sum(0).abs(), torch.ones(10).double(), atol=1e-12)


def test_only_the_upper_triangle_is_read_and_the_input_survives_unless_given_away() -> None:
    c, _ = with_spectrum(SPECTRA["falling"], seed=4)
    half = c.triu()
    before = half.clone()
    assert eigenvalues(half).tolist() == pytest.approx(SPECTRA["falling"].tolist(), rel=1e-12)
    assert torch.equal(half, before)
    pairs = eigenpairs(half.clone(), overwrite=True)
    assert pairs.values.tolist() == pytest.approx(SPECTRA["falling"].tolist(), rel=1e-12)
    single = c.to(torch.float32)
    eigenpairs(single, overwrite=True)
    assert torch.equal(single, c.to(torch.float32))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 3, 4, 20, 60, 70])
def test_leading_values_need_not_all_of_them(name: str, k: int) -> None:
    c, _ = with_spectrum(SPECTRA[name], seed=5)
    pairs, lazy = eigenpairs(c), eigenpairs(c, all_values=False)
    scale = float(SPECTRA[name][0])
    found = lazy.leading(k)
    assert found.tolist() == pytest.approx(pairs.leading(k).tolist(), abs=1e-14 * scale, rel=1e-9)
    assert found.numel() == min(k, 60)
    assert torch.count_nonzero(found) == torch.count_nonzero(pairs.values[:k])
    q = min(k, int(torch.count_nonzero(pairs.values)))
    top = lazy.top(q)
    assert torch.allclose(top.T @ top, torch.eye(q, dtype=torch.float64), atol=1e-12)
    assert float((c @ top - top * found[:q]).abs().max() if q else 0) <= 1e-13 * scale
    assert torch.equal(lazy.values, pairs.values)


def test_leading_values_of_few_directions_cost_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    c, _ = with_spectrum(SPECTRA["falling"], seed=6)
    lazy = eigenpairs(c, all_values=False)
    monkeypatch.setattr("realign.subspace.eigen.tridiagonal_values", None)
    assert lazy.leading(5).tolist() == pytest.approx(SPECTRA["falling"][:5].tolist(), rel=1e-12)
    with pytest.raises(TypeError):
        _ = lazy.values


@pytest.mark.parametrize("n", [1, 2, 65, 66, 130])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_reflectors_make_the_orthogonal_factor(n: int, k: int) -> None:
    c = matrix(n, n, seed=n)
    c = c @ c.T
    c[: n // 2, n // 2 :] = 0  # with reflectors that are none
    c[n // 2 :, : n // 2] = 0
    work = c.clone()
    diagonal, beside, factors = tridiagonalise(work)
    q = torch.eye(n, dtype=torch.float64)
    apply_reflectors(work, factors, q)  # the rows are Q e_i
    t = diagonal.diag() + beside[:-1].diag(1) + beside[:-1].diag(-1)
    assert torch.allclose(q.T @ t @ q, c, atol=1e-12 * n * float(c.abs().max()))
    rows = matrix(k, n, seed=1)
    expected = rows @ q
    apply_reflectors(work, factors, rows)
    assert torch.allclose(rows, expected, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_small_sizes(n: int) -> None:
    c = torch.diag(torch.arange(n, 0, -1, dtype=torch.float64))
    pairs = eigenpairs(c)
    assert pairs.values.tolist() == pytest.approx(list(range(n, 0, -1)))
    assert torch.allclose(pairs.top(n).abs(), torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_refused(bad: float) -> None:
    c = torch.eye(5)
    c[1, 3] = bad
    for work in (eigenpairs, eigenvalues):
        with pytest.raises(NonFiniteError):
            work(c)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 24), rank=st.integers(1, 24), seed=st.integers(0, 10**6))
def test_a_decomposition_multiplies_out_to_its_matrix(n: int, rank: int, seed: int) -> None:
    factor = matrix(n, rank, seed=seed)
    c = factor @ factor.T
    pairs = eigenpairs(c)
    whole = pairs.top(n)
    assert torch.allclose((whole * pairs.values) @ whole.T, c, atol=1e-11 * float(c.abs().max()))
    assert int(torch.count_nonzero(pairs.values)) <= min(n, rank)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 24), rank=st.integers(0, 24), seed=st.integers(0, 10**6))
def test_a_pivoted_factor_multiplies_out_to_its_matrix(n: int, rank: int, seed: int) -> None:
    factor = matrix(n, rank, seed=seed)
    c = factor @ factor.T
    work, pivots, q = pivoted_cholesky(c.clone())
    upper = work[:q].triu()
    assert q <= min(n, rank)
    assert sorted(pivots.tolist()) == list(range(n))
    top = float(c.abs().max())
    assert torch.allclose(upper.T @ upper, c[pivots][:, pivots], atol=1e-11 * max(top, 1e-300))
