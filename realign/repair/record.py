"""What a repair leaves on record: one row per tensor, their totals, and the manifest's content.

Here: plain data that a later reader (a table, a picture, a second run) can rely on. Not here: how
the manifest is written to the output (`realign.checkpoint.manifest`). Nothing in it depends on the
clock, so that the same repair writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from realign._version import __version__
from realign.repair.apply import Effect

LOW_SURVIVAL = 0.9
"""Below this share of the edit, the output's dtype has rounded much of it away."""

Outcome = Literal["edited", "unchanged"]


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """What happened to one logical matrix (or to one tensor, for element-wise methods)."""

    key: str
    """The slot's key: the tensor's name, with the block in brackets where it is one of several."""
    tensor: str
    module: str
    layer: int | None
    outcome: Outcome
    reason: str = ""
    """Why it is unchanged."""
    edit: Literal["low-rank", "dense", ""] = ""
    strength: float = 1.0
    numel: int = 0
    changed: int = 0
    """Entries that differ from the fine-tune's in the output."""
    edit_norm: float | None = None
    """norm(E), Frobenius."""
    relative_norm: float | None = None
    """norm(E) / norm(W_f)."""
    safety_share: float | None = None
    """norm(E) / norm(delta_safe)."""
    cos_task: float | None = None
    """cos(E, delta_task)."""
    survival: float | None = None
    """<R, E> / <E, E>, R being what the output's dtype keeps of E."""
    patch_rank: int | None = None
    """Rank in the LoRA patch, where one is written."""
    patch_error: float | None = None
    """norm(E - patch) / norm(E), where the patch is truncated."""
    facts: Mapping[str, float | int | str | None] = field(default_factory=dict[str, Any])
    """What the method says: rank, entropy, kept_energy and the like."""

    def to_json(self) -> dict[str, Any]:
        """The row as JSON."""
        return {
            **{each.name: getattr(self, each.name) for each in dataclasses.fields(self)},
            "facts": {name: _plain(value) for name, value in self.facts.items()},
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> TensorRow:
        """The row of `to_json`."""
        return TensorRow(**value)


def edited_row(
    *,
    key: str,
    tensor: str,
    module: str,
    layer: int | None,
    edit: Literal["low-rank", "dense"],
    strength: float,
    effect: Effect,
    facts: Mapping[str, float | int | str | None],
) -> TensorRow:
    """The row of an edit that was applied."""
    return TensorRow(
        key=key,
        tensor=tensor,
        module=module,
        layer=layer,
        outcome="edited",
        edit=edit,
        strength=strength,
        numel=effect.numel,
        changed=effect.changed,
        edit_norm=math.sqrt(effect.edit_sq),
        relative_norm=effect.relative_norm,
        safety_share=effect.safety_share,
        cos_task=effect.cos_task,
        survival=effect.survival,
        facts=dict(facts),
    )


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The rows of a whole run, summed up."""

    edited: int
    """Matrices whose stored values changed, or will by the patch."""
    unchanged: int
    copied: int
    """Tensors outside the edit list."""
    parameters_changed: int
    edit_norm: float
    """Frobenius norm over all edits."""
    mean_rank: float | None
    low_survival: tuple[str, ...]
    """Keys whose survival is below `LOW_SURVIVAL`."""

    def to_json(self) -> dict[str, Any]:
        """The totals as JSON."""
        return dataclasses.asdict(self) | {"low_survival": list(self.low_survival)}


def totals_of(rows: Sequence[TensorRow], *, copied: int) -> Totals:
    """Sum the rows up."""
    edited = [row for row in rows if row.outcome == "edited"]
    ranks = [float(rank) for row in edited if isinstance(rank := row.facts.get("rank"), int)]
    return Totals(
        edited=len(edited),
        unchanged=len(rows) - len(edited),
        copied=copied,
        parameters_changed=sum(row.changed for row in rows),
        edit_norm=math.sqrt(sum((row.edit_norm or 0.0) ** 2 for row in edited)),
        mean_rank=sum(ranks) / len(ranks) if ranks else None,
        low_survival=tuple(
            row.key for row in edited if row.survival is not None and row.survival < LOW_SURVIVAL
        ),
    )


def versions() -> dict[str, str]:
    """What computed the result: realign, Python and the libraries that do arithmetic or files."""
    found = {"realign": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # pragma: no cover (all four are dependencies)
            continue
    return found


def _plain(value: float | int | str | None) -> float | int | str | None:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
