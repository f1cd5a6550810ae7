"""Pictures of reports and repairs: bars with intervals, layer curves, heat maps, as SVG or PNG.

Every picture reads in black and white: bars differ by hatch, lines by marker and dash, and heat
maps carry their numbers. Figures are made with matplotlib's objects, never with pyplot, so nothing
global changes and no window is ever opened. Same data, same bytes. What does not live here: where
the numbers come from.
"""

from __future__ import annotations

import io
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1a1a"
FAINT = "#c8c8c8"
# Ordered from light to dark so that grey prints keep the order; each has a hatch of its own.
_FILLS = ("#d9d9d9", "#e07b39", "#3f7fb5", "#6c9a4b", "#8d6bb0")
_HATCHES = ("", "///", "..", "\\\\\\", "xx")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_DASHES = ("-", "--", "-.", ":")
_WIDTH = 8.6
_DPI = 150

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: smaller, searchable, read aloud
    "svg.hashsalt": "realign",
    "text.parse_math": False,  # names come from checkpoints; "$" is just a character in them
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Bar:
    """One rate: a group (the metric), a series (the model), a value with its interval."""

    group: str
    series: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One curve over the layers.

    Attributes:
        name: the module.
        points: (layer, value) pairs.
    """

    name: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Panel:
    """One quantity over the layers, a curve per module."""

    title: str
    lines: tuple[Line, ...]
    floor: float | None = 0.0


@dataclass(frozen=True)
class Grid:
    """A labelled table of numbers; None where there is none.

    Attributes:
        title: what the numbers are.
        rows: labels from top to bottom.
        columns: labels from left to right.
        values: one tuple per row.
        percent: print 0.13 as "13".
        limits: the values of white and of the darkest shade; None takes them from the data.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    percent: bool = False
    limits: tuple[float, float] | None = field(default=None)


