"""The dial of a patch: which strengths it can have, and writing it with another one.

The factors of a plain patch stay; the dial is `lora_alpha`. Not here: opening a patch
(`patch_file`), and merging one with a strength of its own (`patch_apply`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from realign.audit.canonical import sha256_json
from realign.checkpoint.manifest import (
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    redact_command,
    tensor_list,
)
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.sidecars import folder_sidecars
from realign.checkpoint.writer import OutputFolder, ShardLayout, TensorSpec
from realign.errors import UsageError
from realign.progress import SILENT, Progress
from realign.repair.patch_content import ADAPTER_CONFIG, ADAPTER_WEIGHTS, number
from realign.repair.patch_file import PatchFile, PatchModule
from realign.repair.patch_guard import PatchGuard
from realign.repair.record import versions


def scale_patch(
    patch: PatchFile,
    output: str | Path,
    *,
    strength: float,
    command: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Path:
    """Write the patch with another strength: the dial of its repair, relative to nothing else.

    The factors stay bit for bit; only the dial in the config moves. A repaired adapter also holds
    the fine-tune's own factors, which must stay: there the repair's columns of lora_B are
    multiplied instead.

    Args:
        patch: what to scale. For an adapter that realign did not write, 1 is what it does now.
        output: the folder to write.
        strength: t of W(t) = W_f + t (W' - W_f).
        command: the command line, for the record.
        progress: shows bytes.

    Returns:
        The folder.

    Raises:
        UsageError: t is 0, not finite or out of the method's range, or the patch has parts that no
            dial reaches.
        InputChangedError: a file of the patch has changed since it was opened; nothing is written.
        OutputError: see `OutputFolder`.
    """
    check_dial(patch, strength)
    with PatchGuard(patch) as guard:
        return _scale(patch, output, strength, command, guard, progress)


def _scale(
    patch: PatchFile,
    output: str | Path,
    strength: float,
    command: Sequence[str],
    guard: PatchGuard,
    progress: Progress,
) -> Path:
    factor = strength / patch.strength
    config = dict(patch.config)
    if not patch.extends_adapter:
        config["lora_alpha"] = number(patch.lora.alpha * factor)
        config["alpha_pattern"] = {
            key: number(alpha * factor) for key, alpha in patch.lora.alpha_pattern.items()
        }
    layout = ShardLayout(
        ADAPTER_WEIGHTS,
        tuple(TensorSpec(info.name, info.dtype, info.shape) for info in patch.tensors.values()),
    )
    decides = {
        "patch": guard.facts,
        "config": config,
        "strength": strength,
        "versions": versions(),
    }
    with OutputFolder(
        output,
        fingerprint=sha256_json(decides),
        layout=(layout,),
        inputs=[patch.folder],
        progress=progress,
    ) as folder:
        if not folder.is_done(layout):
            _write_weights(patch, folder, layout, factor, progress)
        folder.write_json(ADAPTER_CONFIG, config)
        for name, path in folder_sidecars(patch.folder).items():
            folder.copy_file(path, name)
        manifest = _scaled_manifest(patch, strength=strength, factor=factor)
        manifest["scaled_from"] = {"strength": patch.strength, "sha256": guard.digest}
        manifest["command"] = list(redact_command(command))
        manifest["output"] = {"files": folder.hashes, "tensors": tensor_list((layout,))}
        folder.write_json(MANIFEST_NAME, manifest)
        guard.check()
        return folder.commit()


def check_dial(patch: PatchFile, strength: float) -> None:
    """Check that the patch can be applied with strength t.

    Raises:
        UsageError: it cannot; the message says why.
    """
    if strength == 0.0 or not math.isfinite(strength):
        raise UsageError(f"a strength of {strength:g} is no patch", "give a number other than 0")
    if strength == patch.strength:
        return
    limit = _method_limit(patch)
    if limit is not None and not 0.0 < strength <= limit:
        raise UsageError(
            f"strength = {strength:g} is out of range for {_method_name(patch)}",
            f"give a number above 0, at most {limit:g}" if limit < math.inf else "give one above 0",
        )
    if patch.extends_adapter:
        return
    if patch.lora.dora:
        raise UsageError(
            f"{patch.source} is a DoRA adapter: its effect is not proportional to a strength",
            "merge it as it is (leave out --strength)",
        )
    if patch.trained:
        raise UsageError(
            f"{patch.source} holds {patch.trained[0]}, which was trained whole: no strength of "
            "LoRA reaches it",
            "merge it as it is (leave out --strength)",
        )


def _write_weights(
    patch: PatchFile, folder: OutputFolder, layout: ShardLayout, factor: float, progress: Progress
) -> None:
    edited = {m.b.name: m for m in patch.modules} if patch.extends_adapter else {}
    files = TensorFiles()
    try:
        with (
            progress.task("scaling", total=layout.nbytes, unit="B") as task,
            folder.shard(layout) as writer,
        ):
            for spec in layout.tensors:
                tensor = files.read(patch.tensors[spec.name])
                module = edited.get(spec.name)
                if module is not None:
                    _scale_edit(tensor, module, factor)
                writer.write(spec.name, tensor)
                task.advance(spec.nbytes)
    finally:
        files.close()


def _scale_edit(b: torch.Tensor, module: PatchModule, factor: float) -> None:
    """Multiply the repair's columns of lora_B in place; they come last."""
    experts = b.shape[1] // module.rank
    columns = b.view(b.shape[0], module.rank, experts)
    columns[:, module.rank - module.edit_rank :] *= factor


def _scaled_manifest(patch: PatchFile, *, strength: float, factor: float) -> dict[str, Any]:
    if patch.manifest is None:
        return {
            "schema": MANIFEST_SCHEMA,
            "kind": "patch",
            "inputs": {"patch": {"source": patch.source, "commit": patch.commit}},
            "strength": strength,
            "versions": versions(),
        }
    manifest = dict(patch.manifest)
    size = abs(factor)
    rows: list[dict[str, Any]] = []
    for row in manifest.get("tensors", ()):
        row = dict(row)
        if row.get("outcome") == "edited":
            row["strength"] = strength
            for key in ("edit_norm", "relative_norm", "safety_share"):
                if isinstance(row.get(key), int | float):
                    row[key] *= size
        rows.append(row)
    totals = dict(manifest.get("totals", {}))
    if isinstance(totals.get("edit_norm"), int | float):
        totals["edit_norm"] *= size
    return manifest | {"strength": strength, "tensors": rows, "totals": totals}


def _method_name(patch: PatchFile) -> str | None:
    method = None if patch.manifest is None else patch.manifest.get("method")
    name: Any = cast(dict[str, Any], method).get("name") if isinstance(method, dict) else None
    return name if isinstance(name, str) else None


def _method_limit(patch: PatchFile) -> float | None:
    """The largest strength of the method behind the patch; None where it is not known here."""
    from realign.repair.registry import find_method

    name = _method_name(patch)
    if name is None:
        return None
    try:
        return find_method(name).max_strength
    except UsageError:  # a plug-in that is not installed here
        return None
