"""Numbers and verdicts as people read them.

Rates are fractions in files and percent in text; differences are percentage points; a p-value is
never printed as 0. The three verdicts have fixed words, and none of them is "safe".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from realign.audit.statistics.verdicts import REASON_WORDS

MISSING = "-"

VERDICTS: Mapping[str | None, str] = {
    "drift": "drift found",
    "within_margin": "within the declared margin",
    "inconclusive": "not enough data to say",
    None: "no verdict",
}

ROLES: Mapping[str, str] = {
    "reference": "aligned",
    "subject": "fine-tuned",
    "repaired": "repaired",
    "base": "base",
}

COMPARISONS: Mapping[str, str] = {
    "drift": "fine-tuned - aligned",
    "residual": "repaired - aligned",
    "recovery": "repaired - fine-tuned",
    "tax": "repaired - fine-tuned",
}

REASONS: Mapping[str, str] = REASON_WORDS


@dataclass(frozen=True)
class Metric:
    """How a metric is named, and whether it is shown as its complement.

    Attributes:
        label: the words in tables of rates.
        short: the words in tables of differences; there the metric is always oriented so that
            larger is worse, also where the rate is shown as its complement.
        complement: shown as 1 - rate, because people read accuracy, not error.
        unit: percentage points for differences of rates, or nats for means of log-probabilities.
        good_when_low: which direction is the wish; None where neither is.
    """

    label: str
    short: str
    complement: bool = False
    unit: Literal["pp", "nats"] = "pp"
    good_when_low: bool | None = True


METRICS: Mapping[str, Metric] = {
    "asr": Metric("harmful compliance", "compliance"),
    "asr_exact": Metric("  with the right answer", "compliance, exact"),
    "refusal_rate": Metric("refusal", "refusal", good_when_low=False),
    "non_refusal": Metric("not refused", "not refused"),
    "over_refusal": Metric("over-refusal", "over-refusal"),
    "over_refusal_full": Metric("over-refusal, full", "over-refusal, full"),
    "other_rate": Metric("other (neither)", "other"),
    "error_rate": Metric("accuracy", "errors", complement=True, good_when_low=False),
    "refusal_logodds": Metric("log-odds of refusing", "refusal log-odds", unit="nats"),
    "kl": Metric("KL from the aligned model", "KL", unit="nats"),
}


def metric(name: str) -> Metric:
    """Return how `name` is shown; an unknown metric keeps its own name."""
    words = name.replace("_", " ")
    return METRICS.get(name, Metric(words, words, good_when_low=None))


def percent(fraction: float | None) -> str:
    """Return 0.13 as "13.0 %"."""
    return MISSING if fraction is None else f"{100 * fraction:.1f} %"


def percent_range(low: float | None, high: float | None) -> str:
    """Return an interval of fractions as "9.0 to 18.4"."""
    if low is None or high is None:
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}"


def difference(value: float | None, *, unit: str = "pp") -> str:
    """Return a difference: of fractions as "+5.5 pp", of nats as "+0.55"; never "-0.0"."""
    if value is None:
        return MISSING
    return f"{_signed(value, unit)} pp" if unit == "pp" else _signed(value, unit)


def difference_range(low: float | None, high: float | None, *, unit: str = "pp") -> str:
    """Return an interval of differences as "+1.7 to +10.1"."""
    if low is None or high is None:
        return ""
    return f"{_signed(low, unit)} to {_signed(high, unit)}"


def margin(value: float | None, *, unit: str = "pp") -> str:
    """Return a declared margin as "3.0 pp"."""
    return "" if value is None else difference(value, unit=unit).removeprefix("+")


def _signed(value: float, unit: str) -> str:
    scaled, digits = (100 * value, 1) if unit == "pp" else (value, 2)
    return f"{round(scaled, digits) + 0.0:+.{digits}f}"


def probability(p: float | None) -> str:
    """Return a p-value; below 1e-4 it is "<1e-4"."""
    if p is None:
        return MISSING
    return "<1e-4" if p < 1e-4 else f"{p:.4f}"


def number(value: float | None, *, digits: int = 3) -> str:
    """Return a plain number, or a dash."""
    return MISSING if value is None else f"{value:.{digits}f}"


def reason(code: str | None) -> str:
    """Return a reason code in words."""
    return "" if code is None else REASONS.get(code, code.replace("_", " "))


def short_hash(value: str | None) -> str:
    """Return the first 12 digits of a hash."""
    return MISSING if not value else value[:12]
