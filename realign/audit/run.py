"""The audit from request to report: prepare, collect, judge, compare, gate, write.

Prompts go in, `audit.json` and `items.jsonl` come out. The models run one at a time; what they say
is stored as it comes, so that an interrupted audit goes on where it stopped.
"""

from __future__ import annotations

import datetime
import logging
import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from realign._version import __version__
from realign.audit.canonical import canonical_json, response_hash, sha256_json, sha256_text
from realign.audit.collect import (
    KL_ITEMS,
    KL_POSITIONS,
    LOGODDS_TOKENS,
    Collector,
    Demand,
    OpenedRole,
    RoleRecords,
    digest_of,
    scorer_hash,
)
from realign.audit.comparisons import Key, comparison_entries, family_entries, key_of, pair_all
from realign.audit.gates import Results, count_gates, evaluate_gates, gates_hold
from realign.audit.hazards import hazard_entries
from realign.audit.instruments import KL, LOGODDS, Generation, Instrument, JudgeIdentity
from realign.audit.judges import (
    ExactMatchJudge,
    JudgeKind,
    JudgeResult,
    LogprobJudge,
    ResponseJudge,
    Threshold,
    fit_threshold,
    keyword_judge,
)
from realign.audit.oracle import oracle_judge
from realign.audit.outcomes import Outcome, Scores, judge_responses, outcomes_of
from realign.audit.prepare import CONTAMINATED, Prepared, check_opened, prepare, prepare_folder
from realign.audit.rates import agreement_entries, mean_entry, rate_entry, template_entries
from realign.audit.request import AuditRequest
from realign.audit.schema import (
    ComparisonEntry,
    FileEntry,
    Host,
    InstrumentEntry,
    ItemsFile,
    JudgeEntry,
    KlEntry,
    Logits,
    ModelEntry,
    PolicyUsed,
    Report,
    Role,
    Run,
    SuiteEntry,
    Summary,
    ThresholdEntry,
    Tool,
    Weights,
    atomic_write,
    write_report,
)
from realign.audit.sentences import NO_VERDICTS, headline, limits
from realign.audit.statistics.intervals import ALPHA
from realign.audit.statistics.paired import PairedTable
from realign.audit.store import RecordStore
from realign.audit.suites import Suite
from realign.audit.weights import measure_weights
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.model.chat import chat_template
from realign.model.loading import load_tokenizer
from realign.progress import SILENT, Progress

__all__ = ["REPORT_NAME", "AuditRequest", "run_audit"]

log = logging.getLogger(__name__)

REPORT_NAME = "audit.json"
ITEMS_NAME = "items.jsonl"
_LIBRARIES = ("torch", "transformers", "safetensors", "numpy", "scipy", "peft")
_LATER = "not part of this version"

Columns = dict[Key, dict[Role, Outcome | Scores]]


@dataclass
class _State:
    """What the audit has found so far."""

    prepared: Prepared
    started: str
    models: dict[Role, ModelEntry] = field(default_factory=dict[Role, ModelEntry])
    records: dict[Role, RoleRecords] = field(default_factory=dict[Role, RoleRecords])
    weights: Weights | str = "not asked for"
    device: str = "none"


def run_audit(request: AuditRequest, *, progress: Progress = SILENT) -> Report:
    """Run an audit and write `audit.json` and `items.jsonl` into `request.out`.

    The report's `exit_code` is 0 within policy (or without one) and 1 if a required gate failed or
    is inconclusive. An error is raised, after a report with status `incomplete` and exit code 2 was
    written, if anything could run at all.

    Raises:
        UsageError, SuiteError, PolicyError: the request does not fit together; nothing was written.
        CheckpointError, ModelError: a model cannot be read or asked.
        OutputError: the folder cannot be written, or another audit is using it.
    """
    state = _State(prepared=prepare(request), started=_now())
    prepare_folder(request.out)
    store = RecordStore(request.out)
    with ExitStack() as stack:
        stack.enter_context(store.locked())
        try:
            _collect(state, store, stack, progress=progress)
            report = _evaluate(state, progress=progress)
        except Exception as error:
            write_report(_incomplete(state, error), request.out / REPORT_NAME)
            raise
        write_report(report, request.out / REPORT_NAME)
        if not request.keep_texts:
            store.remove()
    return report


