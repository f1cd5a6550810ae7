"""The repair engine: plan, prepare, edit, verify, commit.

`repair` carries a plan out. A reader thread fetches the next piece while the current one is edited
and written; peak memory is a small multiple of the largest decomposed matrix, never of the model.
The output appears as a whole or not at all: it is written beside its target under another name,
checked, and renamed. An interrupted run leaves its finished weight files there, and the same
command takes them up by content.

Here: the order of things. Not here: what a method computes (`methods`), how a tensor is cut into
pieces (`stream`), what is recorded (`record`), how files are written (`realign.checkpoint.writer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from realign.audit.canonical import sha256_json
from realign.checkpoint.headers import DTYPES
from realign.checkpoint.manifest import MANIFEST_NAME
from realign.checkpoint.writer import OutputFolder, ShardLayout, TensorSpec
from realign.errors import UsageError
from realign.progress import SILENT, Progress, Task
from realign.repair.edit import Unchanged
from realign.repair.method import NO_STATISTICS, Statistics
from realign.repair.patch import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Factors,
    Patch,
    build_patch,
    factor,
)
from realign.repair.plan import Plan, plan_repair
from realign.repair.prefetch import Prefetch
from realign.repair.record import TensorRow, Totals, build_manifest, remarks, totals_of
from realign.repair.request import Inputs, RepairRequest, open_inputs
from realign.repair.stream import Editor, Piece, planned_keys, read_pieces
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
    hashes: Mapping[str, Mapping[str, str]]
    """SHA-256 of the input files, by role and name."""
    progress: Progress
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
    attach: Attach | None = None,
    before_commit: BeforeCommit | None = None,
) -> RepairResult:
    """Repair a fine-tune and write the result.

    Args:
        request: what to do.
        progress: shows bytes written, and remarks.
        attach: asked for more small files, as a picture, when the manifest's content is known; they
            are listed in it like all others. An exception of it means that nothing is committed.
        before_commit: called with the finished folder before it gets its name; an exception of it
            means that nothing is committed. The folder can be loaded like any checkpoint.

    Raises:
        UsageError, NotFoundError, HeaderError, MismatchError, NothingToDoError,
        AlreadyRepairedError, OutputError, SuiteError: see `plan.plan`.
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
        statistics = _prepare(request, plan, inputs, progress)
        hashes = _hash_inputs(plan, inputs, progress)
        run = _Run(request, plan, inputs, statistics, hashes, progress, attach, before_commit)
        return _repair_to_patch(run) if plan.patch else _repair_to_checkpoint(run)


def _prepare(request: RepairRequest, plan: Plan, inputs: Inputs, progress: Progress) -> Statistics:
    if plan.anchors is None:
        return NO_STATISTICS
    from realign.repair.workbench import ModelWorkbench  # heavy: it can run models

    return plan.method.prepare(ModelWorkbench(request, plan, inputs, progress=progress))


def _hash_inputs(plan: Plan, inputs: Inputs, progress: Progress) -> dict[str, Mapping[str, str]]:
    """Two files at a time: hashing is bound by the processor, and lets go of the interpreter."""
    everything = inputs.all()
    used = {role: everything[role] for role in plan.inputs}
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {role: pool.submit(each.file_hashes, progress) for role, each in used.items()}
        return {role: future.result() for role, future in futures.items()}


def _repair_to_checkpoint(run: _Run) -> RepairResult:
    plan = run.plan
    with _output(run, plan.layout) as output:
        rows = _write_shards(run, output)
        check_complete(planned_keys(plan), rows)
        check_changed(rows, patch=False)
        output.copy_sidecars(run.inputs.finetuned)
        return _commit(run, output, rows)


def _write_shards(run: _Run, output: OutputFolder) -> list[TensorRow]:
    """Write every weight file that is not finished yet; the rows of all of them."""
    plan = run.plan
    editor = Editor(plan, run.statistics)
    todo = [shard for shard in plan.layout if not output.is_done(shard)]
    total = sum(shard.nbytes for shard in todo)
    rows: list[TensorRow] = []
    with (
        run.progress.task("repairing", total=total, unit="B") as task,
        Prefetch(_pieces(todo, plan, run.inputs)) as prefetch,
    ):
        pieces = iter(prefetch)
        for shard in plan.layout:
            done = output.finished(shard)
            if done is not None:
                stored: Sequence[Mapping[str, Any]] = done["rows"]
                rows += [TensorRow.from_json(each) for each in stored]
            else:
                rows += _write_shard(output, shard, pieces, editor, task)
    return rows


