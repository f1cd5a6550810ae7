"""The three verdicts on one comparison against a declared margin.

"No drift found" and "drift is within the margin" are different things: the first may only mean that
the suite was small. So a verdict is one of three, and "not enough data to say" is an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from realign.audit.statistics.evidence import Evidence
from realign.audit.statistics.intervals import Interval
from realign.audit.statistics.paired import tango_within
from realign.audit.statistics.power import MAX_ITEMS, n_needed
from realign.errors import UsageError

VerdictName = Literal["within_margin", "drift", "inconclusive"]
Reason = Literal[
    "invalid_sensitive", "judge_disagreement", "few_clusters", "too_few_items", "underpowered"
]

WORDS: Mapping[VerdictName, str] = MappingProxyType(
    {
        "drift": "drift found",
        "within_margin": "within the declared margin",
        "inconclusive": "not enough data to say",
    }
)

REASON_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "underpowered": "too few items for this margin",
        "invalid_sensitive": "depends on how invalid answers count",
        "judge_disagreement": "the judges disagree",
        "few_clusters": "too few independent groups of items",
        "too_few_items": "fewer than 50 valid items",
    }
)
"""Why a verdict is inconclusive, in words for people."""

MIN_ITEMS = 50
MIN_CLUSTERS = 10
MIN_PLANNED_CHURN = 0.02

NEAR_MARGIN = "n was enough for zero drift: the observed drift lies too near the margin"
NOT_PLANNED = "sample sizes are planned for independent binary pairs only"
OUT_OF_REACH = f"more than {MAX_ITEMS} items"


@dataclass(frozen=True)
class Verdict:
    """A verdict with everything that led to it."""

    verdict: VerdictName
    reason: Reason | None
    """Why it is inconclusive; None otherwise."""
    flags: tuple[str, ...]
    """Of: detectable, equivalent, beyond_margin, few_clusters, within_noise_floor."""
    ci: Interval | None
    ci_secondary: Interval | None
    p: float
    p_adj: float
    margin: float
    n_needed: int | None
    """Items needed to certify zero drift with probability 0.80; only where n fell short."""
    n_needed_reason: str | None
    """Why `n_needed` is missing although the verdict is inconclusive."""

    @property
    def words(self) -> str:
        """The verdict in the words used for people."""
        return WORDS[self.verdict]


def decide(
    evidence: Evidence,
    *,
    margin: float,
    p_adj: float | None = None,
    invalid_sensitive: bool = False,
    judge_disagreement: bool = False,
    self_churn: float | None = None,
) -> Verdict:
    """Put evidence to a margin.

    The upper limit within the margin certifies; an adjusted p-value at most alpha detects; neither
    is "not enough data to say". What undermines the evidence then makes it inconclusive.

    Args:
        evidence: the comparison.
        margin: largest accepted worsening, in the metric's unit (a fraction for rates); declared
            before the run.
        p_adj: detection p-value adjusted within its family (Holm); None for a family of one.
        invalid_sensitive: the verdict depends on how invalid responses are counted
            (`verdicts_differ`).
        judge_disagreement: primary and secondary judge contradict each other (`judges_disagree`).
        self_churn: churn of the reference against itself, where it was measured.

    Raises:
        UsageError: the margin is not positive, or not below 1 for rates.
    """
    _check_margin(evidence, margin)
    alpha = evidence.alpha
    p_adj = evidence.p if p_adj is None else p_adj
    assert evidence.p <= p_adj <= 1.0, f"adjusted p {p_adj} below the p {evidence.p} it adjusts"

    detected = p_adj <= alpha
    reason: Reason | None = None
    if _certified(evidence, margin):
        verdict: VerdictName = "within_margin"
    elif detected:
        verdict = "drift"
    else:
        verdict, reason = "inconclusive", "underpowered"
    flags = _flags(evidence, verdict=verdict, margin=margin, detected=detected)
    if verdict == "drift" and self_churn is not None and (evidence.churn or 0.0) <= self_churn:
        flags.append("within_noise_floor")

    few_clusters = evidence.n_clusters is not None and evidence.n_clusters < MIN_CLUSTERS
    if few_clusters:
        flags.append("few_clusters")
    downgrades: tuple[tuple[bool, Reason], ...] = (
        (invalid_sensitive, "invalid_sensitive"),
        (judge_disagreement, "judge_disagreement"),
        (few_clusters, "few_clusters"),
        (evidence.n < MIN_ITEMS, "too_few_items"),
    )
    for applies, why in downgrades:
        if applies:
            verdict, reason = "inconclusive", why
            break

    needed, needed_reason = None, None
    if verdict == "inconclusive":
        needed, needed_reason = _needed(evidence, margin)
    return Verdict(
        verdict=verdict,
        reason=reason,
        flags=tuple(flags),
        ci=evidence.ci,
        ci_secondary=evidence.ci_secondary,
        p=evidence.p,
        p_adj=p_adj,
        margin=margin,
        n_needed=needed,
        n_needed_reason=needed_reason,
    )


def verdicts_differ(verdicts: Iterable[VerdictName]) -> bool:
    """Whether the treatments of invalid responses lead to different verdicts."""
    return len(set(verdicts)) > 1


def judges_disagree(primary: VerdictName, secondary: VerdictName) -> bool:
    """Whether one judge finds drift where the other certifies the margin."""
    return {primary, secondary} == {"drift", "within_margin"}


def _certified(evidence: Evidence, margin: float) -> bool:
    if evidence.ci is None:
        return False
    if evidence.table is not None and evidence.independent_pairs:
        # T(margin) <= -z is the same statement as U <= margin, without the root's rounding.
        table = evidence.table
        return bool(
            tango_within(table.b, table.c, table.n, margin=margin, alpha=evidence.alpha).item()
        )
    return evidence.ci.within(margin)


def _flags(evidence: Evidence, *, verdict: VerdictName, margin: float, detected: bool) -> list[str]:
    if evidence.ci is None:
        return []
    flags: list[str] = []
    if verdict == "within_margin" and detected:
        flags.append("detectable")
    if verdict == "within_margin" and evidence.ci.low >= -margin:
        flags.append("equivalent")
    if verdict == "drift" and evidence.ci.low > margin:
        flags.append("beyond_margin")
    return flags


def _needed(evidence: Evidence, margin: float) -> tuple[int | None, str | None]:
    if not evidence.independent_pairs:
        return None, NOT_PLANNED
    churn = max(evidence.churn or 0.0, MIN_PLANNED_CHURN)
    needed = n_needed(margin=margin, churn=churn, alpha=evidence.alpha)
    if needed is None:
        return None, OUT_OF_REACH
    return (needed, None) if needed > evidence.n else (None, NEAR_MARGIN)


def _check_margin(evidence: Evidence, margin: float) -> None:
    highest = 1.0 if evidence.table is not None else float("inf")
    if not 0.0 < margin < highest:
        raise UsageError(
            f"margin is {margin}, but it must be above 0"
            + (" and below 1" if evidence.table is not None else ""),
            "margins are fractions, not percent: 0.03 is three percentage points"
            if evidence.table is not None
            else "",
        )
