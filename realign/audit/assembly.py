"""From columns to the report: comparisons, gates, sections, the per-item file."""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, Literal

from realign._version import __version__
from realign.audit.canonical import canonical_json, response_hash, sha256_text
from realign.audit.comparisons import comparison_entries
from realign.audit.families import family_entries
from realign.audit.gates import Results, count_gates, evaluate_gates, gates_hold
from realign.audit.hazards import hazard_entries
from realign.audit.instruments import KL, LOGODDS
from realign.audit.judging import Judged, judge_all
from realign.audit.pairing import key_of, pair_all
from realign.audit.prepare import CONTAMINATED, TRAINED_ON, Prepared
from realign.audit.rates import agreement_entries, mean_entry, rate_entry, template_entries
from realign.audit.records import (
    RoleRecords,
)
from realign.audit.request import AuditRequest
from realign.audit.schema import (
    ComparisonEntry,
    Host,
    InstrumentEntry,
    ItemsFile,
    KlEntry,
    Logits,
    PolicyUsed,
    Report,
    Run,
    SuiteEntry,
    Summary,
    Tool,
    atomic_write,
)
from realign.audit.sentences import NO_VERDICTS, headline, limits
from realign.audit.state import AuditState, timestamp
from realign.audit.statistics.intervals import ALPHA
from realign.audit.suites import Suite
from realign.progress import Progress

ITEMS_NAME = "items.jsonl"
_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "peft")
_LATER = "not part of this version"
# Items that were seen before: reported as contaminated, not as skipped.
_SHARED = (CONTAMINATED, TRAINED_ON)


def complete_report(state: AuditState, *, progress: Progress) -> Report:
    """Judge, compare and gate what was collected, and write the per-item file.

    Raises:
        OutputError: the per-item file cannot be written.
    """
    prepared = state.prepared
    request = prepared.request
    policy = request.policy
    alpha = policy.alpha if policy is not None else ALPHA
    seed = request.seed
    progress.note("judging and comparing")
    judged = judge_all(state)
    primary = prepared.primary
    paired = {key: column for key, column in judged.columns.items() if key[2] != KL}
    pairings = pair_all(paired, run_seed=seed, alpha=alpha)
    comparisons = comparison_entries(
        pairings,
        columns=paired,
        policy=policy,
        primary=primary,
        self_churn=judged.again,
        run_seed=seed,
    )
    families = family_entries(pairings, primary=primary, alpha=alpha)
    agreement = agreement_entries(judged.outcomes)
    comparisons = _flag_weak_judges(comparisons, agreement, primary=primary, state=state)
    by_key = {(key_of(o), o.role): o for o in judged.outcomes}
    rates = tuple(
        rate_entry(outcome, run_seed=seed, reference=by_key.get((key_of(outcome), "reference")))
        for outcome in judged.outcomes
    )
    gates = ()
    if policy is not None:
        gates = evaluate_gates(
            policy,
            Results(
                columns=judged.columns,
                comparisons=comparisons,
                families=families,
                agreement=agreement,
                primary=primary,
                secondary=prepared.secondary,
                run_seed=seed,
                reasons=judged.reasons,
            ),
        )
    suites = tuple(suite_entry(suite) for suite in prepared.suites)
    holds = policy is None or gates_hold(gates, policy=policy)
    items = _write_items(state, judged)
    weights = state.weights
    return Report(
        tool=Tool(version=__version__),
        run=_run(state, status="complete", exit_code=0 if holds else 1),
        policy=_policy_used(request),
        models=state.models,
        suites=suites,
        judges=tuple(judged.entries),
        instruments=_instrument_entries(judged),
        rates=rates,
        comparisons=tuple(comparisons),
        families=tuple(families),
        agreement=tuple(agreement),
        logits=_logits(state, judged),
        prefill_reason=_LATER,
        hazards=tuple(hazard_entries(pairings, columns=paired, primary=primary)),
        templates=tuple(
            entry
            for outcome in judged.outcomes
            for entry in template_entries(outcome, run_seed=seed)
        ),
        weights=None if isinstance(weights, str) else weights,
        weights_reason=weights if isinstance(weights, str) else None,
        landscape_reason=_LATER,
        artefacts_reason=_LATER,
        gates=gates,
        summary=Summary(
            gates=count_gates(gates),
            headline=headline(
                suites=suites,
                rates=rates,
                comparisons=comparisons,
                primary=primary,
                toothless=policy is not None and not policy.has_required_gate,
            ),
            verdicts=None if policy is not None else NO_VERDICTS,
        ),
        limits=limits(
            suites=suites,
            judges=judged.entries,
            models=state.models,
            languages=_languages(prepared),
            clustered=[suite.name for suite in prepared.suites if suite.clustered],
            weights=not isinstance(weights, str),
            noise_floor=request.noise_floor and "reference" in state.records,
            has_policy=policy is not None,
            reasons=judged.reasons,
        ),
        items=items,
    )


