from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import matrix

from realign.subspace.projector import (
    basis_overlap,
    degenerate_cut,
    direction_weights,
    energy_share,
    isolation,
    project,
)


def sigmas(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_weights_fall_linearly_from_alpha1_to_one() -> None:
    assert direction_weights(sigmas(3, 2, 1), 2.0).tolist() == [2.0, 1.5, 1.0]
    assert direction_weights(sigmas(3, 2), 2.0).tolist() == [2.0, 1.0]
    assert direction_weights(sigmas(3, 2, 1), 1.0).tolist() == [1.0, 1.0, 1.0]


def test_weights_where_the_formula_is_zero_over_zero() -> None:
    assert direction_weights(sigmas(3), 2.5).tolist() == [2.5]
    assert direction_weights(sigmas(2, 2 - 1e-7, 2 - 1e-6), 2.5).tolist() == [1.0, 1.0, 1.0]
    assert direction_weights(sigmas(2, 2 - 1e-5), 2.5).tolist() == [2.5, 1.0]
    assert direction_weights(sigmas(), 2.5).tolist() == []


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 1000))
def test_projection_never_needs_the_projector(r: int, d_in: int, seed: int) -> None:
    u, _ = torch.linalg.qr(matrix(6, r, seed=seed))
    m = matrix(6, d_in, seed=seed + 1)
    p = u @ u.T
    assert torch.allclose(project(u, m), p @ m, atol=1e-12)
    assert torch.allclose(project(u, project(u, m)), project(u, m), atol=1e-12)
    assert energy_share(u, m) == pytest.approx(float((p @ m).norm() / m.norm()) ** 2, abs=1e-12)


def test_projection_keeps_the_dtype_of_the_matrix() -> None:
    u = torch.eye(3, dtype=torch.float64)[:, :1]
    assert project(u, torch.ones(3, 2)).dtype == torch.float32
    assert energy_share(u, torch.zeros(3, 2)) is None


@pytest.mark.parametrize(
    ("energies", "r", "expected"),
    [
        ((4.0, 2.0, 2.0 - 1e-6, 1.0), 2, True),
        ((4.0, 2.0, 2.0 - 1e-5, 1.0), 2, False),
        ((4.0, 2.0, 2.0, 1.0), 1, False),
        ((4.0, 4.0), 2, False),  # everything is kept: no cut
        ((4.0, 0.0, 0.0), 2, False),  # nothing is lost
        ((4.0, 4.0), 0, False),
    ],
)
def test_degenerate_cut(energies: tuple[float, ...], r: int, expected: bool) -> None:
    assert degenerate_cut(sigmas(*energies), r) is expected


def test_overlap_of_two_bases_by_hand() -> None:
    e = torch.eye(3, dtype=torch.float64)
    turned = torch.stack([e[0], math.cos(math.pi / 6) * e[1] + 0.5 * e[2]], dim=1)
    found = basis_overlap(e[:, :2], turned)
    assert found.cosines == pytest.approx((1.0, 0.866025), abs=1e-6)
    assert found.overlap == pytest.approx(0.875)
    assert found.chance == pytest.approx(0.666667, abs=1e-6)
    blurred = basis_overlap(e[:, :2], turned, degenerate=True)
    assert blurred.cosines is None
    assert blurred.overlap == found.overlap


def test_overlap_does_not_depend_on_the_basis_of_the_space() -> None:
    u, _ = torch.linalg.qr(matrix(9, 4, seed=1))
    w, _ = torch.linalg.qr(matrix(9, 4, seed=2))
    turn, _ = torch.linalg.qr(matrix(4, 4, seed=3))
    assert basis_overlap(u, w).overlap == pytest.approx(basis_overlap(u @ turn, w).overlap)
    assert basis_overlap(u, u @ turn).overlap == pytest.approx(1.0)


def test_cosines_never_exceed_one() -> None:
    for seed in range(20):
        u, _ = torch.linalg.qr(matrix(9, 4, seed=seed))
        cosines = basis_overlap(u, u).cosines
        assert cosines is not None
        assert max(cosines) <= 1.0


def test_isolation_by_hand() -> None:
    u = torch.eye(3, dtype=torch.float64)[:, :2]
    found = isolation(u, torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]], dtype=torch.float64))
    assert found.share == pytest.approx(0.1)
    assert found.excess == pytest.approx(0.15)
    assert isolation(u, torch.zeros(3, 2)).excess is None


def test_isolation_of_a_random_delta_is_at_chance() -> None:
    u, _ = torch.linalg.qr(matrix(50, 10, seed=4))
    found = isolation(u, matrix(50, 4000, seed=5))
    assert found.excess == pytest.approx(1.0, abs=0.03)
