"""A LoRA patch on disk: what it holds, and which model it belongs to.

Here: opening a patch (a low-rank repair's, or any LoRA adapter), its modules with their ranks, and
comparing the model it names with one at hand. Not here: making a patch (`patch`), looking into its
factors (`patch_inspect`), another strength (`patch_scale`), that it stays what it is while it is
read (`patch_guard`), and merging one into a checkpoint (`patch_apply`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from realign.checkpoint.headers import TensorInfo, read_header
from realign.checkpoint.hub import resolve
from realign.checkpoint.lora import LoraConfig, parse_lora_config
from realign.checkpoint.manifest import read_manifest
from realign.checkpoint.reader import Checkpoint, read_json_object
from realign.checkpoint.reference import parse_reference
from realign.checkpoint.stacks import owned_parameters
from realign.errors import NotFoundError
from realign.progress import SILENT, Progress
from realign.repair.patch_content import ADAPTER_CONFIG, ADAPTER_WEIGHTS

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
        """Bytes of its tensors."""
        return sum(info.nbytes for info in self.tensors.values())

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
