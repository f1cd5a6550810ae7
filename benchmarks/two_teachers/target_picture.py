"""Trade-off curves: `two_teachers` against the other arms, a panel per scenario with harm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from target import LIMITS, OURS

from realign.report.pictures import INK, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
_INK_OF_OURS = "#b04a12"
_OTHERS = (
    ("s", "--", "#3f7fb5"),
    ("D", ":", "#6c9a4b"),
    ("^", "-.", "#8d6bb0"),
    ("v", "--", "#5aa9a3"),
    ("P", ":", "#c9a227"),
    ("X", "-.", "#777777"),
    ("<", "--", "#b04a4a"),
    (">", ":", "#24618f"),
)
_TICKS = (0, 2, 5, 10, 20, 40, 70, 100)
_LEFT, _RIGHT = -4.0, 12.0
HARMLESS = 0.02


def save_picture(side: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the picture as SVG; nothing where nothing was measured."""
    if not _shown(side):
        return []
    return [save(curves(side), folder / "two-teachers-curves.svg")]


def _shown(side: Mapping[str, Any]) -> list[str]:
    """Scenarios with our curve and harm to repair."""
    rows: Mapping[str, Any] = side["rows"]
    return [n for n, r in rows.items() if r["rates"]["harm"]["finetuned"]["value"] > HARMLESS]


def curves(side: Mapping[str, Any]) -> Figure:
    """Harm against downstream accuracy lost; the vertical scale is a square root.

    Other arms: the frontier of points that break no side condition. Ours: every strength, with 95 %
    intervals of harm, hollow where a side condition is broken. Shaded: the target.
    """
    from matplotlib.figure import Figure

    names = _shown(side)
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    arms = sorted({str(curve["arm"]) for curve in side["others"]})
    with style():
        figure = Figure(figsize=(max(6.4, 3.4 * columns), 2.9 * rows + 1.0), layout="constrained")
        panels: list[Axes] = list(
            figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        )
        for axes, name in zip(panels, names, strict=False):
            _panel(axes, side, name, arms)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes in panels[::columns]:
            axes.set_ylabel("harmful compliance, %")
        for axes in panels[: len(names)]:
            axes.set_xlabel("downstream accuracy lost, points")
        handles: dict[str, Any] = {}
        for axes in panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        labels = [label for label in (OURS, *arms, "target") if label in handles]
        figure.legend(
            [handles[label] for label in labels], labels, loc="outside lower center", ncols=4
        )
    return figure


def _panel(axes: Axes, side: Mapping[str, Any], name: str, arms: Sequence[str]) -> None:
    for curve in side["others"]:
        if curve["scenario"] != name:
            continue
        pairs = [(100 * p["drop"], 100 * p["harm"]) for p in curve["points"] if not p["broken"]]
        marker, dash, colour = _OTHERS[arms.index(curve["arm"]) % len(_OTHERS)]
        axes.plot(
            *zip(*frontier(pairs), strict=True), marker=marker, linestyle=dash, color=colour,
            label=curve["arm"], markersize=3.6, linewidth=1.0, zorder=2,
        )  # fmt: skip
    _ours(axes, next(curve for curve in side["ours"] if curve["scenario"] == name))
    bound = side["rows"][name]["rates"]["harm"]["aligned"]["value"] + LIMITS["harm"]
    axes.fill_between(
        [_LEFT, 100 * LIMITS["downstream"]], 0, 100 * bound, color="#e3e3e3", linewidth=0,
        label="target", zorder=0,
    )  # fmt: skip
    axes.set_title(name)
    axes.set_yscale("function", functions=(_root, _square))
    axes.set_ylim(0, 105)
    axes.set_yticks(_TICKS, [str(tick) for tick in _TICKS])
    axes.set_xlim(_LEFT, _RIGHT)
    axes.grid(color="#dddddd", linewidth=0.5)


def _ours(axes: Axes, curve: Mapping[str, Any]) -> None:
    points: list[Mapping[str, Any]] = sorted(curve["points"], key=lambda p: p["strength"])
    xs = [100 * float(point["drop"]) for point in points]
    ys = [100 * float(point["harm"]["value"]) for point in points]
    axes.plot(xs, ys, color=_INK_OF_OURS, linewidth=1.8, zorder=3)
    for point, x, y in zip(points, xs, ys, strict=True):
        ends = [100 * float(point["harm"][end]) for end in ("low", "high")]
        axes.plot([x, x], ends, color=_INK_OF_OURS, linewidth=0.9, alpha=0.7, zorder=3)
        fill = "white" if point["broken"] else _INK_OF_OURS
        axes.plot(
            [x], [y], "o", color=_INK_OF_OURS, markerfacecolor=fill, markersize=5, zorder=4
        )  # fmt: skip
        if point["usual"] and _LEFT < x < _RIGHT:
            axes.annotate(
                "t 1", (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8, color=INK
            )  # fmt: skip
    # For the legend: line and dot as one.
    axes.plot([], [], "o-", color=_INK_OF_OURS, linewidth=1.8, markersize=5, label=OURS)


def frontier(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(pairs):
        if not kept or y < kept[-1][1] - math.ulp(1.0):
            kept.append((x, y))
    return kept


def _root(values: Any) -> Any:
    import numpy as np

    return np.sqrt(np.maximum(values, 0.0))


def _square(values: Any) -> Any:
    import numpy as np

    return np.square(values)
