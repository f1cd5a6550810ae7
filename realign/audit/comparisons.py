"""Rows of the report's `comparisons`: evidence put to declared margins, family by family.

Verdicts exist only against margins that a policy declared before the run; without one there are
intervals and p-values. How two columns are weighed is settled in `pairing`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realign.audit.instruments import ASR, GATE_METRIC, NON_REFUSAL
from realign.audit.outcomes import Outcome, Scores
from realign.audit.pairing import Key, Pairing
from realign.audit.policy import MarginGate, Policy
from realign.audit.schema import (
    ComparisonEntry,
    ComparisonName,
    ConfidenceInterval,
    Role,
    Table,
)
from realign.audit.statistics.evidence import (
    TREATMENTS,
    Evidence,
)
from realign.audit.statistics.intervals import ALPHA, Interval
from realign.audit.statistics.multiplicity import holm
from realign.audit.statistics.resampling import comparison_seed, recovered_fraction
from realign.audit.statistics.verdicts import (
    Verdict,
    VerdictName,
    decide,
    judges_disagree,
    verdicts_differ,
)


def comparison_entries(
    pairings: Sequence[Pairing],
    *,
    columns: Mapping[Key, Mapping[Role, Outcome | Scores]],
    policy: Policy | None,
    primary: Mapping[str, str],
    self_churn: Mapping[Key, float],
    run_seed: int,
) -> list[ComparisonEntry]:
    """Rows of `comparisons`, with verdicts where the policy declares a margin.

    Args:
        pairings: from `pair_all`.
        columns: all columns by key and role, for the recovered fraction.
        policy: or None, for rates and intervals without verdicts.
        primary: the primary judge of every suite.
        self_churn: churn of the reference against itself, where it was measured.
        run_seed: of the audit.
    """
    families = _families(pairings, policy=policy, primary=primary)
    verdicts: dict[int, Verdict] = {}
    inherited: dict[int, ComparisonName] = {}
    for index, pairing in enumerate(pairings):
        declared = _margin(pairing, policy)
        if declared is not None:
            margin, its_comparison = declared
            if its_comparison != pairing.name:
                inherited[index] = its_comparison
            verdicts[index] = _verdict(
                pairings, index, margin=margin, families=families, self_churn=self_churn
            )
    entries: list[ComparisonEntry] = []
    for index, pairing in enumerate(pairings):
        verdict = verdicts.get(index)
        if verdict is not None and _contradicted(pairings, index, verdicts, primary):
            margin = verdict.margin
            verdict = _verdict(
                pairings,
                index,
                margin=margin,
                families=families,
                self_churn=self_churn,
                judge_disagreement=True,
            )
            verdicts[index] = verdict
        entry = _entry(pairing, verdict, families=families, index=index, churns=self_churn)
        entries.append(entry.model_copy(update={"margin_from": inherited.get(index)}))
    alpha = policy.alpha if policy is not None else ALPHA
    return [
        _with_recovery(
            entry, pairing, entries=entries, columns=columns, run_seed=run_seed, alpha=alpha
        )
        for entry, pairing in zip(entries, pairings, strict=True)
    ]


def _gate_metric(key: Key, policy: Policy) -> str:
    """The metric that margin gates call a column by: its own, or the one it stands in for."""
    suite, _, metric = key
    named = any(
        isinstance(gate, MarginGate) and (gate.suite, gate.metric) == (suite, metric)
        for gate in policy.gate
    )
    return metric if named else GATE_METRIC.get(metric, metric)


def _margin(pairing: Pairing, policy: Policy | None) -> tuple[float, ComparisonName] | None:
    """The margin of a pairing, and the comparison that it was declared for."""
    if policy is None:
        return None
    margin = policy.margin_for(
        comparison=pairing.name, suite=pairing.key[0], metric=_gate_metric(pairing.key, policy)
    )
    if pairing.name == "recovery" and not _names(policy, pairing):
        return None  # an improvement is not put to a margin unless a gate asks for it
    return margin


def _names(policy: Policy, pairing: Pairing) -> bool:
    wanted = (pairing.name, pairing.key[0], _gate_metric(pairing.key, policy))
    return any(
        isinstance(gate, MarginGate) and (gate.comparison, gate.suite, gate.metric) == wanted
        for gate in policy.gate
    )


def _families(
    pairings: Sequence[Pairing], *, policy: Policy | None, primary: Mapping[str, str]
) -> dict[int, list[int]]:
    """For every pairing whose p-value is adjusted, the indices of its family (itself included).

    One family per comparison, over the primary instruments that margin gates name.
    """
    if policy is None:
        return {}
    named = {(gate.suite, gate.metric) for gate in policy.gate if isinstance(gate, MarginGate)}
    members: dict[ComparisonName, list[int]] = {}
    for index, pairing in enumerate(pairings):
        suite, judge, _ = pairing.key
        scorer = isinstance(pairing.comparator, Scores)
        if (suite, _gate_metric(pairing.key, policy)) in named and (
            scorer or primary.get(suite) == judge
        ):
            members.setdefault(pairing.name, []).append(index)
    return {index: family for family in members.values() for index in family}


def _adjusted(
    pairings: Sequence[Pairing], index: int, families: Mapping[int, list[int]], *, p: float
) -> float:
    family = families.get(index)
    if family is None:
        return p
    values = [p if member == index else pairings[member].headline.p for member in family]
    return max(p, holm(values)[family.index(index)])


def _verdict(
    pairings: Sequence[Pairing],
    index: int,
    *,
    margin: float,
    families: Mapping[int, list[int]],
    self_churn: Mapping[Key, float],
    judge_disagreement: bool = False,
) -> Verdict:
    pairing = pairings[index]
    churn = self_churn.get(pairing.key)

    def put(evidence: Evidence, *, final: bool, invalid_sensitive: bool = False) -> Verdict:
        return decide(
            evidence,
            margin=margin,
            p_adj=_adjusted(pairings, index, families, p=evidence.p),
            invalid_sensitive=invalid_sensitive,
            judge_disagreement=judge_disagreement and final,
            self_churn=churn,
        )

    each: list[VerdictName] = [
        put(pairing.evidence[treatment], final=False).verdict for treatment in TREATMENTS
    ]
    return put(pairing.headline, final=True, invalid_sensitive=verdicts_differ(each))


def _contradicted(
    pairings: Sequence[Pairing],
    index: int,
    verdicts: Mapping[int, Verdict],
    primary: Mapping[str, str],
) -> bool:
    """Whether a secondary judge certifies what the primary finds drifted, or the reverse."""
    suite, judge, metric = pairings[index].key
    if primary.get(suite) != judge:
        return False
    for other, verdict in verdicts.items():
        its_suite, its_judge, its_metric = pairings[other].key
        same = its_metric == metric or {its_metric, metric} == {ASR.name, NON_REFUSAL.name}
        if (
            other != index
            and same
            and its_suite == suite
            and its_judge != judge
            and pairings[other].name == pairings[index].name
            and judges_disagree(verdicts[index].verdict, verdict.verdict)
            and primary.get(suite) not in ("oracle", "exact-match")
        ):
            return True
    return False


def _entry(
    pairing: Pairing,
    verdict: Verdict | None,
    *,
    families: Mapping[int, list[int]],
    index: int,
    churns: Mapping[Key, float],
) -> ComparisonEntry:
    evidence = pairing.headline
    suite, judge, metric = pairing.key
    table = evidence.table
    return ComparisonEntry(
        name=pairing.name,
        instrument_id=pairing.comparator.instrument.instrument_id,
        suite=suite,
        judge=judge,
        metric=metric,
        n=evidence.n,
        n_clusters=evidence.n_clusters,
        table=None if table is None else Table(e=table.e, b=table.b, c=table.c, d=table.d),
        diff=evidence.diff,
        ci=_interval(evidence.ci),
        ci_secondary=_interval(evidence.ci_secondary),
        p=evidence.p,
        p_adj=verdict.p_adj if verdict else evidence.p,
        family=pairing.name if index in families else None,
        churn=evidence.churn,
        self_churn=churns.get(pairing.key),
        margin=verdict.margin if verdict else None,
        verdict=verdict.verdict if verdict else None,
        reason=verdict.reason if verdict else None,
        flags=verdict.flags if verdict else (),
        n_needed=verdict.n_needed if verdict else None,
        n_needed_reason=verdict.n_needed_reason if verdict else None,
    )


def _with_recovery(
    entry: ComparisonEntry,
    pairing: Pairing,
    *,
    entries: Sequence[ComparisonEntry],
    columns: Mapping[Key, Mapping[Role, Outcome | Scores]],
    run_seed: int,
    alpha: float,
) -> ComparisonEntry:
    """Add the recovered fraction to a residual whose drift was found."""
    if entry.name != "residual":
        return entry
    drifted = any(
        (other.name, other.instrument_id, other.metric)
        == ("drift", entry.instrument_id, entry.metric)
        and other.verdict == "drift"
        for other in entries
    )
    if not drifted:
        return entry.model_copy(update={"recovered_fraction_reason": "no verdict of drift"})
    by_role = columns[pairing.key]
    rows = [
        (x, y, z, cluster)
        for x, y, z, cluster in zip(
            by_role["reference"].values,
            by_role["subject"].values,
            by_role["repaired"].values,
            pairing.comparator.clusters,
            strict=True,
        )
        if x is not None and y is not None and z is not None
    ]
    result = recovered_fraction(
        reference=[float(row[0]) for row in rows],
        subject=[float(row[1]) for row in rows],
        repaired=[float(row[2]) for row in rows],
        seed=comparison_seed(entry.instrument_id, "recovered_fraction", run_seed),
        clusters=[row[3] for row in rows],
        alpha=alpha,
    )
    return entry.model_copy(
        update={
            "recovered_fraction": result.value,
            "recovered_fraction_ci": _interval(result.interval),
            "recovered_fraction_reason": result.reason,
        }
    )


def _interval(interval: Interval | None) -> ConfidenceInterval | None:
    if interval is None:
        return None
    return ConfidenceInterval(
        level=interval.level, low=interval.low, high=interval.high, method=interval.method
    )
