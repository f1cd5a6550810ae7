"""The heavier duties of the audit's statistics: finer grids and longer enumerations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from realign.audit.statistics.paired import tango_upper, tango_within
from realign.audit.statistics.power import (
    certification_probability,
    certified_counts,
    detection_n,
    mcnemar_power,
    n_needed,
)

LIMIT = 0.025 + 3 * math.sqrt(0.025 * 0.975 / 4000)


def test_calibration_duty_on_a_fine_grid():
    worst = 0.0
    for n in (100, 200, 313, 520, 950):
        for margin in (0.02, 0.03, 0.05):
            for churn in np.arange(margin, 0.2001, 0.001):
                error = certification_probability(n, margin=margin, churn=churn, drift=margin)
                worst = max(worst, error)
    assert worst == pytest.approx(0.0261, abs=5e-5)


@pytest.mark.parametrize("n", [100, 200, 313, 520, 950])
def test_calibration_duty_simulated(n):
    # About two hundred settings for each n: with 4 000 tables each, three standard errors are
    # crossed by chance alone now and then. Ten times the tables keep the limit and lose the chance.
    draws = 40_000
    rng = np.random.default_rng(31)
    for margin in (0.02, 0.03, 0.05):
        for churn in np.arange(margin, 0.2001, 0.01):
            b_rate, c_rate = (churn + margin) / 2, (churn - margin) / 2
            exact = certification_probability(n, margin=margin, churn=churn, drift=margin)
            for comparator in (0.0, 0.02, 0.1, 0.3, 0.5):
                if comparator < c_rate:
                    continue  # what is fixed was bad before
                e_rate = comparator - c_rate
                rates = [e_rate, b_rate, c_rate, 1 - e_rate - b_rate - c_rate]
                tables = rng.multinomial(n, rates, size=draws)
                within = float(np.mean(tango_within(tables[:, 1], tables[:, 2], n, margin=margin)))
                setting = (n, margin, churn, comparator)
                assert within <= LIMIT, setting
                error = 5 * math.sqrt(exact * (1 - exact) / draws)
                assert within == pytest.approx(exact, abs=error), setting


@pytest.mark.parametrize("n", [50, 100, 150])
def test_root_and_root_free_decisions_agree_on_every_table(n):
    b, c = (grid.ravel() for grid in np.meshgrid(np.arange(n + 1), np.arange(n + 1)))
    b, c = b[b + c <= n], c[b + c <= n]
    high = tango_upper(b, c, n)
    for margin in (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3):
        assert np.array_equal(tango_within(b, c, n, margin=margin), high <= margin)


@pytest.mark.parametrize("n", [320, 520])
def test_the_limit_rises_with_newly_bad_items(n):
    fixed = np.arange(n + 1)
    b, c = np.meshgrid(fixed, fixed)
    for margin in (0.01, 0.03, 0.1):
        within = tango_within(b, c, n, margin=margin) & (b + c <= n)
        allowed = certified_counts(n, fixed, margin=margin)
        assert np.array_equal(within, (b <= allowed[:, None]) & (b + c <= n))


def test_items_needed_are_never_below_the_first_one_tried():
    z = norm.isf(0.025) + norm.ppf(0.80)
    for churn in (0.005, 0.01, 0.02, 0.04, 0.08, 0.2, 0.4, 0.8, 1.0):
        for margin in (0.01, 0.02, 0.03, 0.05, 0.08, 0.2):
            if churn * (z / margin) ** 2 > 2000:
                continue
            first = next(
                n
                for n in range(50, 5000, 10)
                if certification_probability(n, margin=margin, churn=churn) >= 0.80
            )
            assert n_needed(margin=margin, churn=churn) == first, (churn, margin)


def test_items_to_detect_are_never_below_the_first_one_tried():
    for drift, churn in ((0.05, 0.05), (0.05, 0.07), (0.05, 0.3), (0.1, 0.12), (0.3, 0.5)):
        c_rate = (churn - drift) / 2
        first = next(
            n for n in range(50, 5000, 10) if mcnemar_power(n, drift=drift, c_rate=c_rate) >= 0.80
        )
        assert detection_n(drift=drift, churn=churn) == first


def test_mcnemar_keeps_its_level_whatever_the_churn():
    for n in (50, 100, 313, 950):
        for churn in np.arange(0.005, 0.5, 0.005):
            flips = np.arange(n + 1)
            reject = binom.sf(binom.isf(0.025, flips, 0.5), flips, 0.5)
            assert float(np.sum(binom.pmf(flips, n, churn) * reject)) <= 0.025
            assert mcnemar_power(n, drift=0.0, c_rate=churn / 2) <= 0.025