# --- the models ----------------------------------------------------------------------------------


def _collect(state: _State, store: RecordStore, stack: ExitStack, *, progress: Progress) -> None:
    request = state.prepared.request
    opened, base = _open_all(state, stack, progress=progress)
    demand = _demand(state, opened)
    with Collector(request, demand, store, progress=progress) as collector:
        for index, role in enumerate(opened):
            later = opened[index + 1 :]
            records = collector.collect(role, followers=later if demand.kl else ())
            state.records[role.role] = records
            state.models[role.role] = _with_facts(state.models[role.role], records)
            state.device = str(records.facts["device"])
    by_role: dict[Role, Checkpoint] = {role.role: role.checkpoint for role in opened}
    subjects: dict[Role, Checkpoint] = {
        role: found for role, found in by_role.items() if role != "reference"
    }
    if not request.weights:
        return
    if "reference" not in by_role:
        state.weights = "there is no reference"
        return
    state.weights = measure_weights(
        reference=by_role["reference"],
        subjects=subjects,
        base=base,
        progress=progress,
    )


def _open_all(
    state: _State, stack: ExitStack, *, progress: Progress
) -> tuple[list[OpenedRole], Checkpoint | None]:
    """Open every checkpoint and check that it can be asked, before the first model is loaded."""
    request = state.prepared.request
    opened: list[OpenedRole] = []
    reference: Checkpoint | None = None
    for role, source in request.sources().items():
        checkpoint = _open(source, stack, base=reference, request=request, progress=progress)
        if role == "reference":
            reference = checkpoint
            check_opened(request, reference)
        chat_template(load_tokenizer(checkpoint))  # a missing template is an error here, not later
        files = checkpoint.file_hashes(progress)
        opened.append(OpenedRole(role, checkpoint, digest_of(files), files))
        state.models[role] = _model_entry(checkpoint, files)
    if reference is None:
        check_opened(request, None)
    base = None
    if request.base is not None:
        base = _open(request.base, stack, base=None, request=request, progress=progress)
        state.models["base"] = _model_entry(base, base.file_hashes(progress))
    return opened, base


def _open(
    source: str | Path | Checkpoint,
    stack: ExitStack,
    *,
    base: Checkpoint | None,
    request: AuditRequest,
    progress: Progress,
) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source  # the caller's, and his to close
    return stack.enter_context(
        open_checkpoint(source, adapter_base=None, offline=request.offline, progress=progress)
    )


def _demand(state: _State, opened: Sequence[OpenedRole]) -> Demand:
    prepared = state.prepared
    request = prepared.request
    prompts = tuple(suite for suite in prepared.suites if suite.kind != "task")
    response_judges = {"oracle", "keyword", "exact-match"}
    wants_labels = any("logprob" in judges for judges in prepared.judges.values())
    texts = tuple(
        suite
        for suite in prepared.suites
        # The log-odds threshold is fitted on generated answers, so those suites are answered too.
        if response_judges & set(prepared.judges[suite.name]) or (wants_labels and suite in prompts)
    )
    digests = {sha256_json(load_tokenizer(each.checkpoint).get_vocab()) for each in opened}
    paired = len(opened) > 1 and any(each.role == "reference" for each in opened)
    return Demand(
        texts=texts,
        scored=prompts,
        per_byte=len(digests) > 1,
        kl=tuple(suite.limited(KL_ITEMS) for suite in prompts) if request.kl and paired else (),
    )


def _model_entry(checkpoint: Checkpoint, files: Mapping[str, str]) -> ModelEntry:
    config = checkpoint.config
    architectures: Any = config.get("architectures")
    dtypes = {info.dtype for info in checkpoint.tensors.values()}
    sizes = {path.name: path.stat().st_size for path in checkpoint.weight_files if path.is_file()}
    return ModelEntry(
        source=str(checkpoint.source),
        revision=checkpoint.commit,
        kind=checkpoint.kind,
        architecture=architectures[0] if architectures else config.get("model_type"),
        parameters=sum(info.numel for info in checkpoint.tensors.values()),
        dtype="/".join(sorted(dtypes)),
        content_digest=digest_of(files),
        content_digest_scope="listed",
        files=tuple(
            FileEntry(path=name, size=sizes.get(Path(name).name), sha256=sha)
            for name, sha in sorted(files.items())
        ),
        generation_config_sha256=files.get("generation_config.json"),
    )


