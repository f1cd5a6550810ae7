"""A LoRA patch on disk: what it holds, which model it belongs to, and its dial.

Here: opening a patch (a low-rank repair's, or any LoRA adapter), its modules with ranks and norms,
comparing the model it names with one at hand, and `scale_patch`, which writes it with another
strength. Not here: making a patch (`patch`) and merging one into a checkpoint (`patch_apply`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from realign.audit.canonical import sha256_json
from realign.checkpoint.headers import TensorInfo, read_header
from realign.checkpoint.hub import resolve
from realign.checkpoint.lora import LoraConfig, parse_lora_config
from realign.checkpoint.manifest import (
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    read_manifest,
    redact_command,
    sha256_file,
    tensor_list,
)
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.reader import Checkpoint, read_json_object
from realign.checkpoint.reference import parse_reference
from realign.checkpoint.sidecars import folder_sidecars
from realign.checkpoint.stacks import owned_parameters
from realign.checkpoint.writer import OutputFolder, ShardLayout, TensorSpec
from realign.errors import NotFoundError, UsageError
from realign.progress import SILENT, Progress
from realign.repair.patch_content import ADAPTER_CONFIG, ADAPTER_WEIGHTS, number
from realign.repair.record import versions

Belongs = Literal["yes", "no", "unknown"]

_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)(?:\.|$)")


@dataclass(frozen=True)
class PatchModule:
    """The factors of one module."""

    module: str
    layer: int | None
    rank: int
    edit_rank: int
    """The last columns of lora_B are the repair's; all of them unless the patch is an adapter that
    was repaired."""
    scale: float
    """What the product of the factors is multiplied by."""
    shape: tuple[int, int]
    """[d_out, d_in] of the product."""
    a: TensorInfo
    b: TensorInfo

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True)
class PatchFile:
    """An adapter folder, opened: config and header only."""

    source: str
    folder: Path
    commit: str | None
    config: Mapping[str, Any]
    lora: LoraConfig
    tensors: Mapping[str, TensorInfo]
    modules: tuple[PatchModule, ...]
    manifest: Mapping[str, Any] | None
    """The content of realign.json; None for an adapter that realign did not write."""

    @property
    def weights(self) -> Path:
        """The file with the factors."""
        return self.folder / ADAPTER_WEIGHTS

    @property
    def nbytes(self) -> int:
        """Size of the weight file."""
        return self.weights.stat().st_size

    @property
    def trained(self) -> tuple[str, ...]:
        """Tensors that are no LoRA factors: modules trained whole, biases, magnitudes."""
        ours = {each.name for m in self.modules for each in (m.a, m.b)}
        return tuple(name for name in self.tensors if name not in ours)

    @property
    def strength(self) -> float:
        """The dial: what the edit is multiplied by; 1 for an adapter without a record."""
        value = None if self.manifest is None else self.manifest.get("strength")
        return float(value) if isinstance(value, int | float) else 1.0

    @property
    def extends_adapter(self) -> bool:
        """Whether it holds a fine-tune's own factors beside the repair's."""
        return bool(self._record.get("extends_adapter"))

    @property
    def _record(self) -> Mapping[str, Any]:
        found = None if self.manifest is None else self.manifest.get("patch")
        return cast(Mapping[str, Any], found) if isinstance(found, Mapping) else {}

    @property
    def model_name(self) -> str | None:
        """The model that its config names."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    def model_hashes(self) -> dict[str, str]:
        """SHA-256 of the weight files of the model it was made for; empty where not recorded."""
        inputs = {} if self.manifest is None else self.manifest.get("inputs", {})
        files: Mapping[str, str] = inputs.get("finetuned", {}).get("files", {})
        under = "base/" if self.extends_adapter else ""
        return {
            name.removeprefix(under): digest
            for name, digest in files.items()
            if name.startswith(under) and name.endswith(".safetensors")
        }

    def belongs_to(self, model: Checkpoint, progress: Progress = SILENT) -> Belongs:
        """Whether the weights of `model` are those that the patch was made for."""
        expected = self.model_hashes()
        if not expected:
            return "unknown"
        hashes = model.file_hashes(progress)
        found = {name: hashes[name] for name in hashes if name.endswith(".safetensors")}
        return "yes" if sorted(found.values()) == sorted(expected.values()) else "no"


