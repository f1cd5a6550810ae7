"""Two models' columns of one metric side by side, and what they show.

Four comparisons of three models: drift, residual, recovery and tax. Safety is compared with the
reference, utility with the subject: a repair must be as safe as the reference and as skilled as the
fine-tune. A positive difference is always a change for the worse. Verdicts come in `comparisons`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from realign.audit.instruments import check_comparable
from realign.audit.outcomes import Outcome, Scores
from realign.audit.rates import hull
from realign.audit.schema import (
    ComparisonName,
    Role,
)
from realign.audit.statistics.evidence import (
    TREATMENTS,
    Evidence,
    Treatment,
    treat_invalid,
    weigh_differences,
    weigh_pairs,
)
from realign.audit.statistics.intervals import ALPHA
from realign.audit.statistics.paired import tango_interval
from realign.audit.statistics.resampling import comparison_seed

# comparison -> (comparator, candidate)
COMPARISONS: dict[ComparisonName, tuple[Role, Role]] = {
    "drift": ("reference", "subject"),
    "residual": ("reference", "repaired"),
    "recovery": ("subject", "repaired"),
    "tax": ("subject", "repaired"),
}

Key = tuple[str, str, str]
"""Suite, judge, metric."""


@dataclass(frozen=True)
class Pairing:
    """One comparison of one metric: the two columns and what they show, per treatment."""

    name: ComparisonName
    comparator: Outcome | Scores
    candidate: Outcome | Scores
    evidence: Mapping[Treatment, Evidence]

    @property
    def headline(self) -> Evidence:
        """The evidence with invalid answers excluded."""
        return self.evidence["excluded"]

    @property
    def key(self) -> Key:
        """Suite, judge and metric."""
        return key_of(self.comparator)


def key_of(column: Outcome | Scores) -> Key:
    """Suite, judge and metric of a column."""
    metric = column.metric if isinstance(column, Scores) else column.metric.name
    return column.instrument.suite.name, column.instrument.judge.name, metric


def applies(name: ComparisonName, *, suite_kind: str) -> bool:
    """Whether a comparison is made on a kind of suite.

    Recovery asks what a repair changed on harmful prompts; tax asks the same where a repair costs:
    on safe prompts and tasks.
    """
    if name in ("recovery", "tax"):
        return (suite_kind == "harmful") == (name == "recovery")
    return True


def pair_columns(
    name: ComparisonName,
    comparator: Outcome | Scores,
    candidate: Outcome | Scores,
    *,
    run_seed: int,
    alpha: float = ALPHA,
) -> Pairing:
    """Weigh two models' columns of one metric.

    Raises:
        UsageError: if they come from different instruments.
    """
    check_comparable(comparator.instrument, candidate.instrument)
    seed = comparison_seed(comparator.instrument.instrument_id, name, run_seed)
    evidence: dict[Treatment, Evidence] = {}
    if isinstance(comparator, Outcome) and isinstance(candidate, Outcome):
        for treatment in TREATMENTS:
            kept, first, second = treat_invalid(
                comparator.values, candidate.values, treatment=treatment
            )
            clusters = comparator.clusters
            weighed = weigh_pairs(
                first, second, seed=seed, clusters=[clusters[i] for i in kept], alpha=alpha
            )
            evidence[treatment] = _never_narrower(weighed)
            if None not in comparator.values and None not in candidate.values:
                evidence = dict.fromkeys(TREATMENTS, evidence["excluded"])
                break
    else:
        assert isinstance(comparator, Scores) and isinstance(candidate, Scores)
        both = [
            (x, y, cluster)
            for x, y, cluster in zip(
                comparator.values, candidate.values, comparator.clusters, strict=True
            )
            if x is not None and y is not None
        ]
        evidence = dict.fromkeys(
            TREATMENTS,
            weigh_differences(
                [y - x for x, y, _ in both],
                seed=seed,
                clusters=[cluster for *_, cluster in both],
                alpha=alpha,
            ),
        )
    return Pairing(name=name, comparator=comparator, candidate=candidate, evidence=evidence)


def _never_narrower(evidence: Evidence) -> Evidence:
    """Clustered pairs get at least the interval that independent pairs would have.

    Without a single flip every resample is zero and the bootstrap would certify any margin, however
    few items there are; zero flips are not equivalence.
    """
    table = evidence.table
    if table is None or evidence.n_clusters is None:
        return evidence
    plain = tango_interval(table.b, table.c, table.n, alpha=evidence.alpha)
    return replace(evidence, ci=hull(evidence.ci, plain))


def pair_all(
    columns: Mapping[Key, Mapping[Role, Outcome | Scores]],
    *,
    run_seed: int,
    alpha: float = ALPHA,
) -> list[Pairing]:
    """Every comparison that the roles present allow."""
    pairings: list[Pairing] = []
    for by_role in columns.values():
        for name, (first, second) in COMPARISONS.items():
            if first not in by_role or second not in by_role:
                continue
            comparator, candidate = by_role[first], by_role[second]
            if applies(name, suite_kind=comparator.instrument.suite.kind):
                pairings.append(
                    pair_columns(name, comparator, candidate, run_seed=run_seed, alpha=alpha)
                )
    return pairings
