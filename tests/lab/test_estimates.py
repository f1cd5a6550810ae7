"""Rates over clusters and repeats: hand examples, and agreement with other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from realign.audit.statistics.intervals import wilson
from realign.lab.estimates import (
    design_effect,
    estimate_mean,
    estimate_rate,
    score_interval,
    t_interval,
)
from realign.lab.marking import Marks, count_marks

COUNTS = st.lists(st.tuples(st.integers(0, 8), st.just(8)), min_size=2, max_size=20)


def marks_of(groups: list[tuple[int, int]]) -> Marks:
    hits = [i < h for h, n in groups for i in range(n)]
    clusters = [str(index) for index, (_, n) in enumerate(groups) for _ in range(n)]
    return count_marks(hits, clusters)


def test_marks_are_counted_per_cluster_and_read_back() -> None:
    marks = count_marks([True, False, True, True, False], ["a", "a", "b", "b", "c"])
    assert (marks.n, marks.hits, marks.rate) == (5, 3, 0.6)
    assert marks.clusters == {(1, 2): 1, (2, 2): 1, (0, 1): 1}
    assert marks.to_json()["clusters"] == {"0/1": 1, "1/2": 1, "2/2": 1}
    assert Marks.from_json(marks.to_json()) == marks


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_score_interval_of_whole_answers_is_wilsons(hits: int, more: int) -> None:
    n = hits + more
    known = wilson(hits, n)
    assert known is not None
    assert score_interval(hits / n, n) == pytest.approx((known.low, known.high))


def test_design_effect_by_hand() -> None:
    # Two clusters of 4, all or nothing: p = 1/2, 2 * 8 / 64 = 1/4; independent: 1/4 / 8 = 1/32.
    assert design_effect([marks_of([(4, 4), (0, 4)])]) == pytest.approx(8.0)
    # Clusters that all have the pooled rate say less than independent answers: floored at 1.
    assert design_effect([marks_of([(2, 4), (2, 4)])]) == 1.0
    assert design_effect([marks_of([(0, 4), (0, 4)])]) == 1.0


@given(COUNTS)
def test_design_effect_is_the_clustered_variance_over_the_independent_one(
    groups: list[tuple[int, int]],
) -> None:
    means = np.array([h / n for h, n in groups])
    rate = means.mean()
    if rate in (0.0, 1.0):
        return
    clustered = means.var(ddof=1) / len(groups)  # clusters of one size
    independent = rate * (1 - rate) / sum(n for _, n in groups)
    expected = max(1.0, clustered / independent)
    assert design_effect([marks_of(groups)]) == pytest.approx(expected)


def test_t_interval_is_scipys_and_needs_two_repeats() -> None:
    values = [0.1, 0.2, 0.6]
    known = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert t_interval(values) == pytest.approx(known)
    assert t_interval([0.3]) is None


def test_an_estimate_is_the_hull_of_both_intervals() -> None:
    repeats = [marks_of([(h, 8)] * 32) for h in (0, 1, 4)]
    estimate = estimate_rate(repeats)
    assert estimate.value == pytest.approx(5 / 24)
    assert (estimate.n, estimate.repeats) == (768, 3)
    over = t_interval([0, 1 / 8, 1 / 2])
    assert over is not None and over[0] < 0 and over[1] < 1
    assert estimate.low == 0.0 and estimate.high == pytest.approx(over[1])
    same = estimate_rate([repeats[0]] * 3)
    assert (same.value, same.low) == (0.0, 0.0)
    known = wilson(0, 768)
    assert known is not None and same.high == pytest.approx(known.high)


def test_one_repeat_has_the_clustered_interval_alone() -> None:
    one = estimate_rate([marks_of([(4, 4), (0, 4)] * 8)])
    low, high = score_interval(0.5, 64 / design_effect([marks_of([(4, 4), (0, 4)] * 8)]))
    assert (one.low, one.high) == pytest.approx((low, high))
    plain = wilson(32, 64)
    assert plain is not None and one.high - one.low > 1.5 * (plain.high - plain.low)


def test_a_mean_of_tasks_counts_every_task_alike() -> None:
    good, bad = marks_of([(8, 8)] * 10), marks_of([(0, 8)] * 40)
    mean = estimate_mean([[good], [bad]])
    assert mean.value == pytest.approx(0.5) and mean.n == 400
    only = (estimate_rate([good]), estimate_rate([bad]))
    assert mean.high == pytest.approx(0.5 + (only[1].high - 0) / 2)
    assert mean.low == pytest.approx(0.5 - (1 - only[0].low) / 2)
    assert math.isclose(estimate_mean([[good]]).value, 1.0)
