"""`replace`: hand examples, the identities it stands on, its numerics and its edges."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import (
    dense_replace,
    edit_of,
    error,
    full,
    layer_of,
    matrix,
    repaired,
    with_safety,
)
from torch import Tensor

from realign.errors import UsageError
from realign.repair.edit import Dense, Layer, LowRank, Unchanged
from realign.repair.methods.replace import Replace
from realign.repair.preparation import NO_STATISTICS

SHAPES = [(8, 8), (6, 13), (13, 6)]
SIDES = ["both", "left", "right"]
Rows = list[list[float]]


def tensor(rows: Rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


AXES = with_safety(tensor([[0, 2], [1, 0]]), tensor([[1, 2], [3, 4]]))
OBLIQUE = with_safety(tensor([[-0.8, 1.8, 2.4], [0.6, 2.4, 3.2]]), tensor([[25, 0, 0], [0, 0, 25]]))


@pytest.mark.parametrize(
    ("side", "expected"),
    [("left", [[1, 2], [0, 0]]), ("right", [[0, 2], [0, 4]]), ("both", [[1, 2], [0, 4]])],
)
def test_hand_example_along_the_axes(side: str, expected: Rows) -> None:
    assert torch.allclose(edit_of(Replace(side=side, rank=1), AXES), tensor(expected), atol=1e-12)


def test_hand_example_stable_rank() -> None:
    edit = Replace().edit(AXES, NO_STATISTICS)
    assert isinstance(edit, Dense)
    assert edit.facts["stable_rank"] == pytest.approx(1.25)
    assert edit.facts["rank"] == 2
    assert torch.allclose(full(edit), tensor([[1, 2], [3, 4]]), atol=1e-12)


@pytest.mark.parametrize(
    ("k", "side", "expected"),
    [
        (1, "left", [[9, 0, 12], [12, 0, 16]]),
        (1, "right", [[0, 0, 0], [0, 12, 16]]),
        (1, "both", [[9, -5.76, 4.32], [12, 4.32, 21.76]]),
        (2, "left", [[25, 0, 0], [0, 0, 25]]),
        (2, "both", [[25, 0, 0], [0, 0, 25]]),
        (2, "right", [[25, 0, 0], [0, 12, 16]]),
    ],
)
def test_hand_example_oblique(k: int, side: str, expected: Rows) -> None:
    found = edit_of(Replace(side=side, rank=k), OBLIQUE)
    assert torch.allclose(found, tensor(expected), atol=1e-10)


def test_rank_rules() -> None:
    layer = with_safety(torch.diag(torch.tensor([3.0, 2, 1], dtype=torch.float64)))

    def rank(**settings: object) -> object:
        edit = Replace(**settings).edit(layer, NO_STATISTICS)  # type: ignore[arg-type]
        assert isinstance(edit, LowRank | Dense)
        return edit.facts["rank"]

    assert rank() == 2
    assert rank(rank="energy", eta=0.5) == 1  # 9 of 14
    assert rank(rank="energy", eta=0.9) == 2
    assert rank(rank="energy", eta=0.95) == 3
    assert rank(rank="entropy", eta=0.5) == 2
    assert rank(rank=99) == 3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_factors_equal_the_dense_form(
    shape: tuple[int, int], side: str, dtype: torch.dtype, bound: float
) -> None:
    layer = layer_of(shape, seed=1, dtype=dtype)
    for k in (1, 2, 4, 6):
        found = edit_of(Replace(side=side, rank=k), layer)
        assert error(found, dense_replace(layer, k, side)) <= bound


def projectors(layer: Layer, k: int, side: str) -> tuple[Tensor, Tensor]:
    u, _, vt = torch.linalg.svd(layer.safety_vector("base"), full_matrices=False)
    p, q = u[:, :k] @ u[:, :k].T, vt[:k].T @ vt[:k]
    return (p if side != "right" else 0 * p), (q if side != "left" else 0 * q)


cases = {
    "seed": st.integers(0, 1000),
    "k": st.integers(1, 6),
    "shape": st.sampled_from(SHAPES),
    "side": st.sampled_from(SIDES),
}


@settings(max_examples=40, deadline=None)
@given(**cases)
def test_what_stands_where_nearest_and_bounded(
    seed: int, k: int, shape: tuple[int, int], side: str
) -> None:
    layer = layer_of(shape, seed=seed)
    assert layer.aligned is not None
    wf, wa, task = layer.finetuned, layer.aligned, layer.task_vector()
    p, q = projectors(layer, k, side)
    left_out, right_out = torch.eye(shape[0]).double() - p, torch.eye(shape[1]).double() - q
    w = repaired(Replace(side=side, rank=k), layer)

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=0, atol=1e-9)

    d = wa - wf
    assert same(w, wf + p @ d + d @ q - p @ d @ q)
    assert same(w, wf + d - left_out @ d @ right_out)
    assert same(w, wa + left_out @ task @ right_out)
    assert same(p @ w, p @ wa)
    assert same(w @ q, wa @ q)
    assert same(left_out @ w @ right_out, left_out @ wf @ right_out)
    edit, rest = w - wf, w - wa
    assert float(task.square().sum()) == pytest.approx(
        float(edit.square().sum() + rest.square().sum())
    )
    for order in ("fro", 2):
        bound = torch.linalg.matrix_norm(task, order) * (1 + 1e-9)
        assert torch.linalg.matrix_norm(rest, order) <= bound
        wider = repaired(Replace(side=side, rank=k + 1), layer) - wa
        previous = torch.linalg.matrix_norm(rest, order) * (1 + 1e-9)
        assert torch.linalg.matrix_norm(wider, order) <= previous + 1e-12


@settings(max_examples=20, deadline=None)
@given(**cases, t=st.floats(0.05, 0.95))
def test_idempotent_at_full_strength_and_the_t_rule_below(
    seed: int, k: int, shape: tuple[int, int], side: str, t: float
) -> None:
    layer, method = layer_of(shape, seed=seed), Replace(side=side, rank=k)
    once = repaired(method, layer)
    again = method.edit(dataclasses.replace(layer, finetuned=once), NO_STATISTICS)
    assert isinstance(again, Unchanged) or float(full(again).norm()) <= 1e-9

    def step(w: Tensor, strength: float) -> Tensor:
        return w + strength * edit_of(method, dataclasses.replace(layer, finetuned=w))

    twice = step(step(layer.finetuned, t), t)
    assert torch.allclose(twice, step(layer.finetuned, 1 - (1 - t) ** 2), rtol=0, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(**{name: cases[name] for name in ("seed", "k", "shape")})
def test_sides_commute(seed: int, k: int, shape: tuple[int, int]) -> None:
    layer = layer_of(shape, seed=seed)

    def then(first: str, second: str) -> Tensor:
        middle = repaired(Replace(side=first, rank=k), layer)
        return repaired(Replace(side=second, rank=k), dataclasses.replace(layer, finetuned=middle))

    both = repaired(Replace(rank=k), layer)
    assert torch.allclose(then("left", "right"), both, rtol=0, atol=1e-9)
    assert torch.allclose(then("right", "left"), both, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_full_rank_reaches_the_aligned_weight_where_the_side_can(
    shape: tuple[int, int], side: str
) -> None:
    layer = layer_of(shape, seed=2)
    assert layer.aligned is not None
    found = repaired(Replace(side=side, rank=min(shape)), layer)
    reaches = {"both": True, "left": shape[0] <= shape[1], "right": shape[1] <= shape[0]}[side]
    assert torch.allclose(found, layer.aligned, rtol=0, atol=1e-10) is reaches


def test_rank_is_capped_at_the_numerical_rank_of_the_safety_vector() -> None:
    low = matrix(30, 2, seed=3) @ matrix(2, 40, seed=4)
    layer = with_safety(low, matrix(30, 40, seed=5))
    edit = Replace(rank=10).edit(layer, NO_STATISTICS)
    assert isinstance(edit, LowRank)
    assert edit.facts["rank"] == 2
    assert edit.rank == 4
    assert error(full(edit), dense_replace(layer, 2, "both")) <= 1e-10


def test_low_rank_while_it_is_smaller_then_dense() -> None:
    layer = layer_of((20, 20), seed=6)
    assert isinstance(Replace(rank=4).edit(layer, NO_STATISTICS), LowRank)  # 8 * 40 < 400
    assert isinstance(Replace(rank=5).edit(layer, NO_STATISTICS), Dense)  # 10 * 40 = 400
    assert isinstance(Replace(rank=9, side="left").edit(layer, NO_STATISTICS), LowRank)
    assert isinstance(Replace(rank=10, side="right").edit(layer, NO_STATISTICS), Dense)


def test_edges() -> None:
    zero = torch.zeros(3, 4).double()
    untouched = with_safety(zero, matrix(3, 4, seed=7))
    assert Replace().edit(untouched, NO_STATISTICS) == Unchanged(
        "alignment did not touch this tensor"
    )
    still = with_safety(matrix(3, 4, seed=8), zero)
    assert Replace().edit(still, NO_STATISTICS) == Unchanged("task vector is zero")
    assert Replace(rank=0).edit(layer_of((4, 4)), NO_STATISTICS) == Unchanged("rank is 0")


def test_unaligned_takes_its_own_subspaces() -> None:
    layer = layer_of((8, 8), seed=9)
    swapped = dataclasses.replace(layer, base=layer.unaligned)
    found = edit_of(Replace(rank=2, safety_vector="unaligned"), layer)
    assert error(found, dense_replace(swapped, 2, "both")) <= 1e-10


@pytest.mark.parametrize("side", SIDES)
def test_facts_of_the_report(side: str) -> None:
    layer = layer_of((9, 7), seed=10)
    edit = Replace(side=side, rank=2).edit(layer, NO_STATISTICS)
    assert isinstance(edit, LowRank | Dense)
    share = float(dense_replace(layer, 2, side).norm() / layer.task_vector().norm())
    assert edit.facts["projected_task"] == pytest.approx(share)
    s = torch.linalg.svdvals(layer.safety_vector("base")).square()
    assert edit.facts["kept_energy"] == pytest.approx(float(s[:2].sum() / s.sum()))
    assert edit.facts["degenerate_cut"] is False
    flat = with_safety(torch.eye(9).double(), matrix(9, 9, seed=11))
    cut = Replace(side=side, rank=2).edit(flat, NO_STATISTICS)
    assert isinstance(cut, LowRank | Dense)
    assert cut.facts["degenerate_cut"] is True


def test_strength_above_one_gives_up_the_bound_and_is_refused() -> None:
    Replace().validate_strength(1.0)
    with pytest.raises(UsageError, match=r"strength = 1\.01.*replace") as caught:
        Replace().validate_strength(1.01)
    assert "[0, 1]" in caught.value.hint
