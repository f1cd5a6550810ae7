"""What n items can detect and certify: exact power, smallest effect, certifiable margin, n needed.

Detecting rests on McNemar's test, certifying on Tango's upper limit. Both are enumerated exactly.
Counts are discrete, so certification is not monotone in n: quote the tables, do not interpolate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from realign.audit.statistics.intervals import ALPHA, critical_value
from realign.audit.statistics.paired import tango_within

POWER = 0.80
MAX_ITEMS = 100_000
_STEP, _FIRST = 10, 50  # sample sizes are quoted in tens, from 50 on
_TAIL = 1e-13
PLANNED_C_RATES = (0.01, 0.02, 0.05)
PLANNED_CHURNS = (0.02, 0.04, 0.08)


def rejection_counts(n: int, *, alpha: float = ALPHA) -> NDArray[np.int64]:
    """For m = 0..n flips, the smallest k with P(Bin(m, 1/2) >= k) <= alpha; above m if none."""
    from scipy.stats import binom  # slow to import: only where it is used

    return binom.isf(alpha, np.arange(n + 1), 0.5).astype(np.int64) + 1


def mcnemar_power(n: int, *, drift: float, c_rate: float, alpha: float = ALPHA) -> float:
    """Exact unconditional power of the one-sided McNemar test.

    Args:
        n: items.
        drift: true D = b-rate - c-rate.
        c_rate: share of items fixed.
        alpha: one-sided error.
    """
    from scipy.stats import binom  # slow to import: only where it is used

    b_rate = c_rate + drift
    churn = b_rate + c_rate
    assert min(b_rate, c_rate) >= 0.0 and churn <= 1.0 + 1e-12, f"rates {b_rate}, {c_rate}"
    if churn == 0.0:
        return 0.0
    flips = np.arange(n + 1)
    reject = binom.sf(rejection_counts(n, alpha=alpha) - 1, flips, b_rate / churn)
    return float(np.sum(binom.pmf(flips, n, min(churn, 1.0)) * reject))


def minimum_detectable_effect(
    n: int, *, c_rate: float, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """The smallest true D found with the wanted power; None when no D reaches it."""
    from scipy.optimize import root_scalar  # slow to import: only where it is used

    highest = 1.0 - 2.0 * c_rate

    def shortfall(drift: float) -> float:
        return mcnemar_power(n, drift=drift, c_rate=c_rate, alpha=alpha) - power

    if shortfall(highest) < 0.0:
        return None
    return float(root_scalar(shortfall, bracket=(0.0, highest), method="brentq", xtol=1e-9).root)


def detection_n_quick(
    *, drift: float, churn: float, alpha: float = ALPHA, power: float = POWER
) -> float:
    """The textbook normal approximation of the n that detects D with the wanted power."""
    from scipy.stats import norm  # slow to import: only where it is used

    z = critical_value(alpha) * math.sqrt(churn)
    z += float(norm.ppf(power)) * math.sqrt(churn - drift**2)
    return (z / drift) ** 2


def detection_n(
    *, drift: float, churn: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """The smallest multiple of 10 (at least 50) whose exact power reaches the wanted one."""
    c_rate = (churn - drift) / 2.0
    quick = detection_n_quick(drift=drift, churn=churn, alpha=alpha, power=power)
    for n in _candidates(quick):
        if mcnemar_power(n, drift=drift, c_rate=c_rate, alpha=alpha) >= power:
            return n
    return None


def certification_probability(
    n: int, *, margin: float, churn: float, drift: float = 0.0, alpha: float = ALPHA
) -> float:
    """Exact P(Tango's upper limit <= margin) when b- and c-rate are (churn +- drift)/2.

    At drift = margin this is the error of certifying, at drift = 0 the chance to certify.
    """
    from scipy.stats import binom  # slow to import: only where it is used

    b_rate, c_rate = (churn + drift) / 2.0, (churn - drift) / 2.0
    assert min(b_rate, c_rate) > -1e-12 and churn <= 1.0, f"rates {b_rate}, {c_rate}"
    b_rate, c_rate = max(b_rate, 0.0), max(c_rate, 0.0)
    fixed = np.arange(
        int(binom.ppf(_TAIL, n, c_rate)) if c_rate else 0,
        (int(binom.isf(_TAIL, n, c_rate)) if c_rate else 0) + 1,
    )
    allowed = certified_counts(n, fixed, margin=margin, alpha=alpha)
    # Given c, the newly bad items are binomial among the others.
    share = b_rate / (1.0 - c_rate)
    certified = binom.cdf(allowed, n - fixed, share)
    return float(np.sum(binom.pmf(fixed, n, c_rate) * certified))


def certified_counts(
    n: int, fixed: NDArray[np.int64], *, margin: float, alpha: float = ALPHA
) -> NDArray[np.int64]:
    """For each c, the largest b whose upper limit is within the margin; -1 where there is none.

    The limit rises with b, so the count is found by bisection on integers.
    """
    low = np.full(fixed.shape, -1, dtype=np.int64)
    high = n - fixed + 1
    while np.any(high - low > 1):
        middle = np.maximum((low + high) // 2, 0)
        inside = tango_within(middle, fixed, n, margin=margin, alpha=alpha)
        inside &= middle < high  # a finished entry stays where it is
        low = np.where(inside, np.maximum(middle, low), low)
        high = np.where(inside, high, np.minimum(middle, high))
    return low


@lru_cache(maxsize=1024)
def n_needed(
    *, margin: float, churn: float, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """The smallest multiple of 10, at least 50, that certifies zero drift with the wanted power.

    None when more than `MAX_ITEMS` are needed. Depends on the margin and the churn only, because
    Tango's limits do not depend on the comparator's rate.
    """
    from scipy.stats import norm  # slow to import: only where it is used

    z = critical_value(alpha) + float(norm.ppf(power))
    for n in _candidates(churn * (z / margin) ** 2):
        if certification_probability(n, margin=margin, churn=churn, alpha=alpha) >= power:
            return n
    return None


def certifiable_margin(
    n: int, *, churn: float, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """The smallest margin, in steps of 0.1 percentage points, certified with the wanted power.

    At zero drift; None when even 99.9 points cannot be certified.
    """
    low, high = 0, 1000  # thousandths; a wider margin never certifies less
    while high - low > 1:
        middle = (low + high) // 2
        chance = certification_probability(n, margin=middle / 1000, churn=churn, alpha=alpha)
        low, high = (low, middle) if chance >= power else (middle, high)
    return high / 1000 if high < 1000 else None


@dataclass(frozen=True)
class Plan:
    """What an instrument of n items can show, computed before anything runs."""

    n: int
    margin: float
    alpha: float
    detectable: tuple[tuple[float, float | None], ...]
    """(c-rate, smallest drift detected with power 0.80) for a few c-rates."""
    certification: tuple[tuple[float, float], ...]
    """(churn, probability that zero drift is certified at the margin)."""
    certifiable: tuple[tuple[float, float | None], ...]
    """(churn, smallest margin certified with probability 0.80 at zero drift)."""
    needed: tuple[tuple[float, int | None], ...]
    """(churn, items needed to certify the margin with probability 0.80 at zero drift)."""


def plan(
    n: int,
    *,
    margin: float,
    alpha: float = ALPHA,
    c_rates: Sequence[float] = PLANNED_C_RATES,
    churns: Sequence[float] = PLANNED_CHURNS,
) -> Plan:
    """The planning tables of one instrument for its declared margin."""
    return Plan(
        n=n,
        margin=margin,
        alpha=alpha,
        detectable=tuple(
            (rate, minimum_detectable_effect(n, c_rate=rate, alpha=alpha)) for rate in c_rates
        ),
        certification=tuple(
            (churn, certification_probability(n, margin=margin, churn=churn, alpha=alpha))
            for churn in churns
        ),
        certifiable=tuple(
            (churn, certifiable_margin(n, churn=churn, alpha=alpha)) for churn in churns
        ),
        needed=tuple(
            (churn, n_needed(margin=margin, churn=churn, alpha=alpha)) for churn in churns
        ),
    )


def _candidates(approximate: float) -> range:
    """Sample sizes to try, from below the normal approximation.

    The exact answer was never under 0.98 of it over a wide grid, which a slow test repeats.
    """
    first = max(_FIRST, int(0.9 * approximate) // _STEP * _STEP)
    return range(first, MAX_ITEMS + 1, _STEP)
