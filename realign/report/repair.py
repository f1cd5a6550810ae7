"""A repair's plan and record: tables for the terminal, facts and curves for pages and pictures.

Reads `realign.repair.plan.Plan` and the manifest `realign.json`; computes nothing but sums that a
table needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from realign.checkpoint.space import size_text
from realign.repair.record import LOW_SURVIVAL, TensorRow
from realign.report.pictures import Line, Panel, layer_panels, to_png
from realign.report.tables import plain_table
from realign.report.words import MISSING, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from realign.checkpoint.matching import TensorPair
    from realign.repair.plan import Plan

_CURVES = (
    ("rank", "rank of the safety subspace"),
    ("entropy", "entropy of its spectrum (nats)"),
    ("relative_norm", "norm of the edit / norm of the weight"),
    ("survival", "share of the edit that survives rounding"),
)


@dataclass(frozen=True)
class RepairStory:
    """What an HTML page says about a repair: facts in words, and curves over the layers."""

    facts: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]


def plan_tables(plan: Plan) -> tuple[RenderableType, ...]:
    """Return what `--dry-run` shows: inputs, settings, tensors by module, costs, remarks."""
    from rich.text import Text

    inputs = plain_table("Inputs", left=["role", "checkpoint"], right=["size"])
    for role, each in plan.inputs.items():
        pinned = f" @ {each.commit[:12]}" if each.commit else ""
        adapter = " (adapter, merged)" if each.kind == "adapter" else ""
        inputs.add_row(role, Text(f"{each.source}{pinned}{adapter}"), size_text(each.weight_bytes))

    tensors = plain_table("Tensors")
    for title in ("module", "tensors", "layers", "action", "why"):
        tensors.add_column(title, justify="right" if title == "tensors" else "left")
    for row in _by_module(plan.matching.pairs):
        tensors.add_row(*(Text(cell) for cell in row))

    estimate = plan.estimate
    facts = [
        ("method", " ".join([plan.method.name, *settings_text(plan.method.settings())])),
        ("safety vector", vector_text(plan.method.vector_kind)),
        ("scope, strength", f"{plan.scope}, {plan.strength:g}"),
        ("subset", _subset_text(plan)),
        ("texts", ", ".join(f"{t.source} ({t.count} {d})" for d, t in plan.texts.items())),
        ("anchors", f"{plan.anchors.name} ({plan.anchors.count} prompts)" if plan.anchors else ""),
        ("device, seed", f"{plan.device}, {plan.seed}"),
        (
            "reads, writes, peak",
            f"{size_text(estimate.read)}, {size_text(estimate.written)}, "
            f"about {size_text(estimate.peak_memory)} of memory",
        ),
        ("output", f"{plan.output or ''}{' (LoRA patch)' if plan.patch else ''}"),
    ]
    lines = [Text.assemble((f"{name:21}", "dim"), value) for name, value in facts if value]
    # Doubts are not repeated here: they are warnings, and stand on standard error.
    notes = [Text(f"note: {note}", style="yellow") for note in plan.notes]
    return (inputs, "", *lines, "", tensors, *([""] if notes else []), *notes)


def _subset_text(plan: Plan) -> str:
    """Say which layers and modules are left, and which layers have dials of their own."""
    found = plan.subset.to_json()
    parts = [f"{name} {', '.join(map(str, each))}" for name, each in found.items() if each]
    if plan.strengths:
        dials = (f"{layer}: {t:g}" for layer, t in sorted(plan.strengths.items()))
        parts.append(f"strengths {', '.join(dials)}")
    return "; ".join(parts)


def rows_table(rows: Iterable[TensorRow], *, title: str = "The edit, layer by layer") -> Table:
    """Return rank, entropy, edit norm and survival per layer, averaged over its matrices."""
    titles = ("layer", "edited", "rank", "entropy", "edit / weight", "cos(edit, task)", "survival")
    table = plain_table(f"{title} (means over matrices)", right=titles)
    layers: dict[int | None, list[TensorRow]] = {}
    for row in rows:
        layers.setdefault(row.layer, []).append(row)
    for layer in sorted(layers, key=lambda each: (each is None, each or 0)):
        members = layers[layer]
        edited = [row for row in members if row.outcome == "edited"]
        table.add_row(
            "other" if layer is None else str(layer),
            f"{len(edited)} of {len(members)}",
            number(_mean(row.facts.get("rank") for row in edited), digits=1),
            number(_mean(row.facts.get("entropy") for row in edited), digits=2),
            number(_mean(row.relative_norm for row in edited)),
            number(_mean(row.cos_task for row in edited), digits=2),
            number(_mean(row.survival for row in edited)),
        )
    return table


def facts_lines(facts: Mapping[str, float | int | str | None]) -> tuple[RenderableType, ...]:
    """Return what the method says of the whole run, a line each, after an empty one."""
    from rich.text import Text

    shown = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, shown), default=0) + 2
    lines = [
        Text.assemble((f"{name.replace('_', ' '):{width}}", "dim"), number(value))
        if isinstance(value, float)
        else Text.assemble((f"{name.replace('_', ' '):{width}}", "dim"), str(value))
        for name, value in shown.items()
    ]
    return ("", *lines) if lines else ()


def manifest_rows(manifest: Mapping[str, Any]) -> tuple[TensorRow, ...]:
    """Return the rows of a manifest; empty for one that has none."""
    return tuple(TensorRow.from_json(row) for row in manifest.get("tensors", ()))


def layer_curves(rows: Iterable[TensorRow]) -> tuple[Panel, ...]:
    """Return one panel per quantity that the rows hold: rank, entropy, edit norm, survival."""
    edited = [row for row in rows if row.outcome == "edited" and row.layer is not None]
    panels: list[Panel] = []
    for name, title in _CURVES:
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in edited:
            value = getattr(row, name) if hasattr(row, name) else row.facts.get(name)
            if isinstance(value, int | float) and row.layer is not None:
                lines.setdefault(_curve_name(row), []).append((row.layer, float(value)))
        if lines:
            ordered = tuple(Line(key, tuple(sorted(points))) for key, points in lines.items())
            panels.append(Panel(title, ordered))
    return tuple(panels)


def repair_picture(manifest: Mapping[str, Any]) -> bytes | None:
    """Draw rank, entropy, edit norm and survival per layer; None if the rows hold none of them."""
    panels = layer_curves(manifest_rows(manifest))
    return to_png(layer_panels(panels)) if panels else None


def repair_story(manifest: Mapping[str, Any]) -> RepairStory:
    """Return what an HTML report says about the repair that wrote `manifest`."""
    rows = manifest_rows(manifest)
    method = manifest.get("method", {})
    totals = manifest.get("totals", {})
    settings = settings_text(method.get("settings", {}))
    facts = [
        ("method", " ".join([str(method.get("name", MISSING)), *settings])),
        ("safety vector", vector_text(manifest.get("safety_vector"))),
        ("strength", str(manifest.get("strength", MISSING))),
        ("matrices edited", f"{totals.get('edited', MISSING)} of {len(rows)}"),
        ("numbers changed", f"{totals.get('parameters_changed', MISSING)}"),
    ]
    low = totals.get("low_survival", ())
    if low:
        facts.append(
            (
                "rounding",
                f"{len(low)} matrices keep less than {LOW_SURVIVAL:.0%} of their edit: "
                "prefer --patch or a wider dtype",
            )
        )
    return RepairStory(facts=tuple(each for each in facts if each[1]), panels=layer_curves(rows))


def settings_text(settings: Mapping[str, object]) -> list[str]:
    """Return hyper-parameters as `name=value` words."""
    return [f"{name}={value}" for name, value in settings.items()]


def vector_text(kind: str | None) -> str:
    """Return the definition of the safety vector."""
    return "" if kind is None else f"aligned - {kind}"


def _by_module(pairs: Sequence[TensorPair]) -> list[tuple[str, str, str, str, str]]:
    groups: dict[tuple[str, str, str], list[TensorPair]] = {}
    for pair in pairs:
        reason = pair.reason.replace(pair.role.name, "itself")
        groups.setdefault((pair.role.module, pair.action, reason), []).append(pair)
    rows: list[tuple[str, str, str, str, str]] = []
    for (module, action, reason), members in groups.items():
        layers = sorted({pair.role.layer for pair in members if pair.role.layer is not None})
        rows.append((module, str(len(members)), ranges(layers), action, reason))
    return sorted(rows, key=lambda row: row[3] != "edit")


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as "0-3, 5"."""
    parts: list[str] = []
    start = last = None
    for value in [*numbers, None]:
        if last is not None and value == last + 1:
            last = value
            continue
        if start is not None and last is not None:
            parts.append(str(start) if start == last else f"{start}-{last}")
        start = last = value
    return ", ".join(parts)


def _curve_name(row: TensorRow) -> str:
    # A fused projection has several slots in one layer; its block name keeps their curves apart.
    _, bracket, block = row.key.rpartition("[")
    return block.rstrip("]") if bracket else row.module


def _mean(values: Iterable[object]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return fmean(numbers) if numbers else None
