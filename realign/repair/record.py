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
from typing import TYPE_CHECKING, Any, Literal

from realign._version import __version__
from realign.checkpoint.manifest import MANIFEST_SCHEMA, redact_command, tensor_list
from realign.repair.apply import Effect

if TYPE_CHECKING:
    from realign.checkpoint.shards import ShardLayout
    from realign.repair.plan import Plan
    from realign.repair.preparation import Statistics

LOW_SURVIVAL = 0.9
"""Below this share of the edit, the output's dtype has rounded much of it away."""

ALMOST = 0.95
"""Above this share of the entries kept, a filter hardly filters."""

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


def remarks(rows: Sequence[TensorRow]) -> tuple[str, ...]:
    """What a reader of the result should be warned of."""
    found: list[str] = []

    def remark(keys: Sequence[str], text: str, advice: str) -> None:
        if keys:
            found.append(f"{len(keys)} of {len(rows)} tensors {text}, first {keys[0]}: {advice}")

    remark(
        totals_of(rows, copied=0).low_survival,
        f"keep less than {LOW_SURVIVAL:.0%} of their edit after rounding to the output's dtype",
        "a float32 fine-tune keeps it, and so does the LoRA patch of a low-rank repair (--patch)",
    )
    remark(
        [row.key for row in rows if row.facts.get("degenerate_cut")],
        "are cut between equal singular values",
        "which directions were kept is arbitrary there; another rank or eta avoids it",
    )
    remark(
        [row.key for row in rows if _number(row.facts.get("tokens_per_output"), above=1.0) < 1.0],
        "have fewer anchor tokens than outputs",
        "the rank is limited by the anchors; more of them may show more directions",
    )
    remark(
        [row.key for row in rows if (row.patch_error or 0.0) > 0.0],
        f"are truncated in the patch, the largest relative error is "
        f"{max([row.patch_error or 0.0 for row in rows], default=0.0):.3f}",
        "a larger --max-patch-rank is closer to the repair",
    )
    absolute = [row for row in rows if row.facts.get("budget") == "absolute"]
    remark(
        [row.key for row in absolute if _number(row.facts.get("kept_share"), above=0.0) > ALMOST],
        f"keep more than {ALMOST:.0%} of the task vector",
        "the budget does not bind; budget=relative scales with the size of the fine-tune",
    )
    remark(
        [row.key for row in rows if (row.relative_norm or 0.0) > 1.0],
        f"have an edit larger than the weights it edits, up to "
        f"{max([row.relative_norm or 0.0 for row in rows], default=0.0):.3g} times their norm",
        "little of the fine-tune is left there; check --strength and the method's settings",
    )
    remark(
        [row.key for row in rows if row.facts.get("pruned_more")],
        "lose more than twice the share of a row that was asked for",
        "rows of an adapter's factors are short, and at least one entry of each is pruned",
    )
    return tuple(found)


def build_manifest(
    plan: Plan,
    *,
    rows: Sequence[TensorRow],
    hashes: Mapping[str, Mapping[str, str]],
    statistics: Statistics,
    files: Mapping[str, str],
    layout: Sequence[ShardLayout],
    command: Sequence[str],
) -> dict[str, Any]:
    """The content of realign.json.

    Args:
        plan: what was done.
        rows: what came of it.
        hashes: SHA-256 of every input file, by role and relative name.
        statistics: what the method learned from a running model.
        files: SHA-256 of every file of the output.
        layout: its weight files, as they were planned.
        command: the command line, if there was one; recorded without secrets.
    """
    card = plan.method.card
    return {
        "schema": MANIFEST_SCHEMA,
        "kind": "patch" if plan.patch else "checkpoint",
        "inputs": {
            role: {
                "source": each.source,
                "commit": each.commit,
                "kind": each.kind,
                "files": dict(hashes.get(role, {})),
            }
            for role, each in plan.inputs.items()
        },
        "method": {
            "name": plan.method.name,
            "source": card.source,
            "settings": plan.method.settings(),
        },
        "safety_vector": plan.method.vector_kind,
        "scope": plan.scope,
        "strength": plan.strength,
        "strengths": {str(layer): t for layer, t in plan.strengths.items()},
        "subset": plan.subset.to_json(),
        "seed": plan.seed,
        "device": plan.device,
        "max_patch_rank": plan.max_patch_rank,
        "anchors": None if plan.anchors is None else dataclasses.asdict(plan.anchors),
        "texts": {data: dataclasses.asdict(each) for data, each in plan.texts.items()},
        "encode": plan.encode,
        "statistics": dict(statistics.provenance),
        "method_facts": {name: _plain(value) for name, value in statistics.facts.items()},
        "selection": None if statistics.selection is None else sorted(statistics.selection),
        "notes": list(plan.notes),
        "versions": versions(),
        "command": list(redact_command(command)),
        "totals": totals_of(rows, copied=len(plan.copies)).to_json(),
        "tensors": [row.to_json() for row in rows],
        "copied": {pair.role.name: pair.reason for pair in plan.copies},
        "output": {"files": dict(files), "tensors": tensor_list(layout)},
    }


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


def _number(value: float | int | str | None, *, above: float) -> float:
    """A fact as a number; what is missing counts as `above`."""
    return float(value) if isinstance(value, int | float) else above