def rate_bars(bars: Sequence[Bar], *, title: str = "") -> Figure:
    """Draw rates as horizontal bars, grouped by metric, one hatch per model, with intervals.

    Args:
        bars: in reading order; values and intervals are fractions.
        title: shown above the picture.
    """
    groups = list(dict.fromkeys(bar.group for bar in bars))
    series = list(dict.fromkeys(bar.series for bar in bars))
    lookup = {(bar.group, bar.series): bar for bar in bars}
    with style():
        thickness = 0.8 / max(len(series), 1)
        height = 0.9 + len(groups) * (0.18 + 0.2 * len(series))
        figure, (axes,) = _figure(height, rows=1)
        for index, name in enumerate(series):
            for row, group in enumerate(groups):
                bar = lookup.get((group, name))
                if bar is not None:
                    _draw_bar(axes, bar, row + (index + 0.5) * thickness - 0.4, thickness, index)
            axes.barh(
                [0.0],
                [0.0],
                label=name,
                facecolor=_FILLS[index % len(_FILLS)],
                hatch=_HATCHES[index % len(_HATCHES)],
                edgecolor=INK,
            )
        axes.set_yticks(range(len(groups)), groups)
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.set_xlim(0, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT, linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_title(title)
        _legend_above(axes, len(series), titled=bool(title))
    return figure


def layer_panels(panels: Sequence[Panel]) -> Figure:
    """Draw one small panel per quantity, stacked, with the layers on the horizontal axis."""
    with style():
        figure, axes_of = _figure(0.7 + 1.55 * len(panels), rows=len(panels))
        names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
        layers = sorted({x for p in panels for line in p.lines for x, _ in line.points})
        for axes, panel in zip(axes_of, panels, strict=False):
            for line in panel.lines:
                index = names.index(line.name)
                axes.plot(
                    [x for x, _ in line.points],
                    [y for _, y in line.points],
                    label=line.name,
                    marker=_MARKERS[index % len(_MARKERS)],
                    linestyle=_DASHES[index % len(_DASHES)],
                    color=_line_colour(index),
                    markersize=4.5,
                    linewidth=1.1,
                    clip_on=False,  # a marker on the frame is still a whole one
                )
            axes.set_title(panel.title)
            axes.grid(color=FAINT, linewidth=0.5)
            if panel.floor is not None:
                axes.set_ylim(bottom=panel.floor)
        _layer_ticks(axes_of[-1], layers)
        axes_of[-1].set_xlabel("layer")
        handles, labels = axes_of[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside right upper")
    return figure


def heat_map(grid: Grid) -> Figure:
    """Draw a table of numbers in shades of grey, each cell with its number."""
    from matplotlib.colors import Normalize

    with style():
        longest = max((len(row) for row in grid.rows), default=0)
        figure, (axes,) = _figure(0.9 + 0.26 * len(grid.rows), rows=1)
        numbers = [v for row in grid.values for v in row if v is not None]
        low, high = grid.limits or (min([0.0, *numbers]), max([*numbers, 1e-12]))
        shade = Normalize(low, high, clip=True)
        image = [[0.0 if v is None else float(shade(v)) for v in row] for row in grid.values]
        if numbers:
            # A mesh of rectangles, not an image: it stays sharp, and nothing is embedded.
            edges = [[i - 0.5 for i in range(count + 1)] for count in (len(image[0]), len(image))]
            axes.pcolormesh(*edges, image, cmap="Greys", vmin=0, vmax=1.35)
            axes.invert_yaxis()
        fits = len(grid.columns) <= 40
        for i, row in enumerate(grid.values):
            for j, value in enumerate(row):
                dark = value is not None and float(shade(value)) > 0.72
                if fits:
                    axes.text(
                        j,
                        i,
                        cell_text(value, percent=grid.percent),
                        ha="center",
                        va="center",
                        color="white" if dark else INK,
                        fontsize=8 if len(grid.columns) <= 14 else 6,
                    )
        axes.set_yticks(range(len(grid.rows)), grid.rows, fontsize=8 if longest < 60 else 7)
        step = max(1, len(grid.columns) // 24)
        axes.set_xticks(
            range(0, len(grid.columns), step), [str(c) for c in grid.columns[::step]], fontsize=8
        )
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(grid.title)
    return figure


def cell_text(value: float | None, *, percent: bool) -> str:
    """Return what a heat map prints in one cell."""
    if value is None:
        return ""
    if percent:
        return f"{100 * value:.0f}"
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.0f}"


def to_svg(figure: Figure, *, label: str) -> str:
    """Return an `<svg>` element to stand inside an HTML page, with `label` for screen readers."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with style():
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    element = text[text.index("<svg") :]
    # A page may hold several pictures; matplotlib's ids are unique only within one of them.
    prefix = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    element = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', element)
    element = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", element)
    element = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', element)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    spoken = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return element.replace("<svg", f'<svg role="img" aria-label="{spoken}"', 1)


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with style():
        figure.set_dpi(_DPI)
        # Not `savefig`: where a figure has a layout, that goes through all of it twice.
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def save(figure: Figure, file: Path) -> Path:
    """Write the figure; the suffix of `file` chooses SVG, PNG or PDF."""
    if file.suffix == ".png":
        file.write_bytes(to_png(figure))
        return file
    with style():
        metadata = {"Date": None} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=_DPI, metadata=metadata)
    return file


def _draw_bar(axes: Axes, bar: Bar, y: float, thickness: float, index: int) -> None:
    axes.barh(
        [y],
        [bar.value],
        height=thickness * 0.9,
        facecolor=_FILLS[index % len(_FILLS)],
        hatch=_HATCHES[index % len(_HATCHES)],
        edgecolor=INK,
        linewidth=0.6,
    )
    end = bar.value
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [y, y], color=INK, linewidth=1.4, solid_capstyle="butt")
        axes.plot([bar.low, bar.high], [y, y], color=INK, marker="|", markersize=5, linestyle="")
        end = max(end, bar.high)
    axes.text(
        end + 0.012, y, f"{100 * bar.value:.1f} %", va="center", ha="left", fontsize=8, color=INK
    )


def _legend_above(axes: Axes, count: int, *, titled: bool) -> None:
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=count if titled else min(count, 4),
        handlelength=1.6,
        borderaxespad=0.2,
    )


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 16)
    axes.set_xticks(layers[::step], [str(layer) for layer in layers[::step]])
    if len(layers) == 1:
        axes.set_xlim(layers[0] - 0.5, layers[0] + 0.5)


def _line_colour(index: int) -> str:
    palette = ("#1a1a1a", "#b04a12", "#24618f", "#55803a", "#6f4f94", "#8a6d00", "#777777")
    return palette[index % len(palette)]


def _figure(height: float, *, rows: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, max(height, 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(max(rows, 1), 1, squeeze=False, sharex=True)
    return figure, [each[0] for each in axes][: max(rows, 1)]


@contextmanager
def style() -> Generator[None]:
    """Apply the look of all pictures while figures are made."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield
