"""Intervals for one rate, and the record every interval of the audit is written in.

Conventions of the whole package: `alpha` is one-sided (default 0.025), an interval is two-sided at
level 1 - 2 alpha, and every interval is clamped to its legal range and exact at the ends. Intervals
for differences of two models live in `paired` and `resampling`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from realign.errors import UsageError

ALPHA = 0.025

Method = Literal[
    "wilson",
    "clopper_pearson",
    "tango",
    "newcombe10",
    "bootstrap",
    "cluster_bootstrap",
    "normal",
]


@dataclass(frozen=True)
class Interval:
    """A two-sided interval."""

    low: float
    high: float
    level: float
    """Two-sided level as a fraction, 1 - 2 alpha."""
    method: Method

    def within(self, margin: float) -> bool:
        """Non-inferiority: the upper limit does not exceed the margin."""
        return self.high <= margin

    def equivalent(self, margin: float) -> bool:
        """Two one-sided tests: both limits lie within the margin of zero."""
        return self.high <= margin and self.low >= -margin


@lru_cache(maxsize=64)
def critical_value(alpha: float) -> float:
    """The normal quantile z with P(Z > z) = alpha.

    Raises:
        UsageError: alpha is not in (0, 0.5).
    """
    from scipy.stats import norm  # slow to import: only where it is used

    if not 0.0 < alpha < 0.5:
        raise UsageError(
            f"alpha is {alpha}, but it must lie between 0 and 0.5",
            "alpha is one-sided; 0.025 gives 95 % intervals",
        )
    return float(norm.isf(alpha))


def level_of(alpha: float) -> float:
    """The two-sided level of an interval at one-sided alpha, free of binary noise (0.95)."""
    return round(1.0 - 2.0 * alpha, 12)


def wilson(x: int, n: int, *, alpha: float = ALPHA) -> Interval | None:
    """Wilson's score interval for x bad among n (E. B. Wilson 1927); None when n is 0."""
    z = critical_value(alpha)
    if not _counts_ok(x, n):
        return None
    p = x / n
    scale = 1.0 + z * z / n
    centre = (p + z * z / (2.0 * n)) / scale
    half = z * math.sqrt(p * (1.0 - p) / n + z * z / (4.0 * n * n)) / scale
    return Interval(
        low=0.0 if x == 0 else max(0.0, centre - half),
        high=1.0 if x == n else min(1.0, centre + half),
        level=level_of(alpha),
        method="wilson",
    )


def clopper_pearson(x: int, n: int, *, alpha: float = ALPHA) -> Interval | None:
    """The exact interval for x bad among n (Clopper and Pearson 1934); None when n is 0."""
    from scipy.stats import beta  # slow to import: only where it is used

    critical_value(alpha)
    if not _counts_ok(x, n):
        return None
    return Interval(
        low=0.0 if x == 0 else float(beta.ppf(alpha, x, n - x + 1)),
        high=1.0 if x == n else float(beta.ppf(1.0 - alpha, x + 1, n - x)),
        level=level_of(alpha),
        method="clopper_pearson",
    )


def _counts_ok(x: int, n: int) -> bool:
    """Whether there is anything to estimate; impossible counts are our mistake, never a user's."""
    assert 0 <= x <= n, f"x = {x} is not a count among n = {n}"
    return n > 0