def _write_shard(
    output: OutputFolder, shard: ShardLayout, pieces: Iterator[Piece], editor: Editor, task: Task
) -> list[TensorRow]:
    rows: list[TensorRow] = []
    left = shard.nbytes
    with output.shard(shard) as writer:
        while left:
            piece = next(pieces)
            edited = editor.edit(piece)
            writer.write(piece.pair.role.name, edited.stored)
            rows += [each.row for each in edited.done]
            left -= edited.stored.nbytes
            task.advance(edited.stored.nbytes)
            del piece, edited  # the next piece is in memory already
        writer.facts["rows"] = [row.to_json() for row in rows]
    return rows


def _pieces(shards: Sequence[ShardLayout], plan: Plan, inputs: Inputs) -> Iterator[Piece]:
    pairs = {pair.role.name: pair for pair in plan.matching.pairs}
    for shard in shards:
        for spec in shard.tensors:
            yield from read_pieces(pairs[spec.name], plan, inputs)


def _repair_to_patch(run: _Run) -> RepairResult:
    plan = run.plan
    rows, factors = _collect_factors(run)
    check_complete(planned_keys(plan), rows)
    check_changed(rows, patch=True)
    patch = build_patch(factors, run.inputs.finetuned, strength=plan.strength)
    layout = ShardLayout(ADAPTER_WEIGHTS, _specs(patch))
    with _output(run, (layout,)) as output:
        if not output.is_done(layout):
            with output.shard(layout) as writer:
                for name, tensor in patch.tensors.items():
                    writer.write(name, tensor)
        output.write_json(ADAPTER_CONFIG, patch.config)
        return _commit(run, output, rows)


def _collect_factors(run: _Run) -> tuple[list[TensorRow], dict[str, Factors]]:
    plan = run.plan
    editor = Editor(plan, run.statistics)
    rows: list[TensorRow] = []
    factors: dict[str, Factors] = {}
    edits = (piece for pair in plan.edits for piece in read_pieces(pair, plan, run.inputs))
    total = len(planned_keys(plan))
    with (
        run.progress.task("computing the patch", total=total, unit="matrices") as task,
        Prefetch(piece for piece in edits if piece.edit) as pieces,
    ):
        for piece in pieces:
            for each in editor.edit(piece).done:
                row = each.row
                if not isinstance(each.edit, Unchanged):
                    found = factor(each.slot, each.edit, max_rank=plan.max_patch_rank)
                    factors[each.slot.key] = found
                    # A patch is added in the forward pass: no cast of W' rounds it.
                    row = replace(
                        row, survival=None, patch_rank=found.rank, patch_error=found.error
                    )
                rows.append(row)
                task.advance()
    return rows, factors


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
        run.plan, rows=(), hashes=run.hashes, statistics=run.statistics, files={}, command=()
    )
    return sha256_json(manifest)


def _manifest(run: _Run, output: OutputFolder, rows: Sequence[TensorRow]) -> dict[str, Any]:
    return build_manifest(
        run.plan,
        rows=rows,
        hashes=run.hashes,
        statistics=run.statistics,
        files=output.hashes,
        command=run.request.command,
    )


def _commit(run: _Run, output: OutputFolder, rows: Sequence[TensorRow]) -> RepairResult:
    plan = run.plan
    folder = output.partial
    output.write_index(output.layout)
    check_written(folder, [spec for shard in output.layout for spec in shard.tensors])
    manifest = _manifest(run, output, rows)
    if run.attach is not None:
        for name, content in run.attach(manifest).items():
            output.write_bytes(name, content)
        manifest = _manifest(run, output, rows)  # it lists what was attached
    output.write_json(MANIFEST_NAME, manifest)
    warnings = remarks(rows)
    for warning in warnings:
        run.progress.note(warning)
    if run.before_commit is not None:
        run.before_commit(folder)
    target = output.commit()
    totals = totals_of(rows, copied=len(plan.copies))
    return RepairResult(plan, target, tuple(rows), totals, manifest, warnings)


def _specs(patch: Patch) -> tuple[TensorSpec, ...]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    return tuple(
        TensorSpec(name, names[tensor.dtype], tuple(tensor.shape))
        for name, tensor in patch.tensors.items()
    )