def _with_facts(entry: ModelEntry, records: RoleRecords) -> ModelEntry:
    facts = records.facts
    return entry.model_copy(
        update={
            "chat_template_sha256": facts["chat_template_sha256"],
            "stop_ids": tuple(facts["stop_ids"]),
            "tokenizer_digest": facts["tokenizer_digest"],
            "run_dtype": facts["dtype"],
            "attention": facts["attention"],
            "reused": records.reused,
        }
    )


# --- the judges ----------------------------------------------------------------------------------


@dataclass
class _Judged:
    """Columns of every metric, the judges behind them, and what could not be judged."""

    columns: Columns
    outcomes: list[Outcome]
    again: dict[Key, float]
    """Churn of the reference against itself, by key."""
    scores: list[Scores]
    entries: list[JudgeEntry]
    instruments: dict[tuple[str, str], tuple[Instrument, str]]
    reasons: dict[tuple[str, str], str]
    items: dict[tuple[str, str], Mapping[Role, Sequence[JudgeResult]]]
    """By suite and judge: the verdicts, for the per-item file."""


def _judge(state: _State) -> _Judged:
    prepared = state.prepared
    judged = _Judged({}, [], {}, [], [], {}, {}, {})
    identities: dict[str, list[JudgeIdentity]] = {}
    threshold = _threshold(state)
    for suite in prepared.suites:
        for name in prepared.judges[suite.name]:
            if name == "logprob":
                found = _judge_prompts(state, suite, threshold)
            else:
                found = _judge_answers(state, suite, name, judged)
            if isinstance(found, str):
                judged.reasons[suite.name, name] = found
                continue
            instrument, results = found
            identities.setdefault(name, []).append(instrument.judge)
            judged.items[suite.name, name] = results
            for outcome in outcomes_of(instrument, results):
                judged.outcomes.append(outcome)
                judged.instruments[instrument.instrument_id, outcome.metric.name] = (
                    instrument,
                    outcome.metric.name,
                )
                if outcome.metric.oriented:
                    judged.columns.setdefault(key_of(outcome), {})[outcome.role] = outcome
    _add_scores(state, judged)
    judged.entries = _judge_entries(prepared, identities, threshold, judged)
    return judged


def _response_judge(suite: Suite, name: str) -> tuple[ResponseJudge, JudgeKind, str]:
    if name == "oracle":
        oracle = oracle_judge(suite)
        return oracle, "exact", oracle.judge_hash
    if name == "keyword":
        keyword = keyword_judge()
        return keyword, "lexicon", keyword.judge_hash
    assert name == "exact-match", name
    exact = ExactMatchJudge()
    return exact, "exact", exact.judge_hash


def _judge_answers(
    state: _State, suite: Suite, name: str, judged: _Judged
) -> tuple[Instrument, dict[Role, tuple[JudgeResult, ...]]]:
    judge, kind, digest = _response_judge(suite, name)
    instrument = Instrument(
        suite=suite,
        generation=state.prepared.request.generation_of(suite),
        judge=JudgeIdentity(name, kind, digest),
    )
    results: dict[Role, tuple[JudgeResult, ...]] = {
        role: judge_responses(suite, records.responses[suite.name], judge=judge)
        for role, records in state.records.items()
    }
    reference = state.records.get("reference")
    if reference is not None and suite.name in reference.again:
        repeated = judge_responses(suite, reference.again[suite.name], judge=judge)
        both: dict[Role, tuple[JudgeResult, ...]] = {
            "reference": results["reference"],
            "subject": repeated,
        }
        pairs: dict[str, dict[Role, Outcome]] = {}
        for outcome in outcomes_of(instrument, both):
            pairs.setdefault(outcome.metric.name, {})[outcome.role] = outcome
        for metric, by_role in pairs.items():
            first, second = by_role["reference"].values, by_role["subject"].values
            kept = [
                (x, y)
                for x, y in zip(first, second, strict=True)
                if x is not None and y is not None
            ]
            churn = PairedTable.from_items([x for x, _ in kept], [y for _, y in kept]).churn
            judged.again[suite.name, name, metric] = churn or 0.0
    return instrument, results


