"""The picture of a comparison: a heat map of layers by modules, and a bar for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from realign.diff.result import Difference, Row
from realign.diff.terms import Terms
from realign.report.pictures import FAINT, INK, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_COLUMNS = 24
_DARK = 0.62


@dataclass(frozen=True)
class ChangeMap:
    """Relative changes by layer and module; below the layers, what stands outside of them."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    """One tuple per row; None where a layer has no such module."""
    bars: tuple[float | None, ...]
    """The relative change of a whole row."""
    layers: int
    """So many of the rows are layers."""


def change_map(found: Difference) -> ChangeMap:
    """Sum the tensors of a comparison up for the picture."""
    members = [row for row in found.rows if row.floating and row.terms and row.terms.finite]
    layers = sorted({row.layer for row in members if row.layer is not None})
    inside = [row for row in members if row.layer is not None]
    # Matrices first: norms and biases move little.
    by_kind = sorted(inside, key=lambda row: row.kind != "block_linear")
    columns = list(dict.fromkeys(row.module for row in by_kind))[:_MOST_COLUMNS]
    outside = list(dict.fromkeys(row.module for row in members if row.layer is None))
    by_layer = [[row for row in inside if row.layer == layer] for layer in layers]
    blank: tuple[float | None, ...] = (None,) * len(columns)
    return ChangeMap(
        rows=(*map(str, layers), *outside),
        columns=tuple(columns),
        cells=(
            *(
                tuple(_relative([row for row in layer if row.module == name]) for name in columns)
                for layer in by_layer
            ),
            *(blank for _ in outside),
        ),
        bars=(
            *(_relative(layer) for layer in by_layer),
            *(
                _relative([row for row in members if row.layer is None and row.module == name])
                for name in outside
            ),
        ),
        layers=len(layers),
    )


def diff_picture(found: Difference) -> Figure | None:
    """Draw the change of every layer and module; None where there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = change_map(found)
    if not any(drawn.bars):
        return None
    with style():
        size = (max(6.0, 4.2 + 0.5 * len(drawn.columns)), 1.6 + 0.25 * len(drawn.rows))
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(
            1, 2, sharey=True, width_ratios=[max(1.0, 0.45 * len(drawn.columns)), 2.0]
        )
        _draw_map(left, drawn)
        _draw_bars(right, drawn)
        left.set_ylim(len(drawn.rows) - 0.5, -0.5)
        figure.suptitle(
            "Relative change, norm(B - A) / norm(A), in %",
            x=0.01,
            ha="left",
            fontsize=10,
            fontweight="bold",
        )
    return figure


def _draw_map(axes: Axes, drawn: ChangeMap) -> None:
    largest = max((v for row in drawn.cells for v in row if v is not None), default=0.0) or 1.0
    edges = [[i - 0.5 for i in range(n + 1)] for n in (len(drawn.columns), len(drawn.rows))]
    image = [[(v or 0.0) / largest for v in row] for row in drawn.cells]
    if drawn.columns:
        axes.pcolormesh(*edges, image, cmap="Greys", vmin=0, vmax=1.35)
    for i, row in enumerate(drawn.cells):
        for j, value in enumerate(row):
            if value is not None:
                dark = value / largest > _DARK
                axes.text(
                    j, i, percent_digits(value), ha="center", va="center", fontsize=7,
                    color="white" if dark else INK,
                )  # fmt: skip
    axes.set_yticks(range(len(drawn.rows)), drawn.rows, fontsize=8)
    axes.set_xticks(range(len(drawn.columns)), drawn.columns, fontsize=8, rotation=40, ha="right")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("layer by module", fontweight="normal", fontsize=9)


def _draw_bars(axes: Axes, drawn: ChangeMap) -> None:
    values = [100 * (value or 0.0) for value in drawn.bars]
    inside = drawn.layers
    axes.barh(range(inside), values[:inside], height=0.7, facecolor="#3f7fb5", edgecolor=INK,
              linewidth=0.5)  # fmt: skip
    axes.barh(range(inside, len(values)), values[inside:], height=0.7, facecolor="#d9d9d9",
              edgecolor=INK, linewidth=0.5, hatch="///")  # fmt: skip
    for y, value in enumerate(drawn.bars):
        if value is not None:
            axes.annotate(
                percent_digits(value), (100 * value, y), xytext=(3, 0), textcoords="offset points",
                va="center", fontsize=7, color=INK,
            )  # fmt: skip
    axes.set_xlim(0, 1.18 * max(values, default=0.0) or 1.0)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.set_title("whole layer", fontweight="normal", fontsize=9)


def percent_digits(value: float) -> str:
    """Return a fraction as percent with two digits that count: "4.7", "0.012", "118"."""
    return f"{100 * value:.2g}" if value < 0.995 else f"{100 * value:.0f}"


def _relative(rows: list[Row]) -> float | None:
    terms = [row.terms for row in rows if row.terms is not None]
    return sum(terms, start=Terms()).figures().relative if terms else None
