"""Several comparisons at once: Holm's adjustment, and one decision over several suites.

Adjustment applies to detecting drift. Certifying that every instrument is within its margin needs
none: a claim of all of several statements keeps the error of each (intersection-union).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from realign.audit.statistics.intervals import ALPHA, critical_value
from realign.audit.statistics.paired import mcnemar_one_sided
from realign.errors import UsageError


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjusted p-values, in the order given."""
    m = len(p_values)
    adjusted = [0.0] * m
    highest = 0.0
    for rank, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (m - rank) * p_values[index]))
        adjusted[index] = highest
    return tuple(adjusted)


@dataclass(frozen=True)
class FamilyMember:
    """One suite under one judge: its newly bad and fixed items."""

    suite: str
    judge: str
    b: int
    c: int
    clustered: bool = False
    """Whether items of the suite share clusters, which McNemar-type tests cannot take."""


@dataclass(frozen=True)
class FamilyTest:
    """Three tests of one question: did the candidate get worse anywhere in the family?"""

    pooled_p: float
    max_drop: float | None
    """max (b - c)/sqrt(b + c); None when nothing flipped anywhere."""
    max_drop_p: float
    fisher: float
    """-2 sum ln p, against chi-square with 2 T degrees of freedom."""
    fisher_p: float
    flagged: bool
    """family_drift: any of the three below alpha / 3."""


def family_test(members: Sequence[FamilyMember], *, alpha: float = ALPHA) -> FamilyTest:
    """One decision over suites with disjoint items (arXiv 2602.10144).

    Raises:
        UsageError: no member, a suite given twice (two judges on one suite are not two suites), or
            a suite whose items share clusters.
    """
    from scipy.stats import combine_pvalues  # slow to import: only where it is used

    critical_value(alpha)
    _check_members(members)
    p_values = [mcnemar_one_sided(m.b, m.c) for m in members]
    pooled_p = mcnemar_one_sided(sum(m.b for m in members), sum(m.c for m in members))
    drop, drop_p = max_drop([(m.b, m.c) for m in members])
    combined: Any = combine_pvalues(p_values, method="fisher")  # typed as a bare tuple
    fisher, fisher_p = float(combined.statistic), float(combined.pvalue)
    return FamilyTest(
        pooled_p=pooled_p,
        max_drop=drop,
        max_drop_p=drop_p,
        fisher=fisher,
        fisher_p=fisher_p,
        flagged=min(pooled_p, drop_p, fisher_p) < alpha / 3.0,
    )


def max_drop(flips: Sequence[tuple[int, int]]) -> tuple[float | None, float]:
    """The largest standardised drop over suites, and its exact p-value.

    Under the null b_t ~ Bin(b_t + c_t, 1/2) independently, so p = 1 - prod P(statistic_t < T).
    """
    from scipy.stats import binom  # slow to import: only where it is used

    counted = [(b, b + c) for b, c in flips if b + c > 0]
    if not counted:
        return None, 1.0
    statistic = max((2 * b - n) / math.sqrt(n) for b, n in counted)
    log_none = 0.0
    for _, n in counted:
        # The smallest count that reaches the statistic; the tolerance keeps exact ties.
        possible = (2.0 * np.arange(n + 1) - n) / math.sqrt(n)
        reached = int(np.count_nonzero(possible < statistic - 1e-12))
        tail = float(binom.sf(reached - 1, n, 0.5))
        if tail >= 1.0:
            return statistic, 1.0
        log_none += math.log1p(-tail)
    return statistic, -math.expm1(log_none)


def _check_members(members: Sequence[FamilyMember]) -> None:
    if not members:
        raise UsageError("a family of suites needs at least one member")
    judges: dict[str, str] = {}
    for member in members:
        if member.suite in judges:
            raise UsageError(
                f"suite {member.suite} is in the family twice "
                f"(judges {judges[member.suite]} and {member.judge})",
                "two judges on one suite are not two suites: name one judge per suite",
            )
        judges[member.suite] = member.judge
        if member.clustered:
            raise UsageError(
                f"items of suite {member.suite} share clusters, so its flips are not independent",
                "leave it out of the family; its own verdict uses the clustered test",
            )
