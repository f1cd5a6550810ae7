"""Two models on the same items: the paired table, McNemar's test, Tango's and Newcombe's intervals.

Tango's score interval decides every verdict on independent binary pairs; Newcombe's is shown beside
it and decides nothing. Clustered and continuous differences live in `resampling`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realign.audit.statistics.intervals import (
    ALPHA,
    Interval,
    critical_value,
    level_of,
    wilson,
)
from realign.errors import UsageError

HALVINGS = 60  # of an interval at most 2 wide: below the spacing of doubles


@dataclass(frozen=True)
class PairedTable:
    """Counts of a comparator (A) and a candidate (B) on the n items valid for both."""

    e: int
    """Both bad."""
    b: int
    """Newly bad: A ok, B bad."""
    c: int
    """Fixed: A bad, B ok."""
    d: int
    """Both ok."""

    def __post_init__(self) -> None:
        assert min(self.e, self.b, self.c, self.d) >= 0, f"negative count in {self}"

    @classmethod
    def from_items(cls, comparator: Sequence[bool], candidate: Sequence[bool]) -> PairedTable:
        """Count per-item verdicts (True: bad) given in the same item order."""
        pairs = list(zip(comparator, candidate, strict=True))
        return cls(
            e=sum(1 for a, b in pairs if a and b),
            b=sum(1 for a, b in pairs if b and not a),
            c=sum(1 for a, b in pairs if a and not b),
            d=sum(1 for a, b in pairs if not a and not b),
        )

    @property
    def n(self) -> int:
        """Items valid for both models."""
        return self.e + self.b + self.c + self.d

    @property
    def diff(self) -> float | None:
        """Net drift (b - c)/n, positive when the candidate is worse; None when n is 0."""
        return (self.b - self.c) / self.n if self.n else None

    @property
    def churn(self) -> float | None:
        """Share of items whose verdict flipped, (b + c)/n; None when n is 0."""
        return (self.b + self.c) / self.n if self.n else None

    @property
    def comparator_rate(self) -> float | None:
        """Bad rate of the comparator on these items."""
        return (self.e + self.c) / self.n if self.n else None

    @property
    def candidate_rate(self) -> float | None:
        """Bad rate of the candidate on these items."""
        return (self.e + self.b) / self.n if self.n else None


def clusters_repeat(clusters: Sequence[Hashable | None] | None) -> bool:
    """Whether any two items share a cluster; None as an entry means a cluster of its own."""
    if clusters is None:
        return False
    named = [name for name in clusters if name is not None]
    return len(set(named)) < len(named)


def mcnemar_one_sided(
    b: int,
    c: int,
    *,
    mid_p: bool = False,
    clusters: Sequence[Hashable | None] | None = None,
) -> float:
    """Exact one-sided McNemar test: P[Bin(b + c, 1/2) >= b] (arXiv 2602.10144).

    Args:
        b: newly bad items.
        c: fixed items.
        mid_p: subtract half the probability of b itself (less conservative; never the default).
        clusters: the items' clusters, where known, to be refused when they repeat.

    Returns:
        The p-value; small means evidence that the candidate is worse. 1 when nothing flipped.

    Raises:
        UsageError: items share clusters, so the pairs are not independent.
    """
    from scipy.stats import binom  # slow to import: only where it is used

    if clusters_repeat(clusters):
        raise UsageError(
            "McNemar's test treats pairs as independent, but items share clusters",
            "use the sign-flip test over clusters instead",
        )
    p = float(binom.sf(b - 1, b + c, 0.5))
    return p - 0.5 * float(binom.pmf(b, b + c, 0.5)) if mid_p else p


def tango_q(b: ArrayLike, c: ArrayLike, n: ArrayLike, h: ArrayLike) -> NDArray[np.float64]:
    """The maximum-likelihood P(fixed) under a true difference h (Tango 1998).

    All arguments broadcast. With P(newly bad) = q + h it is the larger root of
    2n q^2 + [(2n - b + c) h - (b + c)] q - c h (1 - h) = 0, kept in its legal range.
    """
    b, c, n, h = _floats(b, c, n, h)
    quadratic = 2.0 * n
    linear = (2.0 * n - b + c) * h - (b + c)
    constant = -c * h * (1.0 - h)
    root = np.sqrt(np.maximum(linear * linear - 4.0 * quadratic * constant, 0.0))
    # The two forms are equal; each is used where it does not subtract near-equal numbers.
    positive = linear > 0.0
    q = np.where(
        positive,
        -2.0 * constant / np.where(positive, linear + root, 1.0),
        (root - linear) / (2.0 * quadratic),
    )
    return np.clip(q, np.maximum(0.0, -h), (1.0 - h) / 2.0)


def tango_statistic(b: ArrayLike, c: ArrayLike, n: ArrayLike, h: ArrayLike) -> NDArray[np.float64]:
    """Tango's score statistic T(h); strictly decreasing in h. All arguments broadcast.

    Where the variance vanishes T is 0 if the numerator is 0, else infinite with its sign.
    """
    q = tango_q(b, c, n, h)
    b, c, n, h = _floats(b, c, n, h)
    numerator = np.broadcast_to(b - c - n * h, q.shape)
    variance = np.broadcast_to(n * (2.0 * q + h * (1.0 - h)), q.shape)
    flat = variance <= 0.0
    limit = np.where(numerator == 0.0, 0.0, np.copysign(np.inf, numerator))
    return np.where(flat, limit, numerator / np.sqrt(np.where(flat, 1.0, variance)))


def tango_upper(
    b: ArrayLike, c: ArrayLike, n: ArrayLike, *, alpha: float = ALPHA
) -> NDArray[np.float64]:
    """The upper limit of Tango's interval for arrays of tables (n > 0).

    Bisection that keeps T <= -z at the end it returns, so that `upper <= m` and
    `tango_within(margin=m)` agree.
    """
    z = critical_value(alpha)
    b, c, n = np.broadcast_arrays(*_floats(b, c, n))
    low, high = (b - c) / n, np.ones(b.shape)
    for _ in range(HALVINGS):
        middle = 0.5 * (low + high)
        beyond = tango_statistic(b, c, n, middle) <= -z
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return high


def tango_interval(b: int, c: int, n: int, *, alpha: float = ALPHA) -> Interval | None:
    """Tango's score interval for the paired difference (Statistics in Medicine 17, 1998).

    Depends on the flips and n only. Exact at the ends: b = n gives high = 1, c = n gives low = -1.
    None when n is 0.
    """
    assert min(b, c) >= 0 and b + c <= n, f"{b} + {c} flips among {n} items"
    if n == 0:
        return None
    # Swapping the models mirrors the interval, so both limits are upper limits.
    high, mirrored = tango_upper([b, c], [c, b], n, alpha=alpha).tolist()
    return Interval(low=-mirrored, high=high, level=level_of(alpha), method="tango")


def tango_within(
    b: ArrayLike, c: ArrayLike, n: ArrayLike, *, margin: ArrayLike, alpha: float = ALPHA
) -> NDArray[np.bool_]:
    """Whether the upper limit is at most the margin, decided without a root: T(margin) <= -z."""
    return tango_statistic(b, c, n, margin) <= -critical_value(alpha)


def newcombe_phi(table: PairedTable) -> float:
    """The continuity-corrected correlation of Newcombe's method 10; 0 where a margin is empty."""
    e, b, c, d = table.e, table.b, table.c, table.d
    product = (e + b) * (c + d) * (e + c) * (b + d)
    if product == 0:
        return 0.0
    numerator = float(e * d - b * c)
    if numerator > 0.0:
        numerator = max(numerator - table.n / 2.0, 0.0)
    return numerator / math.sqrt(product)


def newcombe10(table: PairedTable, *, alpha: float = ALPHA) -> Interval | None:
    """Newcombe's interval for the paired difference, method 10 (Statistics in Medicine 17, 1998).

    Shown beside Tango's; never used for a verdict. None when n is 0.
    """
    n = table.n
    candidate = wilson(table.e + table.b, n, alpha=alpha)
    comparator = wilson(table.e + table.c, n, alpha=alpha)
    if candidate is None or comparator is None:
        return None
    p1, p2, phi = (table.e + table.b) / n, (table.e + table.c) / n, newcombe_phi(table)
    diff = (table.b - table.c) / n
    below, above = p1 - candidate.low, comparator.high - p2
    low = diff - math.sqrt(max(below**2 - 2.0 * phi * below * above + above**2, 0.0))
    above, below = candidate.high - p1, p2 - comparator.low
    high = diff + math.sqrt(max(above**2 - 2.0 * phi * above * below + below**2, 0.0))
    return Interval(
        low=max(low, -1.0), high=min(high, 1.0), level=level_of(alpha), method="newcombe10"
    )


def _floats(*values: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    return tuple(np.asarray(value, dtype=np.float64) for value in values)
