"""The repair engine: plan, prepare, edit, verify, commit.

`repair` carries a plan out. Pieces are read, edited and written in a few threads (`flow`); peak
memory is a small multiple of the largest decomposed matrix, never of the model. The output appears
as a whole or not at all: it is written beside its target under another name, checked, and renamed.
An interrupted run leaves its finished weight files there, and the same command takes them up by
content.

Here: the order of things. Not here: what a method computes (`methods`), how pieces pass through
(`flow`), what the inputs were (`sources`), what is recorded (`record`), how files are written
(`realign.checkpoint.writer`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from realign.audit.canonical import sha256_json
from realign.checkpoint.headers import DTYPES
from realign.checkpoint.manifest import MANIFEST_NAME
from realign.checkpoint.writer import OutputFolder, ShardLayout, TensorSpec
from realign.errors import UsageError
from realign.progress import SILENT, Progress
from realign.repair.cache import hash_store
from realign.repair.flow import Flow
from realign.repair.layers import WeightsWorkbench
from realign.repair.patch import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Patch, build_patch
from realign.repair.plan import Plan, plan_repair
from realign.repair.preparation import NO_STATISTICS, Decomposer, Statistics, Workbench
from realign.repair.record import TensorRow, Totals, build_manifest, remarks, totals_of
from realign.repair.request import Inputs, RepairRequest, open_inputs
from realign.repair.sources import Sources
from realign.repair.stream import planned_keys
from realign.repair.verify import check_changed, check_complete, check_written

BeforeCommit = Callable[[Path], None]
Attach = Callable[[Mapping[str, Any]], Mapping[str, bytes]]
"""From the manifest to small files by relative name, which the output gets as well."""


@dataclass(frozen=True)
class RepairResult:
    """A repair that was committed."""

    plan: Plan
    output: Path
    """The folder: a checkpoint, or a LoRA adapter where a patch was asked for."""
    rows: tuple[TensorRow, ...]
    totals: Totals
    manifest: Mapping[str, Any]
    """The content of realign.json."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Run:
    """What every step of one repair needs."""

    request: RepairRequest
    plan: Plan
    inputs: Inputs
    statistics: Statistics
    sources: Sources
    """The files that are read."""
    progress: Progress
    in_flight: int | None
    attach: Attach | None
    before_commit: BeforeCommit | None

    @property
    def folders(self) -> list[Path]:
        """Where the inputs stand."""
        return [checkpoint.folder for checkpoint in self.inputs.all().values()]


def repair(
    request: RepairRequest,
    *,
    progress: Progress = SILENT,
    in_flight: int | None = None,
    attach: Attach | None = None,
    before_commit: BeforeCommit | None = None,
    decompositions: Decomposer | None = None,
) -> RepairResult:
    """Repair a fine-tune and write the result.

    Args:
        request: what to do.
        progress: shows bytes written, and remarks.
        in_flight: how many matrices are decomposed at once; None: as many as memory, processors or
            the accelerator allow. The result does not depend on it.
        attach: asked for more small files, as a picture, when the manifest's content is known; they
            are listed in it like all others. An exception of it means that nothing is committed.
        before_commit: called with the finished folder before it gets its name; an exception of it
            means that nothing is committed. The folder can be loaded like any checkpoint.
        decompositions: shared with other repairs; the result does not depend on it.

    Raises:
        UsageError, NotFoundError, HeaderError, MismatchError, NothingToDoError,
        AlreadyRepairedError, OutputError, SuiteError: see `plan.plan`.
        InputChangedError: a file of an input changed meanwhile; names it.
        ModelError: the method needs activations of a model that cannot be run.
        NonFiniteError: NaN or infinity in a checkpoint or in the result; names both.
        EmptyEditError: the repair would have changed nothing.
    """
    if request.output is None:
        raise UsageError("the repair has no output folder", "give one: -o FOLDER")
    with open_inputs(request, progress=progress) as inputs:
        plan = plan_repair(request, inputs)
        for note in (*(f"warning: {doubt}" for doubt in plan.doubts), *plan.notes):
            progress.note(note)
        read = {role: inputs.all()[role] for role in plan.inputs}
        sources = Sources(read, store=hash_store(request.cache_dir))
        try:
            statistics = prepare_statistics(request, plan, inputs, progress=progress)
            if decompositions is not None:
                statistics = replace(statistics, decompositions=decompositions)
            run = _Run(
                request,
                plan,
                inputs,
                statistics,
                sources,
                progress,
                in_flight,
                attach,
                before_commit,
            )
            return _repair_to_patch(run) if plan.patch else _repair_to_checkpoint(run)
        except Exception:
            sources.check()  # a file that changed is the reason for whatever came of it
            raise


def prepare_statistics(
    request: RepairRequest, plan: Plan, inputs: Inputs, *, progress: Progress = SILENT
) -> Statistics:
    """Let the method collect what it needs, and choose matrices by it.

    Raises:
        ModelError, SuiteError: a model that is needed cannot be run, or knows too little.
    """
    method = plan.method
    if not method.prepares():
        return NO_STATISTICS
    statistics = method.prepare(_workbench(request, plan, inputs, progress))
    return replace(statistics, selection=method.select(statistics.scores))


