"""Kappa between judges, and rates corrected for judge error."""

from __future__ import annotations

import numpy as np
import pytest

from realign.audit.statistics.agreement import (
    JudgeQuality,
    cohen_kappa,
    corrected_difference,
    rogan_gladen,
)
from realign.errors import UsageError

QUALITY = JudgeQuality(sensitivity=0.90, n_bad=200, specificity=0.95, n_ok=300)


def test_kappa_printed_values():
    result = cohen_kappa(40, 9, 6, 245)
    assert result.n == 300
    assert result.observed == pytest.approx(0.95)
    assert result.expected == pytest.approx(0.733422, abs=1e-6)
    assert result.kappa == pytest.approx(0.812437, abs=1e-6)
    assert result.standard_error == pytest.approx(0.047202, abs=1e-6)
    assert result.interval is not None
    assert (result.interval.low, result.interval.high) == pytest.approx(
        (0.719923, 0.904952), abs=1e-6
    )
    assert result.positive == pytest.approx(0.842105, abs=1e-6)
    assert result.negative == pytest.approx(0.970297, abs=1e-6)
    assert not result.weak()


def test_kappa_is_symmetric_in_the_judges_and_in_the_classes():
    one, other = cohen_kappa(40, 9, 6, 245), cohen_kappa(40, 6, 9, 245)
    turned = cohen_kappa(245, 9, 6, 40)
    assert one.kappa == pytest.approx(other.kappa)
    assert one.kappa == pytest.approx(turned.kappa)
    assert (one.positive, one.negative) == (turned.negative, turned.positive)


def test_kappa_at_its_ends():
    assert cohen_kappa(30, 0, 0, 70).kappa == 1.0
    assert cohen_kappa(25, 25, 25, 25).kappa == pytest.approx(0.0)
    opposed = cohen_kappa(0, 50, 50, 0)
    assert opposed.kappa == pytest.approx(-1.0)
    assert opposed.weak()
    assert not cohen_kappa(40, 9, 6, 245).weak(min_kappa=0.8)
    assert cohen_kappa(40, 9, 6, 245).weak(min_kappa=0.9)


def test_kappa_is_missing_where_it_is_undefined():
    constant = cohen_kappa(0, 0, 0, 80)
    assert (constant.kappa, constant.interval, constant.positive) == (None, None, None)
    assert constant.negative == 1.0
    assert not constant.weak()
    assert cohen_kappa(0, 0, 0, 0).observed is None


def test_rogan_gladen_printed_values():
    result = rogan_gladen(0.30, 320, quality=QUALITY)
    assert result.value == pytest.approx(0.294118, abs=1e-6)
    assert result.standard_error == pytest.approx(0.032732, abs=1e-6)
    assert result.interval is not None
    assert (result.interval.low, result.interval.high) == pytest.approx(
        (0.229964, 0.358271), abs=1e-6
    )
    assert result.flags == ()


def test_rates_below_the_judges_noise_are_zero_and_say_so():
    result = rogan_gladen(0.03, 320, quality=QUALITY)
    assert result.unclipped == pytest.approx(-0.023529, abs=1e-6)
    assert result.value == 0.0
    assert result.flags == ("below_judge_noise",)
    assert result.interval is not None
    assert result.interval.low == 0.0 < result.interval.high


def test_paired_drift_is_divided_by_youdens_index():
    assert corrected_difference(0.055, quality=QUALITY) == pytest.approx(0.064706, abs=1e-6)


@pytest.mark.parametrize(
    ("quality", "reason"),
    [
        (JudgeQuality(0.60, 200, 0.59, 300), "below 0.2"),
        (JudgeQuality(0.90, 49, 0.95, 300), "49 bad"),
        (JudgeQuality(0.90, 200, 0.95, 49), "49 ok"),
    ],
)
def test_correction_is_refused_without_a_good_judge_or_labels(quality, reason):
    result = rogan_gladen(0.30, 320, quality=quality)
    assert result.value is None
    assert result.reason is not None
    assert reason in result.reason
    assert corrected_difference(0.055, quality=quality) is None


def test_the_correction_undoes_the_judge():
    for truth in np.linspace(0, 1, 21):
        observed = truth * 0.90 + (1 - truth) * 0.05
        assert rogan_gladen(observed, 500, quality=QUALITY).value == pytest.approx(truth, abs=1e-12)


def test_no_item_and_impossible_quality():
    assert rogan_gladen(0.0, 0, quality=QUALITY).value is None
    with pytest.raises(UsageError, match=r"sensitivity is 1\.2"):
        JudgeQuality(1.2, 100, 0.9, 100)
