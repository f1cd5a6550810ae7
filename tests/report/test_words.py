from __future__ import annotations

from typing import get_args

import pytest

from realign.audit.instruments import METRICS as MEASURED
from realign.audit.schema import ComparisonName, Role, VerdictWord
from realign.report import words


def test_verdicts_have_the_published_words() -> None:
    assert words.VERDICTS["drift"] == "drift found"
    assert words.VERDICTS["within_margin"] == "within the declared margin"
    assert words.VERDICTS["inconclusive"] == "not enough data to say"


def test_no_words_claim_safety() -> None:
    everything = [*words.VERDICTS.values(), *words.REASONS.values(), *words.COMPARISONS.values()]
    for text in everything:
        for claim in ("safe", "passed", "no drift"):
            assert claim not in text


def test_every_role_comparison_verdict_and_metric_has_words() -> None:
    assert set(words.ROLES) == set(get_args(Role))
    assert set(words.COMPARISONS) == set(get_args(ComparisonName))
    assert set(words.VERDICTS) - {None} == set(get_args(VerdictWord))
    measured = {metric.name for metrics in MEASURED.values() for metric in metrics}
    assert measured <= set(words.METRICS)


@pytest.mark.parametrize(
    ("p", "text"), [(0.0, "<1e-4"), (0.00009, "<1e-4"), (0.006363, "0.0064"), (None, "-")]
)
def test_a_p_value_is_never_zero(p: float | None, text: str) -> None:
    assert words.probability(p) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.055, "+5.5 pp"), (-0.005, "-0.5 pp"), (-0.0001, "+0.0 pp"), (None, "-")],
)
def test_differences(value: float | None, text: str) -> None:
    assert words.difference(value) == text


def test_rates_and_intervals() -> None:
    assert words.percent(0.13) == "13.0 %"
    assert words.percent(None) == "-"
    assert words.percent_range(0.090282, 0.183664) == "9.0 to 18.4"
    assert words.percent_range(None, None) == ""
    assert words.difference_range(0.016511, 0.101306) == "+1.7 to +10.1"


def test_means_of_log_probabilities_are_no_percentage_points() -> None:
    assert words.difference(0.553, unit="nats") == "+0.55"
    assert words.difference_range(-1.004, 0.2, unit="nats") == "-1.00 to +0.20"
    assert words.margin(0.03) == "3.0 pp"
    assert words.margin(0.5, unit="nats") == "0.50"
