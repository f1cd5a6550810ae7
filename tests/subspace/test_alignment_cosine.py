"""The alignment filter against dense float64 matrices: cosine, factors, chance level, gains."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import error, matrix
from torch import Tensor

from realign.subspace.alignment_cosine import AlignmentFilter

SHAPES = [(9, 9), (6, 14), (14, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def dense_filter(v: Tensor) -> Tensor:
    return v @ v.T / v.norm()


def dense_cosine(v: Tensor, dw: Tensor) -> float:
    image = dense_filter(v) @ dw
    return float((image * dw).sum() / (image.norm() * dw.norm()))


def test_hand_example() -> None:
    v = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    own, update = AlignmentFilter(v), torch.eye(2, dtype=torch.float64)
    assert own.cosine(update) == pytest.approx(0.962964, abs=5e-7)
    projected = own.gain("paper") * own.push(update)
    assert torch.allclose(projected, torch.diag(torch.tensor([1.8, 3.2], dtype=torch.float64)))
    assert own.gain("unit") == pytest.approx(1 / 16)


@shapes
@pytest.mark.parametrize("wide", [False, True])
def test_whole_and_factored_forms_equal_the_dense_ones(shape: tuple[int, int], wide: bool) -> None:
    v = matrix(*shape, seed=1)
    up, down = matrix(shape[0], 3, seed=2), matrix(3, shape[1], seed=3)
    update = matrix(*shape, seed=4) if wide else up @ down
    own = AlignmentFilter(v)
    assert own.cosine(update) == pytest.approx(dense_cosine(v, update), rel=1e-12)
    assert error(own.gain("paper") * own.push(update), dense_filter(v) @ update) <= 1e-12
    if not wide:
        factored = own.factored_cosine(up, down)
        assert factored == pytest.approx(dense_cosine(v, update), rel=1e-12)
        assert error(own.push(up), v @ v.T @ up) <= 1e-12


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_is_enough(shape: tuple[int, int], dtype: torch.dtype) -> None:
    v = matrix(*shape, seed=1).to(dtype).float()  # a difference is float32 whatever the file is
    up, down = matrix(shape[0], 2, seed=2).to(dtype), matrix(2, shape[1], seed=3).to(dtype)
    update = (up.double() @ down.double()).float()
    expected = dense_cosine(v.double(), update.double())
    assert AlignmentFilter(v).cosine(update) == pytest.approx(expected, rel=1e-5)
    factored = AlignmentFilter(v).factored_cosine(up, down)
    assert factored == pytest.approx(expected, rel=1e-5)


@shapes
@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 1000))
def test_the_cosine_has_no_scale_and_stays_within_its_bounds(
    shape: tuple[int, int], a: float, b: float, seed: int
) -> None:
    v, update = matrix(*shape, seed=seed), matrix(*shape, seed=seed + 1)
    one = AlignmentFilter(v).cosine(update)
    assert one is not None
    assert 0.0 <= one <= 1.0
    assert AlignmentFilter(a * v).cosine(b * update) == pytest.approx(one, rel=1e-9)


@shapes
def test_the_chance_level_is_the_root_of_the_participation_ratio(shape: tuple[int, int]) -> None:
    v = matrix(*shape, seed=5)
    energies = torch.linalg.svdvals(v).square()
    ratio = float(energies.sum() ** 2 / energies.square().sum())
    expected = math.sqrt(ratio / shape[0])
    assert AlignmentFilter(v).chance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("d_out", "d_in"), [(200, 200), (160, 300), (300, 160)])
def test_an_unrelated_update_has_about_the_chance_level(d_out: int, d_in: int) -> None:
    """A Gaussian square V gives 0.71; every random update is within 0.02 of c0."""
    own = AlignmentFilter(matrix(d_out, d_in, seed=1))
    if d_out == d_in:
        assert own.chance == pytest.approx(0.71, abs=0.01)
    found = own.cosine(matrix(d_out, d_in, seed=2))
    assert found == pytest.approx(own.chance, abs=0.02)


def test_a_rank_8_vector_in_400_rows() -> None:
    own = AlignmentFilter(matrix(400, 8, seed=1) @ matrix(8, 300, seed=2))
    assert own.chance == pytest.approx(0.14, abs=0.01)
    assert own.cosine(matrix(400, 300, seed=3)) == pytest.approx(own.chance, abs=0.02)
    factored = own.factored_cosine(matrix(400, 16, seed=4), matrix(16, 300, seed=5))
    assert factored == pytest.approx(own.chance, abs=0.02)


@shapes
def test_the_unit_gain_is_at_most_one(shape: tuple[int, int]) -> None:
    v = matrix(*shape, seed=6, scale=7.0)
    own = AlignmentFilter(v)
    top = torch.linalg.svdvals(own.gain("unit") * (v @ v.T))[0]
    assert float(top) == pytest.approx(1.0, rel=1e-12)
    assert own.gain("unit") == pytest.approx(own.gain("paper") * own.norm / own.largest_energy)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_nothing_to_compare(shape: tuple[int, int]) -> None:
    v = torch.zeros(shape, dtype=torch.float64)
    v[0] = 1.0  # sees the first output alone
    own = AlignmentFilter(v)
    zero = torch.zeros(shape, dtype=torch.float64)
    assert own.cosine(zero) is None
    assert own.factored_cosine(zero[:, :2], zero[:2]) is None
    unseen = zero.clone()
    unseen[1] = 1.0
    assert own.cosine(unseen) == 0.0
    up = zero[:, :1].clone()
    up[1] = 1.0
    assert own.factored_cosine(up, torch.ones(1, shape[1], dtype=torch.float64)) == 0.0
