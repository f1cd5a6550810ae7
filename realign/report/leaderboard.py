"""Pictures of a leaderboard: all of them as files, and the trade-off curves per scenario.

Drawn from the JSON that the laboratory writes, so the room of the laboratory is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign.report.leaderboard_maps import budget_map, dominance_map, method_panels, ranked
from realign.report.pictures import FAINT, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3
_MARKERS = "osD^vPX*<>hp8dH"
_COLOURS = ("#3f7fb5", "#e07b39", "#6c9a4b", "#8d6bb0", "#b04a4a", "#1a1a1a", "#c9a227", "#5aa9a3")
_DASHES = ("-", "--", ":", "-.")
HIGHLIGHTED = 6
OTHERS = "other methods"


def save_pictures(board: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw all pictures as SVG into `folder`; returns the files."""
    figures = {
        "budget": budget_map,
        "methods": method_panels,
        "curves": trade_off,
        "dominance": dominance_map,
    }
    return [save(draw(board), folder / f"leaderboard-{name}.svg") for name, draw in figures.items()]


def trade_off(board: Mapping[str, Any]) -> Figure:
    """Harm against the loss of downstream accuracy, one panel per scenario.

    A curve is a method's frontier: of its points, those that no other of its points beats in both.
    Points that break a side condition are left out. Baselines, the control and the best methods at
    the budget have a colour, the others are grey.
    """
    from matplotlib.figure import Figure

    names = list(board["scenarios"])
    arms = _drawn(board)
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    with style():
        figure = Figure(figsize=(max(7.0, 3.5 * columns), 2.7 * rows + 1.4), layout="constrained")
        panels: list[Axes] = list(
            figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        )
        for axes, name in zip(panels, names, strict=False):
            curves = [c for c in board["curves"] if c["scenario"] == name]
            for curve in curves:
                _draw(axes, curve, arms.index(curve["arm"]) if curve["arm"] in arms else None)
            axes.set_title(name)
            axes.axvspan(-30, 1, color="#f0f0f0", zorder=0)
            axes.set_xlim(-3, 30)
            axes.set_ylim(-3, 103)
            axes.grid(color="#dddddd", linewidth=0.5)
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
        labels = [name for name in (*arms, OTHERS) if name in handles]
        figure.legend(
            [handles[label] for label in labels],
            labels,
            loc="outside lower center",
            ncols=2 * max(2, columns),
        )
    return figure


def _drawn(board: Mapping[str, Any]) -> list[str]:
    """The methods with a colour: what is no method, then the best ones."""
    plain = {c["arm"] for c in board["curves"] if c["kind"] != "method"}
    best = [arm for arm in ranked(board) if arm not in plain][:HIGHLIGHTED]
    return [arm for arm in board["arms"] if arm in plain] + best


def _draw(axes: Axes, curve: Mapping[str, Any], index: int | None) -> None:
    points = [curve["finetuned"], *curve["points"]]
    pairs = [
        (100 * float(p["drop"]), 100 * float(p["rates"]["harm"]["value"]))
        for p in points
        if not p["broken"]
    ]
    frontier = _frontier(pairs)
    if index is None:
        xs, ys = [x for x, _ in frontier], [y for _, y in frontier]
        axes.plot(xs, ys, label=OTHERS, marker=".", color=FAINT, linewidth=0.8, zorder=1)
        return
    axes.plot(
        [x for x, _ in frontier],
        [y for _, y in frontier],
        label=curve["arm"],
        marker=_MARKERS[index % len(_MARKERS)],
        color=_COLOURS[index % len(_COLOURS)],
        linestyle=_DASHES[index // len(_COLOURS) % len(_DASHES)],
        markersize=3.6,
        linewidth=1.0,
    )


def _frontier(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(pairs):
        if not kept or y < kept[-1][1]:
            kept.append((x, y))
    return kept