def _flag_weak_judges(
    comparisons: list[ComparisonEntry],
    agreement: Sequence[Any],
    *,
    primary: Mapping[str, str],
    state: AuditState,
) -> list[ComparisonEntry]:
    """Flag comparisons whose judges agree too little; the exact rule needs no agreement."""
    policy = state.prepared.request.policy
    judges = policy.judges if policy is not None else None
    least = judges.min_kappa if judges is not None else 0.6
    weak = {
        (row.suite, judge)
        for row in agreement
        if row.kappa is not None and row.kappa < least
        for judge in row.judges
        if "oracle" not in row.judges
    }
    return [
        row.model_copy(update={"flags": (*row.flags, "weak_judges")})
        if (row.suite, row.judge) in weak and primary.get(row.suite or "") == row.judge
        else row
        for row in comparisons
    ]


def _languages(prepared: Prepared) -> list[str]:
    found: list[str] = []
    for suite in prepared.suites:
        each = {item.language for item in suite.items if item.language} or {suite.language}
        found += [language for language in each if language]
    return found


def suite_entry(suite: Suite) -> SuiteEntry:
    """The report's entry of a suite as it ran; what was contaminated is counted apart."""
    assert suite.kind != "anchors"
    clusters = {item.cluster or f"\0{item.id}" for item in suite.items}
    skipped = {name: n for name, n in suite.skipped.items() if name not in _SHARED}
    return SuiteEntry(
        name=suite.name,
        suite_hash=suite.suite_hash,
        kind=suite.kind,
        source=suite.source or None,
        revision=suite.revision,
        license=suite.license,
        n_items=len(suite.items),
        n_clusters=len(clusters) if suite.clustered else None,
        n_skipped=skipped,
        n_contaminated=sum(suite.skipped.get(name, 0) for name in _SHARED),
    )


def _instrument_entries(judged: Judged) -> tuple[InstrumentEntry, ...]:
    return tuple(
        InstrumentEntry(
            instrument_id=instrument.instrument_id,
            suite=instrument.suite.name,
            judge=instrument.judge.name,
            metric=metric,
            generation=instrument.generation.settings,
            generation_hash=instrument.generation.generation_hash,
            k_samples=instrument.generation.samples,
        )
        for instrument, metric in judged.instruments.values()
    )


def _logits(state: AuditState, judged: Judged) -> Logits:
    seed = state.prepared.request.seed
    kinds = {suite.name: suite.kind for suite in state.prepared.suites}
    curves: dict[str, KlEntry] = {}
    for role, records in state.records.items():
        if records.kl:
            curves[role] = _kl_entry(records, kinds)
    reasons = [records.kl_reason for records in state.records.values() if records.kl_reason]
    return Logits(
        refusal_logodds=tuple(
            mean_entry(
                scores,
                run_seed=seed,
                sign=-1.0 if kinds[scores.instrument.suite.name] == "harmful" else 1.0,
            )
            for scores in judged.scores
            if scores.metric == LOGODDS
        ),
        refusal_logodds_reason=next(
            (r.logodds_reason for r in state.records.values() if r.logodds_reason), None
        ),
        first_token_reason=_LATER,
        kl=curves,
        kl_items=tuple(
            mean_entry(scores, run_seed=seed) for scores in judged.scores if scores.metric == KL
        ),
        kl_reason=None if curves else (reasons[0] if reasons else "no reference, or not asked for"),
    )