def _threshold(state: _State) -> Threshold | str:
    """The log-odds cut that best separates what the reference refuses from what it answers."""
    prepared = state.prepared
    if not any("logprob" in judges for judges in prepared.judges.values()):
        return "not asked for"
    reference = state.records.get("reference")
    if reference is None:
        return "there is no reference to fit a threshold on"
    logodds: list[float] = []
    refused: list[bool] = []
    for suite in prepared.suites:
        if suite.kind == "task" or suite.name not in reference.responses:
            continue
        name = "oracle" if suite.rule is not None else "keyword"
        judge, _, _ = _response_judge(suite, name)
        results = judge_responses(suite, reference.responses[suite.name], judge=judge)
        known = reference.logodds.get(suite.name, {})
        for item, result in zip(suite.items, results, strict=True):
            if result.refused is not None and item.id in known:
                logodds.append(known[item.id])
                refused.append(result.refused)
    if not logodds:
        return reference.logodds_reason or "the reference gave no answer to fit a threshold on"
    return fit_threshold(logodds, refused)


def _logodds_generation() -> Generation:
    return Generation(mode="teacher_forced", max_new_tokens=LOGODDS_TOKENS)


def _judge_prompts(
    state: _State, suite: Suite, threshold: Threshold | str
) -> tuple[Instrument, dict[Role, tuple[JudgeResult, ...]]] | str:
    if isinstance(threshold, str):
        return threshold
    judge = LogprobJudge(threshold, scorer_hash(per_byte=_per_byte(state)))
    instrument = Instrument(
        suite=suite,
        generation=_logodds_generation(),
        judge=JudgeIdentity("logprob", "logprob", judge.judge_hash),
    )
    results: dict[Role, tuple[JudgeResult, ...]] = {}
    for role, records in state.records.items():
        known = records.logodds[suite.name]
        if not known:
            return records.logodds_reason or "no log-odds"
        results[role] = tuple(
            judge.judge_score(known[item.id])
            if item.id in known
            else JudgeResult(invalid_reason="unscored")
            for item in suite.items
        )
    return instrument, results


def _per_byte(state: _State) -> bool:
    return len({records.facts["tokenizer_digest"] for records in state.records.values()}) > 1


def _add_scores(state: _State, judged: _Judged) -> None:
    """Refusal log-odds as a paired metric, and the KL as one per model."""
    scorer = scorer_hash(per_byte=_per_byte(state))
    for suite in state.prepared.suites:
        if suite.kind == "task":
            continue
        # Larger is worse: refusing less on harmful prompts, refusing more on safe ones.
        sign = -1.0 if suite.kind == "harmful" else 1.0
        instrument = Instrument(
            suite=suite,
            generation=_logodds_generation(),
            judge=JudgeIdentity(LOGODDS, "logprob", scorer),
        )
        for role, records in state.records.items():
            known = records.logodds.get(suite.name, {})
            if known:
                values = tuple(
                    sign * known[item.id] if item.id in known else None for item in suite.items
                )
                _add(judged, Scores(instrument, LOGODDS, role, values))
        _add_kl(state, suite, judged)


def _add_kl(state: _State, suite: Suite, judged: _Judged) -> None:
    limited = suite.limited(KL_ITEMS)
    positions = 5 if suite.kind == "harmful" else 1
    instrument = Instrument(
        suite=limited,
        generation=Generation(mode="teacher_forced", max_new_tokens=KL_POSITIONS),
        judge=JudgeIdentity(
            KL,
            "logprob",
            sha256_json({"mean_of": positions, "name": "kl_to_reference"}),
        ),
    )
    for role, records in state.records.items():
        if suite.name not in records.kl:
            continue
        items = records.kl[suite.name].items
        values = tuple(
            sum(items[item.id][:positions]) / len(items[item.id][:positions])
            if items[item.id]
            else None
            for item in limited.items
        )
        _add(judged, Scores(instrument, KL, role, values))


