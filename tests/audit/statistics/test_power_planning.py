"""Exact power, smallest effect, certifiable margin and n needed: printed tables and enumeration."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from realign.audit.statistics.paired import mcnemar_one_sided, tango_interval, tango_within
from realign.audit.statistics.power import (
    certifiable_margin,
    certification_probability,
    certified_counts,
    detection_n,
    detection_n_quick,
    mcnemar_power,
    minimum_detectable_effect,
    n_needed,
    plan,
    rejection_counts,
)

POWER = [
    (100, (0.035, 0.099, 0.316, 0.670, 0.828), (9.6, 11.0, 14.2)),
    (200, (0.172, 0.361, 0.731, 0.965, 0.994), (5.5, 6.6, 8.9)),
    (313, (0.325, 0.601, 0.924, 0.998, 1.000), (3.9, 4.9, 6.6)),
    (400, (0.435, 0.732, 0.973, 1.000, 1.000), (3.3, 4.1, 5.7)),
    (520, (0.562, 0.849, 0.994, 1.000, 1.000), (2.8, 3.5, 4.9)),
    (950, (0.853, 0.988, 1.000, 1.000, 1.000), (1.8, 2.4, 3.4)),
]

# n, then per margin 1, 2, 3, 5 pp: (churn 2 %, churn 4 %)
CERTIFY = [
    (100, ((0.03, 0.05), (0.10, 0.12), (0.26, 0.22), (0.61, 0.47))),
    (200, ((0.12, 0.10), (0.34, 0.22), (0.60, 0.43), (0.96, 0.85))),
    (313, ((0.18, 0.12), (0.53, 0.35), (0.87, 0.65), (1.0, 0.97))),
    (400, ((0.22, 0.15), (0.66, 0.45), (0.94, 0.78), (1.0, 0.99))),
    (520, ((0.29, 0.20), (0.80, 0.57), (0.99, 0.89), (1.0, 1.0))),
    (950, ((0.51, 0.32), (0.98, 0.84), (1.0, 0.99), (1.0, 1.0))),
    (2000, ((0.85, 0.60), (1.0, 0.99), (1.0, 1.0), (1.0, 1.0))),
]

# churn; n for m = 1, 2, 3, 5 pp; margin in pp for n = 100, 200, 313, 400, 520, 950
NEEDED = [
    (0.02, (1740, 520, 280, 130), (6.2, 3.8, 2.7, 2.4, 2.0, 1.5)),
    (0.04, (3230, 870, 420, 180), (7.4, 4.7, 3.6, 3.1, 2.7, 1.9)),
    (0.08, (6320, 1610, 740, 290), (9.2, 6.0, 4.8, 4.2, 3.7, 2.7)),
]


@pytest.mark.parametrize(("n", "powers", "effects"), POWER)
def test_power_and_smallest_effect(n, powers, effects):
    found = [mcnemar_power(n, drift=d, c_rate=0.01) for d in (0.02, 0.03, 0.05, 0.08, 0.10)]
    assert found == pytest.approx(powers, abs=0.002)
    smallest = [minimum_detectable_effect(n, c_rate=c) for c in (0.01, 0.02, 0.05)]
    assert smallest == pytest.approx([pp / 100 for pp in effects], abs=0.002)


def test_smallest_effect_has_the_wanted_power():
    effect = minimum_detectable_effect(200, c_rate=0.02)
    assert effect is not None
    assert mcnemar_power(200, drift=effect, c_rate=0.02) == pytest.approx(0.80, abs=1e-6)
    assert minimum_detectable_effect(5, c_rate=0.01) is None


@pytest.mark.parametrize(
    ("drift", "churn", "quick", "exact"),
    [(0.05, 0.07, 217, 230), (0.03, 0.05, 434, 470), (0.02, 0.04, 783, 850)],
)
def test_items_to_detect_a_drift(drift, churn, quick, exact):
    assert round(detection_n_quick(drift=drift, churn=churn)) == quick
    assert detection_n(drift=drift, churn=churn) == exact


@pytest.mark.parametrize("alpha", [0.025, 0.025 / 3, 0.05])
def test_rejection_counts_are_the_smallest_that_reject(alpha):
    for flips, k in enumerate(rejection_counts(60, alpha=alpha).tolist()):
        rejected = [b for b in range(flips + 1) if mcnemar_one_sided(b, flips - b) <= alpha]
        assert k == (min(rejected) if rejected else flips + 1)


def enumerated(n: int, b_rate: float, c_rate: float):
    b, c = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    b, c = b[b + c <= n], c[b + c <= n]
    return b, c, binom.pmf(c, n, c_rate) * binom.pmf(b, n - c, b_rate / (1 - c_rate))


def test_power_equals_enumeration_over_tables():
    b, c, weight = enumerated(60, 0.12, 0.03)
    rejects = binom.sf(b - 1, b + c, 0.5) <= 0.025
    power = mcnemar_power(60, drift=0.09, c_rate=0.03)
    assert power == pytest.approx(float(weight[rejects].sum()), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "margin", "churn", "drift"), [(60, 0.1, 0.1, 0.0), (90, 0.05, 0.2, 0.05)]
)
def test_certification_equals_enumeration_over_tables(n, margin, churn, drift):
    b, c, weight = enumerated(n, (churn + drift) / 2, (churn - drift) / 2)
    direct = float(weight[tango_within(b, c, n, margin=margin)].sum())
    ours = certification_probability(n, margin=margin, churn=churn, drift=drift)
    assert ours == pytest.approx(direct, abs=1e-10)


@pytest.mark.parametrize(("n", "margin"), [(50, 0.02), (80, 0.05), (200, 0.03), (313, 0.02)])
def test_certified_counts_are_the_largest_within_the_margin(n, margin):
    fixed = np.arange(n + 1)
    allowed = certified_counts(n, fixed, margin=margin)
    b, c = np.meshgrid(np.arange(n + 1), fixed)
    within = tango_within(b, c, n, margin=margin) & (b + c <= n)
    # one block of certified counts from zero up, and no certified count after a gap
    assert np.array_equal(within, (b <= allowed[:, None]) & (b + c <= n))


def test_decision_by_counts_is_the_decision_by_interval():
    for c, b in enumerate(certified_counts(200, np.arange(20), margin=0.03).tolist()):
        if b >= 0:
            interval = tango_interval(b, c, 200)
            assert interval is not None
            assert interval.high <= 0.03
        beyond = tango_interval(b + 1, c, 200)
        assert beyond is not None
        assert beyond.high > 0.03


@pytest.mark.parametrize(("n", "rows"), CERTIFY)
def test_probability_to_certify_zero_drift(n, rows):
    for margin, printed in zip((0.01, 0.02, 0.03, 0.05), rows, strict=True):
        found = [certification_probability(n, margin=margin, churn=c) for c in (0.02, 0.04)]
        assert found == pytest.approx(printed, abs=0.006), margin


@pytest.mark.parametrize(("churn", "needed", "margins"), NEEDED)
def test_items_needed_and_certifiable_margins(churn, needed, margins):
    assert [n_needed(margin=m, churn=churn) for m in (0.01, 0.02, 0.03, 0.05)] == list(needed)
    found = [certifiable_margin(n, churn=churn) for n in (100, 200, 313, 400, 520, 950)]
    assert found == pytest.approx([pp / 100 for pp in margins])


@pytest.mark.parametrize(
    ("margin", "churn"), [(0.03, 0.02), (0.05, 0.08), (0.08, 0.4), (0.1, 0.01)]
)
def test_items_needed_is_the_first_of_all_tens(margin, churn):
    sizes = range(50, 2000, 10)
    first = next(
        n for n in sizes if certification_probability(n, margin=margin, churn=churn) >= 0.8
    )
    assert n_needed(margin=margin, churn=churn) == first


def test_certifiable_margin_is_the_smallest():
    margin = certifiable_margin(200, churn=0.04)
    assert margin == 0.047
    assert certification_probability(200, margin=0.047, churn=0.04) >= 0.8
    assert certification_probability(200, margin=0.046, churn=0.04) < 0.8


@pytest.mark.parametrize(
    ("n", "margin", "churn", "probability"),
    [
        (100, 0.02, 0.085, 0.026076),
        (200, 0.03, 0.05, 0.016413),
        (313, 0.03, 0.10, 0.023860),
        (520, 0.02, 0.15, 0.025205),
        (950, 0.05, 0.20, 0.024640),
    ],
)
def test_error_of_certifying_at_the_margin(n, margin, churn, probability):
    found = certification_probability(n, margin=margin, churn=churn, drift=margin)
    assert found == pytest.approx(probability, abs=1e-6)


def test_calibration_duty_enumerated():
    worst = (0.0, 0, 0.0, 0.0)
    for n in (100, 200, 313, 520, 950):
        for margin in (0.02, 0.03, 0.05):
            for churn in (*np.arange(margin, 0.2001, 0.005), 0.087):
                error = certification_probability(n, margin=margin, churn=churn, drift=margin)
                worst = max(worst, (error, n, margin, float(churn)))
    assert worst == (pytest.approx(0.0261, abs=5e-5), 100, 0.02, 0.087)


def test_plan_repeats_the_tables():
    table = plan(313, margin=0.03)
    assert [round(100 * (effect or 0), 1) for _, effect in table.detectable] == [3.9, 4.9, 6.6]
    assert dict(table.certification)[0.02] == pytest.approx(0.87, abs=0.006)
    assert dict(table.certifiable) == {0.02: 0.027, 0.04: 0.036, 0.08: 0.048}
    assert dict(table.needed) == {0.02: 280, 0.04: 420, 0.08: 740}
    assert (table.n, table.margin, table.alpha) == (313, 0.03, 0.025)


def test_a_plan_out_of_reach_says_so():
    assert n_needed(margin=0.001, churn=0.5) is None
    assert certifiable_margin(1, churn=1.0) is None
