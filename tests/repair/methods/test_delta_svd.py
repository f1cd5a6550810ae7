from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import (
    dense_svd_edit,
    edit_of,
    error,
    full,
    layer_of,
    matrix,
    with_safety,
)
from torch import Tensor

from realign.repair.edit import Dense, LowRank, Unchanged
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.preparation import NO_STATISTICS

SHAPES = [(9, 9), (6, 14), (14, 6)]


def method(**settings: object) -> DeltaSvd:
    return DeltaSvd(**{**DeltaSvd(safety_vector="base").settings(), **settings})


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def test_hand_example() -> None:
    found = edit_of(method(rank=2, alpha=0.5), with_safety(diagonal(3, 2, 1)))
    assert torch.allclose(found, diagonal(1.5, 1, 0), atol=1e-12)


def test_weights_act_squared() -> None:
    found = edit_of(method(rank=3, alpha1=2.0), with_safety(diagonal(3, 2, 1)))
    assert torch.allclose(found, diagonal(3 * 4, 2 * 2.25, 1), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
@pytest.mark.parametrize("kind", ["base", "unaligned"])
def test_equals_the_truncated_svd(
    shape: tuple[int, int], dtype: torch.dtype, bound: float, kind: str
) -> None:
    layer = layer_of(shape, seed=1, dtype=dtype)
    other = layer.base if kind == "base" else layer.unaligned
    assert layer.aligned is not None
    assert other is not None
    delta = layer.aligned.double() - other.double()
    for k in (1, 3, 6):
        found = edit_of(method(rank=k, safety_vector=kind), layer)
        assert error(found, dense_svd_edit(delta, k)) <= bound


@pytest.mark.parametrize("shape", SHAPES)
def test_weighted_form_equals_the_dense_one(shape: tuple[int, int]) -> None:
    layer = layer_of(shape, seed=2)
    delta = layer.safety_vector("base")
    s = torch.linalg.svdvals(delta)[:4]
    weights = [float(1 + 1.5 * (x - s[3]) / (s[0] - s[3])) ** 2 for x in s]
    found = edit_of(method(rank=4, alpha1=2.5, alpha=0.3), layer)
    assert error(found, 0.3 * dense_svd_edit(delta, 4, weights)) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5))
def test_no_random_matrix_of_the_same_rank_is_closer(seed: int, k: int) -> None:
    layer = layer_of((6, 8), seed=seed)
    delta = layer.safety_vector("base")
    distance = (delta - edit_of(method(rank=k), layer)).norm()
    basis, _ = torch.linalg.qr(matrix(6, k, seed=seed + 9))
    assert (delta - basis @ (basis.T @ delta)).norm() >= distance  # the best on a random space


@pytest.mark.parametrize("rule", ["entropy", "energy"])
@pytest.mark.parametrize(("eta", "energy_rank"), [(0.6, 1), (0.85, 2), (0.95, 3), (1.0, 3)])
def test_rank_rules(rule: str, eta: float, energy_rank: int) -> None:
    edit = method(rank=rule, eta=eta).edit(with_safety(diagonal(3, 2, 1, 0)), NO_STATISTICS)
    assert isinstance(edit, LowRank | Dense)
    rank = edit.facts["rank"]
    assert isinstance(rank, int)
    assert rank == energy_rank if rule == "energy" else rank >= energy_rank


def test_fixed_rank_is_capped_by_the_shape_and_the_numerical_rank() -> None:
    low = matrix(12, 2, seed=3) @ matrix(2, 20, seed=4)
    edit = method(rank=8).edit(with_safety(low), NO_STATISTICS)
    assert isinstance(edit, LowRank)
    assert edit.rank == edit.facts["rank"] == edit.facts["available_rank"] == 2
    assert error(full(edit), low) <= 1e-10
    assert (
        error(edit_of(method(rank=100), layer_of((3, 9))), layer_of((3, 9)).safety_vector("base"))
        < 1e-10
    )


def test_edges() -> None:
    zero = with_safety(torch.zeros(3, 4).double())
    assert method().edit(zero, NO_STATISTICS) == Unchanged("safety vector is zero")
    assert method(alpha=0.0).edit(layer_of((4, 4)), NO_STATISTICS) == Unchanged("alpha is 0")
    one = edit_of(method(rank=1, alpha1=3.0), with_safety(diagonal(3, 2, 1)))
    assert torch.allclose(one, diagonal(27, 0, 0), atol=1e-12)
    flat = edit_of(method(rank=3, alpha1=3.0), with_safety(diagonal(2, 2, 2)))
    assert torch.allclose(flat, diagonal(2, 2, 2), atol=1e-12)


def test_low_rank_while_it_is_smaller_then_dense() -> None:
    layer = with_safety(matrix(20, 20, seed=5))
    assert isinstance(method(rank=9).edit(layer, NO_STATISTICS), LowRank)
    assert isinstance(method(rank=10).edit(layer, NO_STATISTICS), Dense)


def test_facts_of_the_report() -> None:
    layer = layer_of((7, 5), seed=6)
    edit = method(rank=2).edit(layer, NO_STATISTICS)
    assert isinstance(edit, LowRank | Dense)
    delta, task = layer.safety_vector("base"), layer.task_vector()
    u = torch.linalg.svd(delta).U[:, :2]
    kept = float((u.T @ delta).norm() / delta.norm())
    assert edit.facts["projected_safety"] == pytest.approx(kept)
    assert edit.facts["kept_energy"] == pytest.approx(kept**2)
    assert edit.facts["projected_task"] == pytest.approx(float((u.T @ task).norm() / task.norm()))
    assert edit.facts["stable_rank"] == pytest.approx(
        float((delta.norm() / torch.linalg.matrix_norm(delta, 2)) ** 2)
    )


def test_projected_safety_counts_the_weights() -> None:
    layer = with_safety(diagonal(3, 2, 1))
    edit = method(rank=3, alpha1=2.0, alpha=0.5).edit(layer, NO_STATISTICS)
    assert isinstance(edit, LowRank | Dense)
    expected = (12**2 + 4.5**2 + 1) ** 0.5 / 14**0.5
    assert edit.facts["projected_safety"] == pytest.approx(expected)


def test_degenerate_cut_is_recorded() -> None:
    edit = method(rank=2).edit(with_safety(diagonal(3, 2, 2, 1, 1, 1)), NO_STATISTICS)
    assert isinstance(edit, LowRank)
    assert edit.facts["degenerate_cut"] is True
