"""Wilson and Clopper-Pearson: the printed values, SciPy, and the ends."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from realign.audit.statistics.intervals import (
    Interval,
    clopper_pearson,
    critical_value,
    wilson,
)
from realign.errors import UsageError

VECTORS = [
    (0, 50, (0, 0.071348), (0, 0.071122)),
    (0, 200, (0, 0.018845), (0, 0.018275)),
    (1, 20, (0.008881, 0.236131), (0.001265, 0.248733)),
    (20, 20, (0.838875, 1), (0.831567, 1)),
    (7, 200, (0.017056, 0.070471), (0.014186, 0.070781)),
    (15, 200, (0.045975, 0.120044), (0.042583, 0.120684)),
    (26, 200, (0.090282, 0.183664), (0.086708, 0.184652)),
    (14, 200, (0.042152, 0.114055), None),
    (23, 313, (0.049461, 0.107846), (0.047149, 0.108221)),
]


def limits(interval: Interval | None) -> tuple[float, float]:
    assert interval is not None
    return interval.low, interval.high


@pytest.mark.parametrize(("x", "n", "score", "exact"), VECTORS)
def test_printed_values(x, n, score, exact):
    assert limits(wilson(x, n)) == pytest.approx(score, abs=1e-6)
    if exact is not None:
        assert limits(clopper_pearson(x, n)) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "percent"), [(80, 4.58), (100, 3.70), (313, 1.21), (400, 0.95), (520, 0.73)]
)
def test_zero_events_are_not_zero_risk(n, percent):
    assert round(100 * limits(wilson(0, n))[1], 2) == percent


@pytest.mark.parametrize(("share", "n"), [(0.01, 381), (0.02, 189), (0.03, 125), (0.05, 73)])
def test_smallest_n_whose_zero_events_certify_a_share(share, n):
    assert limits(wilson(0, n))[1] <= share < limits(wilson(0, n - 1))[1]


def test_agrees_with_scipy_on_random_counts():
    rng = np.random.default_rng(11)
    for i in range(1000):
        n = int(rng.integers(1, 1500))
        x = int(rng.integers(0, n + 1))
        alpha = float(rng.choice([0.005, 0.025, 0.05, 0.1]))
        test = binomtest(x, n)  # its exact interval is a root search, slow: every fourth
        methods = ((wilson, "wilson"), (clopper_pearson, "exact"))[: 1 + (i % 4 == 0)]
        for ours, name in methods:
            theirs = test.proportion_ci(confidence_level=1 - 2 * alpha, method=name)
            assert limits(ours(x, n, alpha=alpha)) == pytest.approx(
                (theirs.low, theirs.high), abs=1e-9
            )


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 999, 100_000])
def test_exact_at_the_ends_and_mirrored(interval, n):
    none, every = limits(interval(0, n)), limits(interval(n, n))
    assert none[0] == 0.0
    assert every[1] == 1.0
    assert none[1] == pytest.approx(1.0 - every[0], abs=1e-12)
    assert 0.0 < none[1] < 1.0


@pytest.mark.parametrize("interval", [wilson, clopper_pearson])
def test_no_item_gives_no_interval(interval):
    assert interval(0, 0) is None


def test_level_and_method_are_recorded():
    interval = wilson(3, 40, alpha=0.05)
    assert interval is not None
    assert (interval.level, interval.method) == (0.9, "wilson")
    assert critical_value(0.025) == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.5, 0.975])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(UsageError, match=f"alpha is {alpha}"):
        wilson(3, 40, alpha=alpha)


def test_margins_include_their_ends():
    interval = Interval(low=-0.03, high=0.03, level=0.95, method="tango")
    assert interval.within(0.03)
    assert interval.equivalent(0.03)
    assert not interval.within(0.0299)
    safer = Interval(low=-0.2, high=0.01, level=0.95, method="tango")
    assert safer.within(0.03)
    assert not safer.equivalent(0.03)