def _workbench(request: RepairRequest, plan: Plan, inputs: Inputs, progress: Progress) -> Workbench:
    if plan.method.reads_weights_only():
        return cast(Workbench, WeightsWorkbench(plan, inputs, progress=progress))
    from realign.repair.workbench import ModelWorkbench  # heavy: it can run models

    return ModelWorkbench(request, plan, inputs, progress=progress)


def _repair_to_checkpoint(run: _Run) -> RepairResult:
    plan = run.plan
    with _output(run, plan.layout) as output:
        rows = _flow(run).write_shards(output)
        check_complete(planned_keys(plan), rows)
        check_changed(rows, patch=False)
        output.copy_sidecars(run.inputs.finetuned)
        if plan.encode is not None:
            _encode(run, output, rows)
        return _commit(run, output, rows)


def _encode(run: _Run, output: OutputFolder, rows: Sequence[TensorRow]) -> None:
    """Write the same weights once more, as integers, into a folder of the output."""
    from realign.repair.quantise.encoding import write_encoded

    def manifest(files: Mapping[str, str], layout: Sequence[ShardLayout]) -> dict[str, Any]:
        return build_manifest(
            run.plan,
            rows=rows,
            hashes=run.sources.hashes(run.progress),
            statistics=run.statistics,
            files=files,
            layout=layout,
            command=run.request.command,
        )

    write_encoded(
        run.plan, run.inputs.finetuned, run.statistics, output, manifest, progress=run.progress
    )


def _repair_to_patch(run: _Run) -> RepairResult:
    plan = run.plan
    with _output(run, ()) as output:  # locked before the work; the weights' size comes of it
        rows, factors = _flow(run).collect_factors()
        check_complete(planned_keys(plan), rows)
        check_changed(rows, patch=True)
        strength = 1.0 if plan.strengths else plan.strength  # then it is in the factors
        patch = build_patch(factors, run.inputs.finetuned, strength=strength)
        layout = ShardLayout(ADAPTER_WEIGHTS, _specs(patch))
        output.expect((layout,))
        if not output.is_done(layout):
            with output.shard(layout) as writer:
                for name, tensor in patch.tensors.items():
                    writer.write(name, tensor)
        output.write_json(ADAPTER_CONFIG, patch.config)
        for name, content in patch.sidecars.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            output.write_bytes(name, data)
        return _commit(run, output, rows, extra={"patch": patch.record})


def _flow(run: _Run) -> Flow:
    return Flow(
        run.plan,
        run.inputs,
        run.statistics,
        progress=run.progress,
        in_flight=run.in_flight,
    )


def _output(run: _Run, layout: Sequence[ShardLayout]) -> OutputFolder:
    assert run.plan.output is not None
    return OutputFolder(
        run.plan.output,
        fingerprint=_fingerprint(run),
        layout=layout,
        inputs=run.folders,
        progress=run.progress,
    )


def _fingerprint(run: _Run) -> str:
    """What decides the output's bytes: a run with the same one may go on where this one stops."""
    manifest = build_manifest(
        run.plan,
        rows=(),
        hashes=run.sources.identities,
        statistics=run.statistics,
        files={},
        layout=(),
        command=(),
    )
    return sha256_json(manifest)


def _manifest(run: _Run, output: OutputFolder, rows: Sequence[TensorRow]) -> dict[str, Any]:
    return build_manifest(
        run.plan,
        rows=rows,
        hashes=run.sources.hashes(run.progress),
        statistics=run.statistics,
        files=output.hashes,
        layout=output.layout,
        command=run.request.command,
    )


def _commit(
    run: _Run,
    output: OutputFolder,
    rows: Sequence[TensorRow],
    *,
    extra: Mapping[str, Any] | None = None,
) -> RepairResult:
    plan = run.plan
    folder = output.partial
    output.write_index(output.layout)
    check_written(folder, [spec for shard in output.layout for spec in shard.tensors])
    manifest = _manifest(run, output, rows) | dict(extra or {})
    if run.attach is not None:
        for name, content in run.attach(manifest).items():
            output.write_bytes(name, content)
        # Again: it lists what was attached.
        manifest = _manifest(run, output, rows) | dict(extra or {})
    output.write_json(MANIFEST_NAME, manifest)
    warnings = remarks(rows)
    for warning in warnings:
        run.progress.note(warning)
    if run.before_commit is not None:
        run.before_commit(folder)
    run.sources.check()
    target = output.commit()
    totals = totals_of(rows, copied=len(plan.copies))
    return RepairResult(plan, target, tuple(rows), totals, manifest, warnings)


def _specs(patch: Patch) -> tuple[TensorSpec, ...]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return tuple(
        TensorSpec(name, names[tensor.dtype], tuple(tensor.shape))
        for name, tensor in patch.tensors.items()
    )
