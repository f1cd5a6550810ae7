"""A patch on a terminal: its facts, and rank, norm and error layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from realign.checkpoint.space import size_text
from realign.report.repair import settings_text, vector_text
from realign.report.tables import plain_table
from realign.report.words import MISSING, number

if TYPE_CHECKING:
    from rich.console import RenderableType

    from realign.repair.patch_inspect import InspectedModule, Inspection

_BAR = 16
"""Width of the longest bar."""

_MATCH = {
    "yes": "yes: the weights have the recorded hashes",
    "no": "NO: the weights there are not those it was made for",
    "not recorded": "unknown: the patch records no hashes",
    "not here": "unknown: the model is not on this machine",
}


def patch_facts(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return rank and size of the patch that a manifest describes; None for a checkpoint."""
    record: Mapping[str, Any] | None = manifest.get("patch")
    if record is None or manifest.get("kind") != "patch":
        return None
    whole = record["model_bytes"]
    facts = {key: value for key, value in record.items() if key != "edit_ranks"}
    return {
        **facts,
        "percent": 100 * record["nbytes"] / whole if whole else None,
        "exact": record["error"] == 0.0,
    }


def patch_summary(facts: Mapping[str, Any]) -> str:
    """Return one line about a patch that was just written, from its facts."""
    kind = "adapter with the repair in it" if facts["extends_adapter"] else "patch"
    share = "" if facts["percent"] is None else f" ({facts['percent']:.2g} % of the checkpoint)"
    error = "exact" if facts["exact"] else f"truncated, largest relative error {facts['error']:.3g}"
    where = f"in {facts['modules']} modules, {size_text(facts['nbytes'])}{share}"
    return f"{kind}: {ranks_text(facts)} {where}, {error}"


def ranks_text(facts: Mapping[str, Any]) -> str:
    """Return the ranks in words, with both parts where the file holds a fine-tune's own, too."""
    rank: Mapping[str, Any] | None = facts["rank"]
    if rank is None:
        return "rank 0"
    text = f"rank{'' if rank['min'] == rank['max'] else 's'} {_span(rank)}"
    if facts["own_rank"]["max"] == 0:
        return text
    own, edit = _span(facts["own_rank"]), _span(facts["edit_rank"])
    return f"{text} ({own} of the fine-tune, {edit} of the repair)"


def _span(found: Mapping[str, Any]) -> str:
    low, high = found["min"], found["max"]
    return f"{low}" if low == high else f"{low} to {high}"


def patch_tables(found: Inspection) -> tuple[RenderableType, ...]:
    """Return what `realign patch inspect` shows."""
    from rich.text import Text

    lines = [Text.assemble((f"{name:17}", "dim"), value) for name, value in _facts(found) if value]
    table = plain_table("Layer by layer")
    repaired = found.patch.extends_adapter
    part = "repair's" if repaired else ""  # a bar, where there is room for it
    for title in ("layer", "modules", "rank", part, "norm", "error", "size"):
        table.add_column(title, justify="left" if title in ("", "modules") else "right")
    layers: dict[int | None, list[InspectedModule]] = {}
    for each in found.modules:
        layers.setdefault(each.module.layer, []).append(each)
    ranks = {layer: fmean(m.module.rank for m in members) for layer, members in layers.items()}
    highest = max(ranks.values(), default=1.0)
    for layer, members in layers.items():
        error = max(each.error for each in members)
        table.add_row(
            "other" if layer is None else str(layer),
            Text(_names(members)),
            number(ranks[layer], digits=1),
            number(fmean(m.module.edit_rank for m in members), digits=1)
            if repaired
            else Text("#" * max(1, round(_BAR * ranks[layer] / highest)), style="cyan"),
            number(sum(each.norm**2 for each in members) ** 0.5),
            number(error) if error else MISSING,
            size_text(sum(each.module.nbytes for each in members)),
        )
    return (*lines, "", table)


def _facts(found: Inspection) -> list[tuple[str, str]]:
    patch, origin, ranks = found.patch, found.origin, found.ranks
    share = "" if found.percent is None else f" ({found.percent:.2g} % of the model)"
    modules = len(found.modules)
    inputs = ", ".join(
        f"{role} {each['source']}"
        for role, each in origin.get("inputs", {}).items()
        if role != "finetuned"
    )
    return [
        ("patch", patch.source),
        ("for the model", patch.model_name or MISSING),
        ("is it that model", _MATCH[found.model_found]),
        (
            "made by",
            " ".join([str(origin["method"]), *settings_text(origin["settings"])])
            if origin
            else "an adapter that realign did not write",
        ),
        ("safety vector", vector_text(origin.get("safety_vector"))),
        ("from", inputs),
        ("strength", f"{patch.strength:g}"),
        ("size", f"{size_text(patch.nbytes)} in {modules} modules{share}"),
        (
            "edit",
            f"truncated, largest relative error {found.error:.3g}"
            if found.error
            else ("exact" if origin else ""),
        ),
        (
            "holds",
            ranks_text(ranks) if patch.extends_adapter else "",
        ),
        ("trained whole", _short(patch.trained)),
    ]


def _short(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def _names(members: Sequence[InspectedModule]) -> str:
    return " ".join(dict.fromkeys(each.module.module.rpartition(".")[2] for each in members))
