"""A patch merged into a checkpoint: W' = W_f + t B A in float32, added once and rounded once.

The output is an ordinary checkpoint in the layout of the model, written like a repair's: streamed,
resumable, whole or not at all, with a manifest that names model and patch. Any LoRA adapter can be
applied; one that realign wrote also says which model it belongs to, and that is checked. Here: the
order of things and what is recorded. Not here: the arithmetic (`apply`, `realign.checkpoint.lora`)
and opening a patch (`patch_file`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from realign.audit.canonical import sha256_json
from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.lora import Factors
from realign.checkpoint.manifest import (
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    read_manifest,
    redact_command,
    sha256_file,
    tensor_list,
)
from realign.checkpoint.names import role_of
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.writer import OutputFolder, ShardLayout, check_target, plan_layout
from realign.errors import AlreadyRepairedError, MismatchError, UsageError
from realign.progress import SILENT, Progress, Task
from realign.repair.apply import Effect, apply_edit, row_chunks
from realign.repair.edit import LowRank
from realign.repair.estimate import STREAM_BYTES
from realign.repair.patch_file import PatchFile, check_dial, open_patch
from realign.repair.record import TensorRow, Totals, edited_row, remarks, totals_of, versions
from realign.repair.verify import check_changed, check_input, check_output, check_written


@dataclass(frozen=True, kw_only=True)
class ApplyRequest:
    """One patch to merge, as a user words it."""

    patch: str | Path
    model: str | Path
    output: str | Path
    """The folder to write."""
    strength: float | None = None
    """The dial t; None takes the patch's own."""
    force: bool = False
    """Apply it to another model than its own, or a second time."""
    offline: bool = False
    command: Sequence[str] = ()


@dataclass(frozen=True)
class ApplyResult:
    """A patch that was merged and committed."""

    patch: PatchFile
    output: Path
    strength: float
    rows: tuple[TensorRow, ...]
    totals: Totals
    manifest: Mapping[str, Any]
    notes: tuple[str, ...]


def apply_patch(request: ApplyRequest, *, progress: Progress = SILENT) -> ApplyResult:
    """Merge a patch into a model and write the checkpoint.

    Raises:
        NotFoundError, CheckpointError: patch or model cannot be opened, or do not fit each other.
        MismatchError: the patch was made for another model.
        AlreadyRepairedError: the model holds this patch already.
        UsageError: a strength that cannot be applied.
        OutputError: see `OutputFolder`.
        NonFiniteError: NaN or infinity in the model, the patch or the result.
        EmptyEditError: nothing of the patch survives rounding.
    """
    patch = open_patch(request.patch, offline=request.offline, progress=progress)
    strength = patch.strength if request.strength is None else request.strength
    check_dial(patch, strength)
    if patch.extends_adapter and strength != patch.strength:
        raise UsageError(
            f"{patch.source} holds a fine-tune and its repair in one adapter: a strength would "
            "scale both",
            f"scale the repair first: realign patch scale {patch.source} --strength {strength:g} "
            "-o SCALED",
        )
    with open_checkpoint(request.model, offline=request.offline, progress=progress) as model:
        check_target(Path(request.output).expanduser(), [model.folder, patch.folder])
        digest = sha256_file(patch.weights)
        _check_first(patch, model, digest, force=request.force)
        notes = _check_belongs(patch, model, force=request.force, progress=progress)
        merged = AdapterCheckpoint(
            patch.folder, base=model, source=patch.source, commit=patch.commit
        )
        for note in (*notes, *merged.remarks[len(model.remarks) :]):
            progress.note(note)
        run = _Merge(request, patch, strength, merged, model, digest, progress)
        return run.carry_out(notes)