def _kl_entry(records: RoleRecords, kinds: Mapping[str, str]) -> KlEntry:
    harmful = _curve(records, [name for name in records.kl if kinds[name] == "harmful"])
    benign = _curve(records, [name for name in records.kl if kinds[name] == "safe"])
    head = harmful[:5]
    return KlEntry(
        harmful=harmful,
        benign=benign,
        harmful_mean_1_5=sum(head) / len(head) if head else None,
        benign_first=benign[0] if benign else None,
        dropped_mass=max(record.dropped for record in records.kl.values()),
        clamped=sum(record.clamped for record in records.kl.values()),
    )


def _curve(records: RoleRecords, names: Sequence[str]) -> tuple[float, ...]:
    """The mean over the prompts that reach each position."""
    rows = [row for name in names for row in records.kl[name].items.values()]
    longest = max((len(row) for row in rows), default=0)
    reached = [[row[k] for row in rows if len(row) > k] for k in range(longest)]
    return tuple(sum(values) / len(values) for values in reached)


def _write_items(state: AuditState, judged: Judged) -> ItemsFile:
    """The per-item file: hashes and verdicts, never a text, so that others can redo any test."""
    lines: list[str] = []
    for (suite_name, judge), results in judged.items.items():
        for outcome in judged.outcomes:
            if (outcome.instrument.suite.name, outcome.instrument.judge.name) != (
                suite_name,
                judge,
            ) or not outcome.metric.oriented:
                continue
            answers = state.records[outcome.role].responses.get(suite_name)
            for index, item in enumerate(outcome.instrument.suite.items):
                value = outcome.values[index]
                answer = answers[index] if answers is not None else None
                lines.append(
                    canonical_json(
                        {
                            "cluster_hash": item.cluster and sha256_text(item.cluster)[:16],
                            "instrument_id": outcome.instrument.instrument_id,
                            "invalid_reason": outcome.reasons[index],
                            "item_id": item.id,
                            "metric": outcome.metric.name,
                            "prompt_hash": answer.prompt_hash if answer else None,
                            "response_hash": response_hash(answer.text) if answer else None,
                            "role": outcome.role,
                            "score": results[outcome.role][index].score,
                            "verdict": ("invalid" if value is None else "bad" if value else "ok"),
                        }
                    )
                )
    for scores in judged.scores:
        for item, value in zip(scores.instrument.suite.items, scores.values, strict=True):
            lines.append(
                canonical_json(
                    {
                        "cluster_hash": item.cluster and sha256_text(item.cluster)[:16],
                        "instrument_id": scores.instrument.instrument_id,
                        "item_id": item.id,
                        "metric": scores.metric,
                        "role": scores.role,
                        "score": value,
                    }
                )
            )
    text = "".join(line + "\n" for line in lines)
    atomic_write(state.prepared.request.out / ITEMS_NAME, text)
    return ItemsFile(path=ITEMS_NAME, sha256=sha256_text(text))


def _policy_used(request: AuditRequest) -> PolicyUsed | None:
    policy = request.policy
    if policy is None:
        return None
    return PolicyUsed(path=policy.path, sha256=policy.sha256, effective=policy.effective())


def _run(
    state: AuditState, *, status: Literal["complete", "incomplete"], exit_code: Literal[0, 1, 2]
) -> Run:
    request = state.prepared.request
    return Run(
        id=str(uuid.uuid4()),
        started=state.started,
        finished=timestamp(),
        status=status,
        exit_code=exit_code,
        command=request.command,
        seed=request.seed,
        offline=request.offline,
        host=Host(
            os=sys.platform,
            python=platform.python_version(),
            libraries=_libraries(),
            device=state.device,
        ),
    )


def incomplete_report(state: AuditState, error: Exception) -> Report:
    """A report that says why there is no result; its exit code is 2."""
    message = getattr(error, "message", None) or type(error).__name__
    request = state.prepared.request
    return Report(
        tool=Tool(version=__version__),
        run=_run(state, status="incomplete", exit_code=2),
        policy=_policy_used(request),
        models=state.models,
        suites=tuple(suite_entry(suite) for suite in state.prepared.suites),
        summary=Summary(headline=(f"The audit could not be completed: {message}"[:500],)),
        limits=("Nothing was measured: this run is incomplete and has no result that counts.",),
    )


def _libraries() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
