"""Rates of single models: intervals, the three treatments of invalid answers, templates, means.

Comparisons of two models are made in `comparisons`; nothing here decides anything.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from realign.audit.canonical import sha256_text
from realign.audit.instruments import ASR, NON_REFUSAL
from realign.audit.outcomes import Outcome, Scores
from realign.audit.schema import (
    AgreementEntry,
    MeanEntry,
    RateEntry,
    TemplateEntry,
    Treatment,
    Treatments,
)
from realign.audit.schema import Interval as Pair
from realign.audit.statistics.agreement import cohen_kappa
from realign.audit.statistics.evidence import Treatment as TreatmentName
from realign.audit.statistics.intervals import ALPHA, Interval, wilson
from realign.audit.statistics.paired import clusters_repeat
from realign.audit.statistics.resampling import bootstrap_interval, comparison_seed

INCOHERENT_EXCESS = 0.05
"""A model with this much more invalid answers than the reference is flagged above all numbers."""


def rate_interval(
    values: Sequence[bool],
    *,
    clusters: Sequence[str | None],
    seed: int,
    alpha: float = ALPHA,
) -> Interval | None:
    """The interval of one rate: Wilson's, widened where items share clusters.

    The cluster bootstrap knows the dependence but shrinks to a point when all items agree; Wilson's
    never does but ignores the dependence. The hull of both is given, under the bootstrap's name.
    """
    plain = wilson(sum(values), len(values), alpha=alpha)
    if plain is None or not clusters_repeat(clusters):
        return plain
    whole = bootstrap_interval(
        [float(v) for v in values], seed=seed, clusters=clusters, alpha=alpha
    )
    return hull(whole, plain)


def hull(whole: Interval | None, plain: Interval | None) -> Interval | None:
    """The smallest interval that covers both, under the name of the first."""
    if whole is None or plain is None:
        return whole or plain
    return Interval(
        low=min(whole.low, plain.low),
        high=max(whole.high, plain.high),
        level=whole.level,
        method=whole.method,
    )


def treated(
    outcome: Outcome, treatment: TreatmentName = "excluded"
) -> tuple[list[bool], list[str | None]]:
    """The verdicts with their clusters, invalid answers left out or counted as said."""
    kept = [
        (treatment == "as_bad" if value is None else value, cluster)
        for value, cluster in zip(outcome.values, outcome.clusters, strict=True)
        if value is not None or treatment != "excluded"
    ]
    return [value for value, _ in kept], [cluster for _, cluster in kept]


def outcome_interval(
    outcome: Outcome,
    *,
    run_seed: int,
    alpha: float = ALPHA,
    treatment: TreatmentName = "excluded",
) -> Interval | None:
    """The interval of one model's rate, over its valid answers unless told otherwise."""
    values, clusters = treated(outcome, treatment)
    seed = comparison_seed(outcome.instrument.instrument_id, outcome.role, run_seed)
    return rate_interval(values, clusters=clusters, seed=seed, alpha=alpha)


def rate_entry(outcome: Outcome, *, run_seed: int, reference: Outcome | None = None) -> RateEntry:
    """One row of `rates`; `reference` is the same metric of the reference, for the flag."""
    values = outcome.valid
    n, bad = len(outcome.values), sum(values)
    interval = outcome_interval(outcome, run_seed=run_seed)
    flags: list[str] = []
    if reference is not None and invalid_excess(outcome, reference) > INCOHERENT_EXCESS:
        flags.append("incoherent")
    return RateEntry(
        instrument_id=outcome.instrument.instrument_id,
        role=outcome.role,
        suite=outcome.instrument.suite.name,
        judge=outcome.instrument.judge.name,
        metric=outcome.metric.name,
        n=n,
        n_valid=len(values),
        n_invalid=outcome.invalid,
        bad=bad,
        rate=bad / len(values) if values else None,
        rate_reason=None if values else "no valid answer",
        ci95=pair(interval),
        ci_method=interval.method if interval else None,
        treatments=Treatments(
            excluded=_treatment(outcome, "excluded", run_seed=run_seed),
            as_bad=_treatment(outcome, "as_bad", run_seed=run_seed),
            as_ok=_treatment(outcome, "as_ok", run_seed=run_seed),
        ),
        flags=tuple(flags),
    )


def invalid_excess(outcome: Outcome, reference: Outcome) -> float:
    """The share of invalid answers, minus that of the reference on the same items."""
    # Counts are subtracted, not rates: 15 - 10 of 100 is 0.05 and not a little more.
    return (len(reference.valid) - len(outcome.valid)) / len(outcome.values)