@dataclass(frozen=True)
class _Merge:
    request: ApplyRequest
    patch: PatchFile
    strength: float
    merged: AdapterCheckpoint
    model: Checkpoint
    digest: str
    progress: Progress

    @property
    def factor(self) -> float:
        """What the scales in the config are multiplied by."""
        return self.strength / self.patch.strength

    def carry_out(self, notes: Sequence[str]) -> ApplyResult:
        layout = plan_layout(self.merged)
        hashes = dict(self.model.file_hashes(self.progress))
        inputs = {
            "finetuned": _input(self.model, hashes),
            "patch": {
                "source": self.patch.source,
                "commit": self.patch.commit,
                "kind": "patch",
                "files": {"adapter_model.safetensors": self.digest},
            },
        }
        with OutputFolder(
            self.request.output,
            fingerprint=sha256_json({"inputs": inputs, "strength": self.strength}),
            layout=layout,
            inputs=[self.model.folder, self.patch.folder],
            progress=self.progress,
        ) as output:
            rows = self._write(output, layout)
            check_changed(rows, patch=False)
            output.copy_sidecars(self.merged)
            output.write_index(layout)
            check_written(output.partial, [spec for shard in layout for spec in shard.tensors])
            manifest = self._manifest(inputs, rows, notes, output, layout)
            output.write_json(MANIFEST_NAME, manifest)
            for warning in remarks(rows):
                self.progress.note(warning)
            target = output.commit()
        totals = totals_of(rows, copied=len(self.merged.tensors) - len(rows))
        return ApplyResult(
            self.patch, target, self.strength, tuple(rows), totals, manifest, tuple(notes)
        )

    def _write(self, output: OutputFolder, layout: Sequence[ShardLayout]) -> list[TensorRow]:
        rows: list[TensorRow] = []
        total = sum(shard.nbytes for shard in layout if not output.is_done(shard))
        with self.progress.task("applying the patch", total=total, unit="B") as task:
            for shard in layout:
                done = output.finished(shard)
                if done is not None:
                    rows += [TensorRow.from_json(each) for each in done["rows"]]
                    continue
                written: list[TensorRow] = []
                with output.shard(shard) as writer:
                    for spec in shard.tensors:
                        found = self._write_tensor(writer, spec.name, task)
                        written += [] if found is None else [found]
                    writer.facts["rows"] = [row.to_json() for row in written]
                rows += written
        return rows

    def _write_tensor(self, writer: Any, name: str, task: Task) -> TensorRow | None:
        how = self.merged.changes(name)
        if how == "none":
            for rows in self._chunks(name):
                stored = self.model.read(name, rows)
                self._check_input(name, stored)
                writer.write(name, stored)
                task.advance(stored.nbytes)
            return None
        effect = Effect()
        rank: int | None = None
        if how == "product":
            factors = self.merged.factors(name)
            for part in (tensor for each in factors for tensor in (each.a, each.b)):
                check_input(part, name=name, role="patch", source=self.patch.source)
            rank = sum(each.b.shape[-1] for each in factors)
            stored, effect = self._add(name, factors)
            check_output(stored, name=name, dtype=str(stored.dtype))
            writer.write(name, stored)
            task.advance(stored.nbytes)
        else:
            for rows in self._chunks(name):
                stored = self.merged.read(name, rows)
                check_output(stored, name=name, dtype=str(stored.dtype))
                effect = effect + self._difference(name, rows, stored)
                writer.write(name, stored)
                task.advance(stored.nbytes)
        role = role_of(self.merged.tensors[name])
        row = edited_row(
            key=name,
            tensor=name,
            module=role.module,
            layer=role.layer,
            edit="dense" if rank is None else "low-rank",
            strength=self.strength,
            effect=effect,
            facts={} if rank is None else {"rank": rank},
        )
        # Of a tensor that was trained whole only the result is known, not what was rounded away.
        return row if rank is not None else replace(row, survival=None)

    def _add(self, name: str, factors: Sequence[Factors]) -> tuple[Tensor, Effect]:
        """W + t B A of one whole tensor: the same sums as the repair that made the factors."""
        finetuned = self.model.read(name)
        self._check_input(name, finetuned)
        stored = torch.empty_like(finetuned)
        effect = Effect()
        for view, edit, scale in _products(factors):
            result, one = apply_edit(view(finetuned), edit, strength=scale * self.factor)
            view(stored).copy_(result)
            effect = effect + one
        return stored, effect

    def _difference(self, name: str, rows: tuple[int, int] | None, stored: Tensor) -> Effect:
        """What a tensor that was trained whole changes; a new or resized one changes throughout."""
        old = self.model.tensors.get(name)
        if old is None or old.shape != self.merged.tensors[name].shape:
            return Effect(numel=stored.numel(), changed=stored.numel())
        before = self.model.read(name, rows).double()
        moved = stored.double() - before
        return Effect(
            numel=moved.numel(),
            changed=int(torch.count_nonzero(moved)),
            max_edit=float(moved.abs().max()) if moved.numel() else 0.0,
            edit_sq=float(moved.square().sum()),
            finetuned_sq=float(before.square().sum()),
        )

    def _check_input(self, name: str, tensor: Tensor) -> None:
        if role_of(self.model.tensors[name]).kind != "buffer":
            check_input(tensor, name=name, role="fine-tuned", source=self.model.source)

    def _chunks(self, name: str) -> list[tuple[int, int] | None]:
        info = self.merged.tensors[name]
        if not info.shape:
            return [None]
        width = max(1, info.nbytes // max(1, info.numel))
        return list(row_chunks(info.shape, STREAM_BYTES // width))

    def _manifest(
        self,
        inputs: Mapping[str, Any],
        rows: Sequence[TensorRow],
        notes: Sequence[str],
        output: OutputFolder,
        layout: Sequence[ShardLayout],
    ) -> dict[str, Any]:
        made = self.patch.manifest or {}
        edited = {row.tensor for row in rows}
        names = [name for name in self.merged.tensors if name not in edited]
        return {
            "schema": MANIFEST_SCHEMA,
            "kind": "checkpoint",
            "inputs": inputs,
            # A second repair by the method behind the patch is a second repair.
            "method": made.get("method") or {"name": "patch", "source": "", "settings": {}},
            "safety_vector": made.get("safety_vector"),
            "scope": made.get("scope"),
            "strength": self.strength,
            "patch": {"sha256": self.digest, "source": self.patch.source},
            "notes": list(notes),
            "versions": versions(),
            "command": list(redact_command(self.request.command)),
            "totals": totals_of(rows, copied=len(names)).to_json(),
            "tensors": [row.to_json() for row in rows],
            "copied": dict.fromkeys(names, "not in the patch"),
            "output": {"files": output.hashes, "tensors": tensor_list(layout)},
        }


def _products(
    factors: Sequence[Factors],
) -> Iterator[tuple[Callable[[Tensor], Tensor], LowRank, float]]:
    """Views of a stored tensor, each with the one product that is added to it."""
    if len(factors) == 1:
        (only,) = factors
        if only.stacked:
            for e in range(only.rows):
                yield _expert(e, only.transposed), LowRank(only.b[e], only.a[e]), only.scale
            return
        yield _upright(only.transposed), LowRank(only.b, only.a), only.scale
        return
    # Both sides of tied embeddings: one sum, so that the matrix is rounded once.
    left = [(each.a.T if each.transposed else each.b) * each.scale for each in factors]
    right = [each.b.T if each.transposed else each.a for each in factors]
    yield _upright(False), LowRank(torch.cat(left, 1), torch.cat(right)), 1.0


def _expert(index: int, transposed: bool) -> Callable[[Tensor], Tensor]:
    return (lambda stored: stored[index].T) if transposed else (lambda stored: stored[index])


def _upright(transposed: bool) -> Callable[[Tensor], Tensor]:
    return (lambda stored: stored.T) if transposed else (lambda stored: stored)


def _input(model: Checkpoint, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "source": model.source,
        "commit": model.commit,
        "kind": model.kind,
        "files": dict(hashes),
    }


def _check_first(patch: PatchFile, model: Checkpoint, digest: str, *, force: bool) -> None:
    manifest = read_manifest(model.folder)
    done: Any = None if manifest is None else manifest.get("patch")
    if force or not isinstance(done, dict):
        return
    if cast(dict[str, Any], done).get("sha256") == digest:
        raise AlreadyRepairedError(
            f"{patch.source} has been applied to {model.source} already (see its realign.json)",
            "to change its strength, apply it to the fine-tune again; --force adds it once more",
        )


def _check_belongs(
    patch: PatchFile, model: Checkpoint, *, force: bool, progress: Progress
) -> list[str]:
    belongs = patch.belongs_to(model, progress)
    if belongs == "yes":
        return []
    if belongs == "unknown":
        return [
            f"{patch.source} does not record the model it was made for: whether it belongs to "
            f"{model.source} is not checked"
        ]
    if not force:
        raise MismatchError(
            f"{patch.source} was made for {patch.model_name or 'another model'}: its record names "
            f"other weights than those of {model.source}",
            "give the model it was made for (realign patch inspect names it), or --force",
        )
    return [f"{patch.source} was made for other weights than those of {model.source}"]
