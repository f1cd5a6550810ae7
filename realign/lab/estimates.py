"""From counts to rates with intervals, over clusters and repeats.

A repeat is one family with one fine-tuning seed. An interval is the hull of two: Wilson's score
interval on all answers, with as many answers as the clustering leaves (a design effect), and
Student's t over the repeats, which also covers how much fine-tunes differ. With one repeat only the
first is there, and says nothing about other fine-tunes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from realign.audit.statistics.intervals import ALPHA, critical_value
from realign.lab.marking import Marks


@dataclass(frozen=True)
class Estimate:
    """A rate (or a mean of rates, or a difference) with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int
    """Questions behind it, over all repeats."""
    repeats: int

    def to_json(self) -> dict[str, float | int]:
        """As JSON, fractions to five digits."""
        return {
            "value": round(self.value, 5),
            "low": round(self.low, 5),
            "high": round(self.high, 5),
            "n": self.n,
            "repeats": self.repeats,
        }


def design_effect(marks: Sequence[Marks]) -> float:
    """How much wider than for independent answers the interval must be, squared; at least 1.

    The variance of the mean of clusters around the pooled rate, with G / (G - 1), over p (1 - p)/n.
    1 where all answers agree: nothing can be seen of the clustering then.
    """
    n = sum(each.n for each in marks)
    rate = sum(each.hits for each in marks) / n
    groups = [item for each in marks for item in each.clusters.items()]
    count = sum(times for _, times in groups)
    if rate in (0.0, 1.0) or count < 2:
        return 1.0
    squares = sum(times * (hits - rate * size) ** 2 for (hits, size), times in groups)
    clustered = squares / n**2 * count / (count - 1)
    return max(1.0, clustered / (rate * (1.0 - rate) / n))


def score_interval(rate: float, n: float, *, alpha: float = ALPHA) -> tuple[float, float]:
    """Wilson's interval for a number of answers that need not be whole."""
    z = critical_value(alpha)
    scale = 1.0 + z * z / n
    centre = (rate + z * z / (2.0 * n)) / scale
    half = z * math.sqrt(rate * (1.0 - rate) / n + z * z / (4.0 * n * n)) / scale
    low = 0.0 if rate == 0.0 else max(0.0, centre - half)
    return low, 1.0 if rate == 1.0 else min(1.0, centre + half)


def t_interval(values: Sequence[float], *, alpha: float = ALPHA) -> tuple[float, float] | None:
    """Student's interval for the mean of repeats; None for fewer than two."""
    from scipy.stats import t as student  # slow to import: only where it is used

    count = len(values)
    if count < 2:
        return None
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(student.isf(alpha, count - 1)) * math.sqrt(variance / count)
    return mean - half, mean + half


def estimate_rate(marks: Sequence[Marks]) -> Estimate:
    """One rate over its repeats; every repeat counts alike.

    Args:
        marks: one per repeat, at least one.
    """
    values = [each.rate for each in marks]
    mean, n = sum(values) / len(values), sum(each.n for each in marks)
    low, high = score_interval(mean, n / design_effect(marks))
    over = t_interval(values)
    if over is not None:
        low, high = min(low, max(0.0, over[0])), max(high, min(1.0, over[1]))
    return Estimate(mean, low, high, n, len(values))


def estimate_mean(tasks: Sequence[Sequence[Marks]]) -> Estimate:
    """The mean of several rates, as downstream accuracy is; per task one `Marks` per repeat."""
    each = [estimate_rate(marks) for marks in tasks]
    if len(each) == 1:
        return each[0]
    found = mean_of(each)
    over = t_interval(
        [sum(m.rate for m in repeat) / len(each) for repeat in zip(*tasks, strict=True)]
    )
    if over is None:
        return found
    low, high = min(found.low, max(0.0, over[0])), max(found.high, min(1.0, over[1]))
    return replace(found, low=low, high=high)


def mean_of(each: Sequence[Estimate]) -> Estimate:
    """The mean of rates whose questions are independent: half-widths add in squares.

    Args:
        each: at least one.
    """
    mean = sum(one.value for one in each) / len(each)
    below = math.sqrt(sum((one.value - one.low) ** 2 for one in each)) / len(each)
    above = math.sqrt(sum((one.high - one.value) ** 2 for one in each)) / len(each)
    low, high = max(0.0, mean - below), min(1.0, mean + above)
    return Estimate(mean, low, high, sum(one.n for one in each), min(o.repeats for o in each))
