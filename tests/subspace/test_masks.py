from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import matrix
from torch import Tensor

from realign.subspace.masks import (
    count_down,
    count_up,
    largest,
    largest_per_row,
    lowest,
    prefix_within,
)

shapes = st.tuples(st.integers(1, 5), st.integers(1, 7))


def steps(shape: tuple[int, int], seed: int) -> Tensor:
    """Few different values, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, shape, generator=generator).double()


def by_order(scores: Tensor, count: int, *, among: Tensor | None = None) -> Tensor:
    """The lowest scores, then (column, row), by sorting tuples."""
    rows, width = scores.shape
    places = [
        (float(scores[row, column]), column, row)
        for row in range(rows)
        for column in range(width)
        if among is None or bool(among[row, column])
    ]
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for _, column, row in sorted(places)[:count]:
        mask[row, column] = True
    return mask


def test_counts_do_not_depend_on_the_rounding_of_a_product() -> None:
    assert 0.07 * 100 > 7  # what would be rounded up to 8
    assert count_up(0.07, 100) == 7
    assert count_up(0.05, 30) == 2
    assert 0.29 * 100 < 29  # and down to 28
    assert count_down(0.29, 100) == 29
    assert count_down(0.15, 6) == 0
    assert (count_up(0.0, 7), count_up(1.0, 7), count_down(1.0, 7)) == (0, 7, 7)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 9999), share=st.floats(0, 1))
def test_the_largest_of_every_row_with_ties_to_the_smaller_column(
    shape: tuple[int, int], seed: int, share: float
) -> None:
    scores = steps(shape, seed)
    count = round(share * shape[1])
    mask = largest_per_row(scores, count)
    assert mask.sum(1).tolist() == [count] * shape[0]
    for row in range(shape[0]):
        order = sorted(range(shape[1]), key=lambda j: (-float(scores[row, j]), j))
        assert set(mask[row].nonzero().view(-1).tolist()) == set(order[:count])


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 9999), share=st.floats(0, 1))
def test_the_largest_and_the_lowest_of_a_matrix_with_ties_by_column_then_row(
    shape: tuple[int, int], seed: int, share: float
) -> None:
    scores = steps(shape, seed)
    count = round(share * scores.numel())
    assert torch.equal(lowest(scores, count), by_order(scores, count))
    assert torch.equal(largest(scores, count), by_order(-scores, count))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 9999), share=st.floats(0, 1))
def test_the_lowest_among_candidates(shape: tuple[int, int], seed: int, share: float) -> None:
    scores, among = steps(shape, seed), steps(shape, seed + 1) > 1
    count = round(share * int(among.sum()))
    mask = lowest(scores, count, among_oi=among)
    assert torch.equal(mask, by_order(scores, count, among=among))


def prefix_by_loop(
    loss: Tensor, cost: Tensor, *, budget: float, relative: bool, most: int
) -> Tensor:
    rows, width = loss.shape
    order = sorted(
        ((float(cost[j]), j, i) for j in range(width) for i in range(rows)),
    )
    limit = budget * float(loss.sum()) if relative else budget
    mask, total = torch.zeros(rows, width, dtype=torch.bool), 0.0
    for _, j, i in order[:most]:
        total += float(loss[i, j])
        if total > limit:
            break
        mask[i, j] = True
    return mask


@settings(max_examples=80, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 9999),
    budget=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    relative=st.booleans(),
    keep=st.floats(0, 1),
)
def test_the_prefix_is_the_longest_that_the_budget_affords(
    shape: tuple[int, int], seed: int, budget: float, relative: bool, keep: float
) -> None:
    # Whole numbers: sums are exact in any order.
    loss = steps(shape, seed)
    cost = steps((1, shape[1]), seed + 1)[0]
    limit = budget if relative else budget * 10
    most = round(keep * loss.numel())
    found = prefix_within(loss, cost, budget=limit, relative=relative, most=most)
    expected = prefix_by_loop(loss, cost, budget=limit, relative=relative, most=most)
    assert torch.equal(found, expected)


def test_the_whole_loss_affords_everything_whatever_its_rounding() -> None:
    loss, cost = matrix(37, 53, seed=1).square(), matrix(53, seed=2).abs()
    mask = prefix_within(loss, cost, budget=1.0, relative=True, most=loss.numel())
    assert bool(mask.all())


def test_a_mask_of_nothing_and_of_everything() -> None:
    scores = matrix(3, 4, seed=1)
    for take, whole in ((largest_per_row, 4), (largest, 12), (lowest, 12)):
        assert not bool(take(scores, 0).any())
        assert bool(take(scores, whole).all())
    empty = torch.zeros(0, 4).double()
    assert largest_per_row(empty, 2).shape == (0, 4)
    assert prefix_within(empty, empty.sum(0), budget=1.0, relative=True, most=0).shape == (0, 4)
