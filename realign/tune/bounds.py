"""How much worse a repair may be than it looks: one-sided bounds on a paired change.

Here: the bound, and how many prompts a limit needs before it can be shown at all. Not here: which
limits there are (`request`), what is held to them (`measure`, `final`).
"""

from __future__ import annotations

import math

from realign.audit.statistics.intervals import critical_value
from realign.audit.statistics.paired import tango_upper

AS_IT_IS = 0.5
"""The confidence at which a figure is taken as it is."""
GOOD, BAD, OPEN, APART = "0", "1", "?", "/"
"""Marks of answers in one string: unanswered ones are open, clusters stand apart."""


def upper_bound(before: str, after: str, *, confidence: float) -> float:
    """What the rise of the bad share is at most, with this confidence.

    Tango's score limit for paired answers (Statistics in Medicine 17, 1998); where none was
    repaired it is Wilson's limit of the newly bad share, so it is never 0 by luck. Clusters whose
    answers go together count for fewer: the counts are divided by the design effect (Rao and Scott,
    Biometrics 48, 1992). With a few clusters and no change at all that effect cannot be seen.

    Args:
        before: marks of the fine-tune.
        after: marks of the repaired model, in the same order.
        confidence: one-sided, in [0.5, 1).
    """
    changes = [
        [(new == BAD) - (old == BAD) for old, new in zip(one, other, strict=True)]
        for one, other in zip(before.split(APART), after.split(APART), strict=True)
    ]
    flat = [change for cluster in changes for change in cluster]
    rise = sum(flat) / len(flat)
    if confidence <= AS_IT_IS:
        return rise
    effect = _design_effect(changes)
    newly, repaired = (sum(change == sign for change in flat) / effect for sign in (1, -1))
    found = tango_upper([newly], [repaired], [len(flat) / effect], alpha=1.0 - confidence)
    return max(rise, float(found[0]))


def _design_effect(changes: list[list[int]]) -> float:
    """The variance of the mean change by clusters, over that of independent answers; at least 1."""
    n, count = sum(map(len, changes)), len(changes)
    mean = sum(map(sum, changes)) / n
    squares = sum(change * change for each in changes for change in each)
    if count < 2 or squares <= n * mean * mean:
        return 1.0
    alone = (squares / n - mean * mean) / (n - 1)
    together = sum((sum(each) - mean * len(each)) ** 2 for each in changes) / (n * n)
    return min(float(n), max(1.0, together * count / (count - 1) / alone))


def prompts_needed(limit: float, confidence: float) -> int | None:
    """How many prompts can show a limit if not one answer changes; None: no number can."""
    if confidence <= AS_IT_IS:
        return 1
    if limit <= 0:
        return None
    # Without any change the bound is z^2 / (n + z^2).
    z2 = critical_value(1.0 - confidence) ** 2
    return max(1, math.ceil(z2 * (1.0 - limit) / limit - 1e-9))


def smallest_limit(n: int, confidence: float) -> float:
    """The smallest limit that n prompts can show."""
    z2 = 0.0 if confidence <= AS_IT_IS else critical_value(1.0 - confidence) ** 2
    return z2 / (n + z2)
