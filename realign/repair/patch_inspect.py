"""What a patch holds, for people and programs: modules, norms, size, and the model it belongs to.

The model that the patch names is looked for on this machine only (a folder, or the Hub's cache):
looking at a patch must not start a download. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from realign.checkpoint.manifest import sha256_file
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.errors import RealignError
from realign.progress import SILENT, Progress
from realign.repair.patch_content import rank_facts
from realign.repair.patch_file import PatchFile, PatchModule, open_patch

Match = Literal["yes", "no", "not recorded", "not here"]


@dataclass(frozen=True)
class InspectedModule:
    """One module of a patch."""

    module: PatchModule
    norm: float
    """norm(s B A)."""
    error: float
    """The largest truncation error of its matrices."""

    def to_json(self) -> dict[str, Any]:
        """The module as JSON."""
        each = self.module
        return {
            "module": each.module,
            "layer": each.layer,
            "rank": each.rank,
            "edit_rank": each.edit_rank,
            "shape": list(each.shape),
            "scale": each.scale,
            "norm": self.norm,
            "error": self.error,
            "nbytes": each.nbytes,
        }


@dataclass(frozen=True)
class Inspection:
    """Everything that is known about a patch."""

    patch: PatchFile
    modules: tuple[InspectedModule, ...]
    model_found: Match
    """Whether the model it names has the recorded hashes; "not here": it is not on this machine."""
    model_bytes: int | None
    sha256: str

    @property
    def percent(self) -> float | None:
        """Size of the patch in percent of its model's tensors."""
        return None if not self.model_bytes else 100 * self.patch.nbytes / self.model_bytes

    @property
    def error(self) -> float:
        """The largest truncation error; 0 where the patch is exact."""
        return max((each.error for each in self.modules), default=0.0)

    @property
    def ranks(self) -> dict[str, Any]:
        """Ranks of the edited modules in the file, and the fine-tune's and the repair's parts."""
        modules = [each.module for each in self.modules]
        return rank_facts(
            {each.module: each.rank for each in modules},
            {each.module: each.edit_rank for each in modules},
        )

    @property
    def origin(self) -> Mapping[str, Any]:
        """Source repair: method, settings, safety vector; empty for other adapters."""
        manifest = self.patch.manifest or {}
        method: Any = manifest.get("method")
        if not isinstance(method, dict):
            return {}
        inputs = cast(dict[str, dict[str, Any]], manifest.get("inputs", {}))
        return {
            "method": cast(dict[str, Any], method).get("name"),
            "settings": cast(dict[str, Any], method).get("settings", {}),
            "safety_vector": manifest.get("safety_vector"),
            "inputs": {
                role: {"source": each.get("source"), "commit": each.get("commit")}
                for role, each in inputs.items()
            },
            "realign": manifest.get("versions", {}).get("realign"),
        }

    def to_json(self) -> dict[str, Any]:
        """The inspection as JSON."""
        patch = self.patch
        return {
            "schema": "realign/patch-inspection/1",
            "patch": patch.source,
            "commit": patch.commit,
            "sha256": self.sha256,
            "model": patch.model_name,
            "revision": patch.config.get("revision"),
            "model_has_recorded_hash": self.model_found,
            "origin": dict(self.origin),
            "strength": patch.strength,
            "repaired_adapter": patch.extends_adapter,
            "nbytes": patch.nbytes,
            "model_bytes": self.model_bytes,
            "percent_of_model": self.percent,
            "exact": self.error == 0.0,
            "error": self.error,
            **self.ranks,
            "modules": [each.to_json() for each in self.modules],
            "trained": list(patch.trained),
        }


def inspect_patch(
    source: str | Path, *, offline: bool = False, progress: Progress = SILENT
) -> Inspection:
    """Open a patch and compare the model it names, where that is on this machine.

    Raises:
        NotFoundError, CheckpointError: see `open_patch`.
    """
    patch = open_patch(source, offline=offline, progress=progress)
    norms = module_norms(patch, progress)
    errors = _errors(patch)
    modules = tuple(
        InspectedModule(each, norms[each.module], errors.get(_plain(each.module), 0.0))
        for each in sorted(patch.modules, key=lambda m: (m.layer is None, m.layer or 0, m.module))
    )
    found: Match = "not here"
    nbytes = _recorded_bytes(patch)
    model = _open_model(patch)
    if not patch.model_hashes():
        found = "not recorded"
    if model is not None:
        with model:
            nbytes = sum(info.nbytes for info in model.tensors.values())
            if found != "not recorded":
                found = "yes" if patch.belongs_to(model, progress) == "yes" else "no"
    return Inspection(patch, modules, found, nbytes, sha256_file(patch.weights))


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


def _open_model(patch: PatchFile) -> Checkpoint | None:
    name = patch.model_name
    if name is None:
        return None
    revision = patch.config.get("revision")
    places = [name, str(patch.folder / name)]
    if isinstance(revision, str) and revision:
        places.insert(0, f"{name}@{revision}")
    for place in places:
        try:
            return open_checkpoint(place, offline=True)
        except RealignError:
            continue
    return None


def _recorded_bytes(patch: PatchFile) -> int | None:
    record: Any = (patch.manifest or {}).get("patch")
    value = cast(dict[str, Any], record).get("model_bytes") if isinstance(record, dict) else None
    return value if isinstance(value, int) else None


def _errors(patch: PatchFile) -> dict[str, float]:
    """The largest truncation error by module name, from the rows of the record."""
    errors: dict[str, float] = {}
    for row in (patch.manifest or {}).get("tensors", ()):
        error = row.get("patch_error")
        if isinstance(error, int | float) and error > 0:
            name = _plain(str(row.get("tensor", "")).removesuffix(".weight"))
            errors[name] = max(errors.get(name, 0.0), float(error))
    return errors


def _plain(module: str) -> str:
    """A module's name without what a causal model puts before a bare decoder's names."""
    for prefix in ("model.", "transformer.", "base_model."):
        module = module.removeprefix(prefix)
    return module