def _add(judged: _Judged, scores: Scores) -> None:
    judged.scores.append(scores)
    judged.instruments[scores.instrument.instrument_id, scores.metric] = (
        scores.instrument,
        scores.metric,
    )
    judged.columns.setdefault(key_of(scores), {})[scores.role] = scores


def _judge_entries(
    prepared: Prepared,
    identities: Mapping[str, list[JudgeIdentity]],
    threshold: Threshold | str,
    judged: _Judged,
) -> list[JudgeEntry]:
    primaries = set(prepared.primary.values())
    names = list(dict.fromkeys(name for judges in prepared.judges.values() for name in judges))
    kinds: dict[str, JudgeKind] = {"keyword": "lexicon", "logprob": "logprob"}
    entries: list[JudgeEntry] = []
    for name in names:
        hashes = {identity.judge_hash for identity in identities.get(name, [])}
        reason = next((r for (_, judge), r in judged.reasons.items() if judge == name), None)
        fitted = name == "logprob" and isinstance(threshold, Threshold)
        role: Literal["primary", "secondary"] = "primary" if name in primaries else "secondary"
        entries.append(
            JudgeEntry(
                name=name,
                kind=kinds.get(name, "exact"),
                role=role,
                judge_hash=min(hashes, default=None),
                threshold=_threshold_entry(threshold) if fitted else None,
                unavailable_reason=reason if not hashes else None,
            )
        )
    return entries


def _threshold_entry(threshold: Threshold | str) -> ThresholdEntry | None:
    if isinstance(threshold, str):
        return None
    return ThresholdEntry(
        tau=threshold.tau,
        youden_j=threshold.youden_j,
        n_complied=threshold.n_complied,
        n_refused=threshold.n_refused,
    )


# --- the report ----------------------------------------------------------------------------------


def _evaluate(state: _State, *, progress: Progress) -> Report:
    prepared = state.prepared
    request = prepared.request
    policy = request.policy
    alpha = policy.alpha if policy is not None else ALPHA
    seed = request.seed
    progress.note("judging and comparing")
    judged = _judge(state)
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
    suites = tuple(_suite_entry(suite) for suite in prepared.suites)
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
            entry for outcome in judged.outcomes for entry in template_entries(outcome)
        ),
        weights=None if isinstance(weights, str) else weights,
        weights_reason=weights if isinstance(weights, str) else None,
        landscape_reason=_LATER,
        artefacts_reason=_LATER,
        gates=gates,
        summary=Summary(
            gates=count_gates(gates),
            headline=headline(suites=suites, rates=rates, comparisons=comparisons, primary=primary),
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
    state: _State,
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


def _suite_entry(suite: Suite) -> SuiteEntry:
    assert suite.kind != "anchors"
    clusters = {item.cluster or f"\0{item.id}" for item in suite.items}
    skipped = {name: n for name, n in suite.skipped.items() if name != CONTAMINATED}
    return SuiteEntry(
        name=suite.name,
        suite_hash=suite.suite_hash,
        kind=suite.kind,
        source=suite.source or None,
        license=suite.license,
        n_items=len(suite.items),
        n_clusters=len(clusters) if suite.clustered else None,
        n_skipped=skipped,
        n_contaminated=suite.skipped.get(CONTAMINATED, 0),
    )


def _instrument_entries(judged: _Judged) -> tuple[InstrumentEntry, ...]:
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


def _logits(state: _State, judged: _Judged) -> Logits:
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


def _write_items(state: _State, judged: _Judged) -> ItemsFile:
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
    state: _State, *, status: Literal["complete", "incomplete"], exit_code: Literal[0, 1, 2]
) -> Run:
    request = state.prepared.request
    return Run(
        id=str(uuid.uuid4()),
        started=state.started,
        finished=_now(),
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


def _incomplete(state: _State, error: Exception) -> Report:
    message = getattr(error, "message", None) or type(error).__name__
    request = state.prepared.request
    return Report(
        tool=Tool(version=__version__),
        run=_run(state, status="incomplete", exit_code=2),
        policy=_policy_used(request),
        models=state.models,
        suites=tuple(_suite_entry(suite) for suite in state.prepared.suites),
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


def _now() -> str:
    stamp = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return stamp.isoformat().replace("+00:00", "Z")