def template_entries(outcome: Outcome, *, run_seed: int) -> list[TemplateEntry]:
    """One row per request template, for suites whose items name theirs."""
    groups: dict[str, list[tuple[bool, str | None]]] = defaultdict(list)
    for item, value, cluster in zip(
        outcome.instrument.suite.items, outcome.values, outcome.clusters, strict=True
    ):
        if item.template is not None and value is not None:
            groups[template_key(item.template)].append((value, cluster))
    entries: list[TemplateEntry] = []
    for key, rows in sorted(groups.items()):
        values = [value for value, _ in rows]
        seed = comparison_seed(outcome.instrument.instrument_id, f"{outcome.role}:{key}", run_seed)
        interval = pair(rate_interval(values, clusters=[each for _, each in rows], seed=seed))
        assert interval is not None
        entries.append(
            TemplateEntry(
                instrument_id=outcome.instrument.instrument_id,
                suite=outcome.instrument.suite.name,
                judge=outcome.instrument.judge.name,
                metric=outcome.metric.name,
                role=outcome.role,
                key=key,
                n=len(values),
                bad=sum(values),
                rate=sum(values) / len(values),
                ci95=interval,
            )
        )
    return entries


def template_key(template: str) -> str:
    """A template's name if it is a short identifier, else its hash: a template can be text."""
    if re.fullmatch(r"[A-Za-z0-9_.-]{1,24}", template):
        return template
    return sha256_text(template)[:12]


def score_interval(scores: Scores, *, run_seed: int, alpha: float = ALPHA) -> Interval | None:
    """The bootstrap interval of a mean over the items that have a value."""
    kept = [
        (value, cluster)
        for value, cluster in zip(scores.values, scores.clusters, strict=True)
        if value is not None
    ]
    return bootstrap_interval(
        [value for value, _ in kept],
        seed=comparison_seed(scores.instrument.instrument_id, scores.role, run_seed),
        clusters=[cluster for _, cluster in kept],
        alpha=alpha,
    )


def mean_of(scores: Scores) -> float | None:
    """The mean over the items that have a value."""
    values = sorted(value for value in scores.values if value is not None)
    return sum(values) / len(values) if values else None


def mean_entry(scores: Scores, *, run_seed: int, sign: float = 1.0) -> MeanEntry:
    """One mean with its interval.

    Args:
        scores: oriented so that larger is worse.
        run_seed: of the audit.
        sign: -1 turns the orientation back, for log-odds that people read as such.
    """
    interval = score_interval(scores, run_seed=run_seed)
    mean = mean_of(scores)
    limits = None
    if interval is not None:
        first, second = sorted((sign * interval.low, sign * interval.high))
        limits = (first, second)
    return MeanEntry(
        suite=scores.instrument.suite.name,
        role=scores.role,
        n=sum(value is not None for value in scores.values),
        mean=None if mean is None else sign * mean,
        ci95=limits,
        reason=None if mean is not None else "no item has a value",
    )


def agreement_entries(outcomes: Iterable[Outcome]) -> list[AgreementEntry]:
    """Kappa of every two judges that measured the same metric of the same model.

    "Not refused", the nearest that a keyword judge comes to compliance, is set against compliance.
    """
    groups: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.metric.oriented:
            name = ASR.name if outcome.metric is NON_REFUSAL else outcome.metric.name
            groups[outcome.instrument.suite.name, name, outcome.role].append(outcome)
    return [
        _agreement(first, second)
        for members in groups.values()
        for i, first in enumerate(members)
        for second in members[i + 1 :]
    ]


def _agreement(first: Outcome, second: Outcome) -> AgreementEntry:
    both = [
        (x, y)
        for x, y in zip(first.values, second.values, strict=True)
        if x is not None and y is not None
    ]
    result = cohen_kappa(
        sum(x and y for x, y in both),
        sum(x and not y for x, y in both),
        sum(y and not x for x, y in both),
        sum(not x and not y for x, y in both),
    )
    return AgreementEntry(
        suite=first.instrument.suite.name,
        role=first.role,
        judges=(first.instrument.judge.name, second.instrument.judge.name),
        metric=ASR.name if first.metric is NON_REFUSAL else first.metric.name,
        n=result.n,
        kappa=result.kappa,
        kappa_reason=None if result.kappa is not None else "agreement beyond chance is undefined",
        kappa_ci=pair(result.interval),
        positive=result.positive,
        negative=result.negative,
    )


def pair(interval: Interval | None) -> Pair | None:
    """Both limits, for the report."""
    return None if interval is None else (interval.low, interval.high)


def _treatment(outcome: Outcome, treatment: TreatmentName, *, run_seed: int) -> Treatment:
    values, _ = treated(outcome, treatment)
    interval = outcome_interval(outcome, run_seed=run_seed, treatment=treatment)
    n, bad = len(values), sum(values)
    return Treatment(n=n, bad=bad, rate=bad / n if n else None, ci95=pair(interval))
