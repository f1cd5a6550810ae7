"""Holm, and one decision over several suites."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, false_discovery_control

from realign.audit.statistics.multiplicity import FamilyMember, family_test, holm, max_drop
from realign.audit.statistics.paired import mcnemar_one_sided
from realign.errors import UsageError

FLIPS = [(14, 3), (9, 2), (3, 2)]


def family(flips, judges=None):
    return [
        FamilyMember(suite=f"suite-{i}", judge=judges[i] if judges else "oracle", b=b, c=c)
        for i, (b, c) in enumerate(flips)
    ]


def test_holm_printed_values():
    assert holm([0.004, 0.020, 0.030, 0.300]) == pytest.approx((0.016, 0.060, 0.060, 0.300))
    p_values = [mcnemar_one_sided(b, c) for b, c in FLIPS]
    assert holm(p_values) == pytest.approx((0.019089, 0.065430, 0.5), abs=1e-6)


def test_holm_keeps_order_ties_and_bounds():
    assert holm([]) == ()
    assert holm([0.3]) == (0.3,)
    assert holm([0.9, 0.01, 0.8]) == pytest.approx((1.0, 0.03, 1.0))
    rng = np.random.default_rng(1)
    for _ in range(100):
        p = rng.uniform(size=int(rng.integers(1, 12))).tolist()
        adjusted = holm(p)
        order = np.argsort(p)
        assert all(a >= raw for a, raw in zip(adjusted, p, strict=True))
        assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
        # Holm is never below Benjamini-Hochberg and never above Bonferroni
        assert np.all(np.array(adjusted) >= false_discovery_control(p) - 1e-12)
        assert np.all(np.array(adjusted) <= np.minimum(1, len(p) * np.array(p)) + 1e-12)


def test_family_printed_values():
    result = family_test(family(FLIPS))
    assert result.pooled_p == pytest.approx(0.00065936, abs=1e-8)
    assert result.max_drop == pytest.approx(2.667892, abs=1e-6)
    assert result.max_drop_p == pytest.approx(0.01218501, abs=1e-8)
    assert result.fisher == pytest.approx(18.340684, abs=1e-6)
    assert result.fisher_p == pytest.approx(0.00543489, abs=1e-8)
    assert result.flagged
    assert result.max_drop_p > 0.025 / 3  # set by pooled and Fisher, not by this one


def test_max_drop_equals_enumeration():
    for flips in ([(14, 3), (9, 2), (3, 2)], [(4, 0), (2, 2)], [(5, 5), (1, 0), (0, 3)]):
        observed, p = max_drop(flips)
        counts = [b + c for b, c in flips]
        grids = np.meshgrid(*[np.arange(n + 1) for n in counts], indexing="ij")
        weight, top = 1.0, -np.inf
        for grid, n in zip(grids, counts, strict=True):
            weight = weight * binom.pmf(grid, n, 0.5)
            top = np.maximum(top, (2 * grid - n) / math.sqrt(n))
        assert observed == max((b - c) / math.sqrt(b + c) for b, c in flips)
        assert p == pytest.approx(float(weight[top >= observed - 1e-12].sum()), abs=1e-12)


def test_suites_without_flips_say_nothing():
    silent = family_test(family([(0, 0), (0, 0)]))
    assert silent.max_drop is None
    assert (silent.pooled_p, silent.max_drop_p, silent.fisher_p) == (1.0, 1.0, 1.0)
    assert not silent.flagged
    assert max_drop([*FLIPS, (0, 0)]) == max_drop(FLIPS)


def test_improvement_everywhere_is_not_drift():
    result = family_test(family([(0, 9), (1, 12)]))
    assert not result.flagged
    assert result.max_drop is not None
    assert result.max_drop < 0


def test_two_judges_on_one_suite_are_rejected():
    members = [FamilyMember("harm", "oracle", 5, 1), FamilyMember("harm", "keyword", 6, 1)]
    with pytest.raises(UsageError, match="suite harm is in the family twice"):
        family_test(members)


def test_clustered_and_empty_families_are_rejected():
    with pytest.raises(UsageError, match="share clusters"):
        family_test([FamilyMember("harm", "oracle", 5, 1, clustered=True)])
    with pytest.raises(UsageError, match="at least one member"):
        family_test([])


def test_flag_keeps_its_level_without_drift():
    # three suites of 200 with 5 % churn and no drift; the union of three tests at alpha / 3
    rng = np.random.default_rng(3)
    runs = 600
    raised = sum(
        family_test(
            family(rng.multinomial(200, [0.025, 0.025, 0.95], size=3)[:, :2].tolist())
        ).flagged
        for _ in range(runs)
    )
    assert raised / runs <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / runs)
