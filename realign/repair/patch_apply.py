"""A patch merged into a checkpoint: W' = W_f + t B A in float32, added once and rounded once.

The output is an ordinary checkpoint in the layout of the model, written like a repair's: streamed,
resumable, whole or not at all, with a manifest that names model and patch. Any LoRA adapter can be
applied; one that realign wrote also says which model it belongs to, and that is checked.

The model is read once: it is hashed while it is merged. Whether the patch belongs to it is checked
first where its hashes are known from an earlier run or soon had, and before the commit otherwise:
a patch for another model never becomes an output. Nor does one of which a file changed meanwhile.

Here: the order of things and what is recorded. Not here: the tensors (`patch_merge`), opening a
patch (`patch_file`), watching the files (`sources`, `patch_guard`).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.audit.canonical import sha256_json
from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.manifest import (
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    read_manifest,
    redact_command,
    tensor_list,
)
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.writer import OutputFolder, check_target, plan_layout
from realign.errors import AlreadyRepairedError, MismatchError, UsageError
from realign.progress import SILENT, Progress
from realign.repair.cache import hash_store
from realign.repair.patch_content import ADAPTER_WEIGHTS
from realign.repair.patch_file import PatchFile, open_patch
from realign.repair.patch_guard import PatchGuard
from realign.repair.patch_merge import Merger
from realign.repair.patch_scale import check_dial
from realign.repair.record import TensorRow, Totals, remarks, totals_of, versions
from realign.repair.sources import Sources
from realign.repair.verify import check_changed, check_written

HASHED_FIRST_BYTES = 256 * 2**20
"""Where no more than this is to be read for it, the model is hashed before the merge: reading it
again comes from memory, and a patch for another model is refused at once."""


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
        InputChangedError: a file of the model or of the patch changed meanwhile; names it.
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
            f"scale the repair first: realign patch scale {shlex.quote(str(patch.source))} "
            f"--strength {strength:g} -o SCALED",
        )
    with (
        open_checkpoint(request.model, offline=request.offline, progress=progress) as model,
        PatchGuard(patch) as guard,
    ):
        check_target(Path(request.output).expanduser(), [model.folder, patch.folder])
        _check_first(patch, model, guard.digest, force=request.force)
        sources = Sources({"finetuned": model}, store=hash_store())
        try:
            return _Run(request, patch, strength, model, guard, sources, progress).carry_out()
        except Exception:
            sources.check()  # a file that changed is the reason for whatever came of it
            raise


@dataclass(frozen=True)
class _Run:
    request: ApplyRequest
    patch: PatchFile
    strength: float
    model: Checkpoint
    guard: PatchGuard
    sources: Sources
    progress: Progress

    def carry_out(self) -> ApplyResult:
        early = self.sources.unhashed() <= HASHED_FIRST_BYTES
        notes = self._check_belongs() if early else []
        merged = AdapterCheckpoint(
            self.patch.folder, base=self.model, source=self.patch.source, commit=self.patch.commit
        )
        for note in merged.remarks[len(self.model.remarks) :]:
            self.progress.note(note)
        factor = self.strength / self.patch.strength
        layout = plan_layout(merged)
        with OutputFolder(
            self.request.output,
            fingerprint=self._fingerprint(),
            layout=layout,
            inputs=[self.model.folder, self.patch.folder],
            progress=self.progress,
        ) as output:
            rows = Merger(merged, strength=self.strength, factor=factor).write_shards(
                output, layout, progress=self.progress
            )
            if not early:
                notes = self._check_belongs()
            check_changed(rows, patch=False)
            output.copy_sidecars(merged)
            output.write_index(layout)
            check_written(output.partial, [spec for shard in layout for spec in shard.tensors])
            edited = {row.tensor for row in rows}
            copied = [name for name in merged.tensors if name not in edited]
            manifest = self._manifest(rows, copied, notes, output)
            output.write_json(MANIFEST_NAME, manifest)
            for warning in remarks(rows):
                self.progress.note(warning)
            self.sources.check()
            self.guard.check()
            target = output.commit()
        totals = totals_of(rows, copied=len(copied))
        return ApplyResult(
            self.patch, target, self.strength, tuple(rows), totals, manifest, tuple(notes)
        )

    def _fingerprint(self) -> str:
        """What decides the output's bytes: a run with the same one may go on where this stops."""
        return sha256_json(
            {
                "inputs": self.sources.identities,
                "patch": self.guard.facts,
                "strength": self.strength,
                "versions": versions(),
            }
        )

    def _check_belongs(self) -> list[str]:
        """Check that the patch was made for this model; returns what else is to be said."""
        patch, model = self.patch, self.model
        belongs = patch.belongs_to(model, self.progress)
        if belongs == "yes":
            return []
        other = f"{patch.source} was made for other weights than those of {model.source}"
        if belongs == "unknown":
            other = (
                f"{patch.source} does not record the model it was made for: whether it belongs to "
                f"{model.source} is not checked"
            )
        elif not self.request.force:
            raise MismatchError(
                f"{patch.source} was made for {patch.model_name or 'another model'}: its record "
                f"names other weights than those of {model.source}",
                "give the model it was made for (realign patch inspect names it), or --force",
            )
        self.progress.note(other)
        return [other]

    def _manifest(
        self,
        rows: Sequence[TensorRow],
        copied: Sequence[str],
        notes: Sequence[str],
        output: OutputFolder,
    ) -> dict[str, Any]:
        made = self.patch.manifest or {}
        return {
            "schema": MANIFEST_SCHEMA,
            "kind": "checkpoint",
            "inputs": {
                "finetuned": _input(self.model, self.sources.hashes(self.progress)["finetuned"]),
                "patch": {
                    "source": self.patch.source,
                    "commit": self.patch.commit,
                    "kind": "patch",
                    "files": {ADAPTER_WEIGHTS: self.guard.digest},
                },
            },
            # A second repair by the method behind the patch is a second repair.
            "method": made.get("method") or {"name": "patch", "source": "", "settings": {}},
            "safety_vector": made.get("safety_vector"),
            "scope": made.get("scope"),
            "strength": self.strength,
            "patch": {"sha256": self.guard.digest, "source": self.patch.source},
            "notes": list(notes),
            "versions": versions(),
            "command": list(redact_command(self.request.command)),
            "totals": totals_of(rows, copied=len(copied)).to_json(),
            "tensors": [row.to_json() for row in rows],
            "copied": dict.fromkeys(copied, "not in the patch"),
            "output": {"files": output.hashes, "tensors": tensor_list(output.layout)},
        }


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