def open_patch(
    source: str | Path, *, offline: bool = False, progress: Progress = SILENT
) -> PatchFile:
    """Open a patch by folder or Hub id; the model under it is not touched.

    Raises:
        NotFoundError: nothing is there, or it is no adapter.
        CheckpointError: it is no LoRA, or malformed.
    """
    resolved = resolve(parse_reference(source), offline=offline, progress=progress)
    folder = resolved.folder
    if not (folder / ADAPTER_CONFIG).is_file():
        raise NotFoundError(
            f"{source} is no patch: it has no {ADAPTER_CONFIG}",
            "give a folder that realign repair --patch wrote, or any LoRA adapter",
        )
    config = read_json_object(folder / ADAPTER_CONFIG)
    lora = parse_lora_config(folder, config)
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise NotFoundError(f"{folder} has no {ADAPTER_WEIGHTS}", "download or export it again")
    tensors = read_header(folder / ADAPTER_WEIGHTS).tensors
    manifest = read_manifest(folder)
    return PatchFile(
        source=str(source),
        folder=folder,
        commit=resolved.commit,
        config=config,
        lora=lora,
        tensors=tensors,
        modules=_modules(tensors, lora, manifest),
        manifest=manifest,
    )


def module_norms(patch: PatchFile, progress: Progress = SILENT) -> dict[str, float]:
    """norm(s B A) by module, Frobenius, from the small Gram matrices of the factors.

    norm(B A)^2 = <B^T B, A A^T>: exact in float64 up to rounding, and never [d_out, d_in].
    """
    files = TensorFiles()
    norms: dict[str, float] = {}
    try:
        with progress.task("norms", total=len(patch.modules), unit="modules") as task:
            for each in patch.modules:
                a, b = files.read(each.a).double(), files.read(each.b).double()
                rank = each.rank
                if a.shape[0] == rank:
                    square = float(((b.T @ b) * (a @ a.T)).sum())
                else:  # a stack of experts: A expert by expert, B rank by rank
                    square = 0.0
                    experts = a.shape[0] // rank
                    bs = b.reshape(b.shape[0], rank, experts)
                    for e in range(experts):
                        ae, be = a[e * rank : (e + 1) * rank], bs[:, :, e]
                        square += float(((be.T @ be) * (ae @ ae.T)).sum())
                norms[each.module] = abs(each.scale) * math.sqrt(max(square, 0.0))
                task.advance()
    finally:
        files.close()
    return norms


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
        OutputError: see `OutputFolder`.
    """
    check_dial(patch, strength)
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
    digest = sha256_file(patch.weights)
    with OutputFolder(
        output,
        fingerprint=sha256_json({"patch": digest, "config": config, "strength": strength}),
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
        manifest["scaled_from"] = {"strength": patch.strength, "sha256": digest}
        manifest["command"] = list(redact_command(command))
        manifest["output"] = {"files": folder.hashes, "tensors": tensor_list((layout,))}
        folder.write_json(MANIFEST_NAME, manifest)
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


def _modules(
    tensors: Mapping[str, TensorInfo], lora: LoraConfig, manifest: Mapping[str, Any] | None
) -> tuple[PatchModule, ...]:
    record: Any = {} if manifest is None else manifest.get("patch") or {}
    edited: Mapping[str, int] = record.get("edit_ranks", {})
    extends = bool(record.get("extends_adapter"))
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        found = _FACTOR.fullmatch(name)
        if found is not None and len(info.shape) == 2:
            parts.setdefault(found["module"], {})[found["part"][-1]] = info
    modules: list[PatchModule] = []
    for module, pair in parts.items():
        if set(pair) != {"A", "B"}:
            continue  # what is missing is said where the factors are used
        a, b = pair["A"], pair["B"]
        module = _parameter(module, lora, parts)
        rank = lora.rank_of(module)
        layer = _LAYER.search(module)
        modules.append(
            PatchModule(
                module=module,
                layer=None if layer is None else int(layer[1]),
                rank=rank,
                edit_rank=edited.get(module, 0) if extends else rank,
                scale=lora.scale_of(module),
                shape=(b.shape[0], a.shape[1]),
                a=a,
                b=b,
            )
        )
    return tuple(modules)


def _parameter(module: str, lora: LoraConfig, parts: Mapping[str, object]) -> str:
    """The parameter behind a module of the file, where LoRA is on bare parameters.

    Those of one module wrap each other: the one defined first is the innermost "base_layer".
    """
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    owned = owned_parameters(lora, owner)
    owned = tuple(name for name in owned if not name.endswith(".weight"))
    present = [f"{owner}{'.base_layer' * depth}" for depth in reversed(range(len(owned)))]
    present = [name for name in present if name in parts]
    if len(present) != len(owned) or module not in present:
        return module
    return owned[present.index(module)]


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
