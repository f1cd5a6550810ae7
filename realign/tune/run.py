"""A tuning from request to result: split, search, choose, write, audit on held-out prompts.

Here: the order of things. Not here: any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from realign._version import __version__
from realign.audit.canonical import sha256_json
from realign.audit.contamination import PromptIndex, overlap
from realign.audit.prepare import CONTAMINATED, prepare
from realign.audit.request import AuditRequest
from realign.audit.suites import Suite
from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.layouts import original
from realign.errors import OutputError, UsageError
from realign.model.loading import load_model
from realign.progress import SILENT, Progress
from realign.repair.engine import prepare_statistics
from realign.repair.plan import Plan, plan_repair
from realign.repair.plan_anchors import load_anchors
from realign.repair.record import versions
from realign.repair.request import Inputs, open_inputs
from realign.repair.texts import load_texts
from realign.repair.workbench import model_identity
from realign.tune.bounds import AS_IT_IS
from realign.tune.edits import check_patchable, compute_edits
from realign.tune.final import output_of, run_final
from realign.tune.folder import locked
from realign.tune.measure import Meter
from realign.tune.points import best_of, top_strength
from realign.tune.request import TuneRequest, check_request, check_sizes
from realign.tune.result import TuneResult, build_result
from realign.tune.scaled import ScaledModel
from realign.tune.search import search
from realign.tune.split import Split, pair_suites, split_suites
from realign.tune.strengths import Group, Strengths, group_layers, strengths_at
from realign.tune.study import StudyFile, require_optuna
from realign.words import counted


def tune(request: TuneRequest, *, progress: Progress = SILENT) -> TuneResult:
    """Find the strength that restores the most safety within the limits, and prove it elsewhere.

    The study, the result and, if limits hold on held-out prompts, the repaired checkpoint are
    written into `request.out`; the same request goes on where an interrupted one stopped.

    Raises:
        UsageError, SuiteError: the request does not fit together; nothing was written.
        MissingExtraError: optuna is not installed.
        OutputError: the folder is not a tuning's, is in use, or holds a repaired checkpoint.
        RealignError: whatever a repair or an audit may raise.
    """
    check_request(request)
    require_optuna()
    with open_inputs(request.repair, progress=progress) as inputs:
        planned = replace(request.repair, output=None, strength=1.0, strengths=None)
        plan = plan_repair(planned, inputs)
        top = top_strength(request.max_strength, bound=plan.method.max_strength)
        groups = group_layers((pair.role.layer for pair in plan.edits), request.groups)
        split, dropped = _split(request, plan)
        for side, suites in (("tuning", split.tuning), ("held-out", split.held_out)):
            check_sizes(suites, request.limits, side=side)
        judges = _judges(request, split)
        for note in plan.notes:
            progress.note(note)
        with locked(request.out):
            if output_of(request).exists():
                raise OutputError(
                    f"{output_of(request)} exists already: this tuning is done",
                    "choose another -o, or remove that folder to look further",
                )
            about = _about(request, plan, inputs, split, top=top, progress=progress)
            study = StudyFile(
                request.out, about=about, limits=request.limits, groups=len(groups), top=top
            )
            ended = _search(request, planned, plan, inputs, split, judges, groups, study, progress)
            return _finish(
                request, plan, split, judges, groups, study, progress,
                adapter=isinstance(inputs.finetuned, AdapterCheckpoint),
                top=top, ended=ended, dropped=dropped,
            )  # fmt: skip


def _search(
    request: TuneRequest,
    planned: Any,
    plan: Plan,
    inputs: Inputs,
    split: Split,
    judges: Mapping[str, str],
    groups: Sequence[Group],
    study: StudyFile,
    progress: Progress,
) -> str:
    done = len(study.trials())
    if done >= request.trials and study.finetuned is not None:
        return counted(done, "trial")
    statistics = prepare_statistics(planned, plan, inputs, progress=progress)
    edits = compute_edits(plan, inputs, statistics, progress=progress)
    if plan.patch:
        check_patchable(edits, inputs)
    with (
        load_model(original(inputs.finetuned), device=request.repair.device, merge=True) as loaded,
        ScaledModel(loaded, edits) as scaled,
        Meter(
            loaded,
            split.tuning,
            judges,
            batch_size=request.batch_size,
            max_new_tokens=request.max_new_tokens,
            progress=progress,
        ) as meter,
    ):
        return search(study, scaled, meter, groups=groups, request=request, progress=progress)


def _finish(
    request: TuneRequest,
    plan: Plan,
    split: Split,
    judges: Mapping[str, str],
    groups: Sequence[Group],
    study: StudyFile,
    progress: Progress,
    *,
    adapter: bool,
    top: float,
    ended: str,
    dropped: int,
) -> TuneResult:
    trials, finetuned = study.trials(), study.finetuned
    assert finetuned is not None
    best = best_of(trials, finetuned, request.limits)
    chosen: tuple[Any, Strengths] | None = None
    final = None
    if best is not None:
        chosen = (best, strengths_at(best.point, groups))
        study.count_final_run()
        final = run_final(
            request,
            chosen[1],
            suites=split.held_out,
            judges=judges,
            adapter=adapter,
            progress=progress,
        )
    result = build_result(
        request,
        plan,
        split,
        judges=judges,
        groups=groups,
        top=top,
        trials=trials,
        finetuned=finetuned,
        ended=ended,
        chosen=chosen,
        final=final,
        final_runs=study.final_runs,
        notes=_notes(request, split, dropped=dropped, final_runs=study.final_runs),
    )
    result.write(request.out)
    return result


def _split(request: TuneRequest, plan: Plan) -> tuple[Split, int]:
    """The two sides, without what the repair was calibrated on, and how much that was."""
    index = PromptIndex(_calibration(request, plan))
    dropped = 0

    def clean(suites: Sequence[Suite]) -> list[Suite]:
        nonlocal dropped
        kept: list[Suite] = []
        for suite in suites:
            found = overlap({item.id: item.prompt for item in suite.items}, index)
            dropped += found.n_contaminated
            kept.append(suite.without(found.ids, reason=CONTAMINATED))
        return kept

    suites = clean(request.suites)
    if request.final_suites:
        return pair_suites(suites, clean(request.final_suites)), dropped
    return split_suites(suites, share=request.held_out, seed=request.seed), dropped


def _calibration(request: TuneRequest, plan: Plan) -> list[str]:
    """Every prompt that the method learns from."""
    prompts: list[str] = []
    if plan.anchors is not None:
        prompts += [item.prompt for item in load_anchors(request.repair.anchors).items]
    for data, planned in plan.texts.items():
        prompts += [row.prompt for row in load_texts(planned.source, data).rows]
    return prompts


def _judges(request: TuneRequest, split: Split) -> dict[str, str]:
    """The primary judge of every suite of either side, by its name.

    Raises:
        UsageError: a judge that is not known, or that needs more than answers.
    """
    found: dict[str, str] = {}
    for suites in (split.tuning, split.held_out):
        prepared = prepare(
            AuditRequest(
                subject=request.repair.finetuned,
                suites=suites,
                out=request.out,
                judges=request.judges,
                batch_size=request.batch_size,
                max_new_tokens=request.max_new_tokens,
            )
        )
        found |= prepared.primary
    for name, judge in found.items():
        if judge == "logprob":
            raise UsageError(
                f"suite {name}: the judge logprob needs a threshold that only an audit fits",
                "tune with --judge keyword, or with a suite that carries its rule",
            )
    return found


def _about(
    request: TuneRequest,
    plan: Plan,
    inputs: Inputs,
    split: Split,
    *,
    top: float,
    progress: Progress,
) -> dict[str, Any]:
    """Everything a finished point depends on: where any of it differs, it is another study."""
    every = inputs.all()
    written = plan.to_json()
    return {
        "study": 2,  # how the journal is written
        "models": {role: model_identity(original(every[role]), progress) for role in plan.inputs},
        "method": {"name": plan.method.name, "settings": plan.method.settings()},
        "tensors": sha256_json(written["tensors"]),
        "max_patch_rank": plan.max_patch_rank if plan.patch else None,
        "texts": {data: each.sha256 for data, each in plan.texts.items()},
        "anchors": None if plan.anchors is None else plan.anchors.suite_hash,
        "tuning suites": {suite.name: suite.suite_hash for suite in split.tuning},
        "held-out suites": {suite.name: suite.suite_hash for suite in split.held_out},
        "limits": vars(request.limits),
        "groups": request.groups,
        "max_strength": top,
        "seed": request.seed,
        "judges": list(request.judges),
        "batch_size": request.batch_size,
        "max_new_tokens": request.max_new_tokens,
        "device": plan.device.partition(":")[0],
        "versions": {"realign": __version__, **versions()},
    }


def _notes(request: TuneRequest, split: Split, *, dropped: int, final_runs: int) -> list[str]:
    notes: list[str] = []
    if dropped:
        notes.append(f"{dropped} prompts left the suites: the repair was calibrated on them")
    if split.shared:
        notes.append(f"{split.shared} prompts left the held-out side: they occur in tuning, too")
    for suite in split.tuning if request.limits.confidence <= AS_IT_IS else ():
        limit = request.limits.of(suite.kind)
        if limit is not None and limit < 1 / len(suite.items) and limit < 1:
            notes.append(
                f"{suite.name}: one answer of {len(suite.items)} is {1 / len(suite.items):.1%}, "
                f"more than the limit of {limit:.1%}: the search allows no net loss there"
            )
    if final_runs > 1:
        notes.append(
            f"the held-out prompts have been looked at {final_runs} times: each time makes them "
            "less held out"
        )
    return notes
