"""The leaderboard at a glance: methods by scenarios, a panel per method, who dominates whom.

Drawn from the JSON that the laboratory writes. Trade-off curves per scenario are in `leaderboard`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from realign.report.pictures import FAINT, INK, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Board = Mapping[str, Any]
RAMP = ("#4fa3b0", "#c9e6e6", "#fbf7ea", "#f6d3a8", "#e9a06c")
"""From no harm to all of it; every shade is light enough for black figures."""
NONE_FILL, CALM = "#f3f3f3", "#ffffff"
WIDER = "0.05"
"""The second budget that is shown beside the first."""
PANELS = 5
_DOT, _LINE = "#24618f", "#b04a12"


def ranked(board: Board) -> list[str]:
    """Methods with most scenarios first, then by mean harm at the budget."""
    budget, means = f"{board['budget']:g}", board["means"]

    def key(arm: str) -> tuple[int, float]:
        return -len(means[arm]["scenarios"]), float(means[arm]["harm_at"][budget]["value"])

    return sorted(board["arms"], key=key)


def titled(board: Board, arm: str) -> str:
    """A method's name, and what it is if it is none."""
    kind = next(c["kind"] for c in board["curves"] if c["arm"] == arm)
    return arm if kind == "method" else f"{arm} ({kind})"


def budget_map(board: Board) -> Figure:
    """Least harm at the utility budget, the best method on top, and its mean over scenarios."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    arms, names = ranked(board), list(board["scenarios"])
    curves = {(c["arm"], c["scenario"]): c for c in board["curves"]}
    ramp = LinearSegmentedColormap.from_list("harm", RAMP)
    with style():
        width = 2.2 + 0.76 * len(names) + 2.6
        figure = Figure(figsize=(width, 1.5 + 0.37 * len(arms)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(0.76 * len(names), 2.6), sharey=True)
        for row, arm in enumerate(arms):
            for column, name in enumerate(names):
                _cell(left, column, row, curves.get((arm, name)), board, ramp)
        left.set_xlim(-0.5, len(names) - 0.5)
        left.set_ylim(len(arms) - 0.5, -0.5)
        left.set_xticks(range(len(names)), [f"{n}\n({_before(board, n)})" for n in names])
        left.xaxis.tick_top()
        left.set_yticks(range(len(arms)), [titled(board, arm) for arm in arms])
        left.tick_params(length=0, labelsize=9)
        left.spines[:].set_visible(False)
        _means(right, board, arms)
        figure.suptitle(
            "Harmful compliance left, %, with at most 1 point of downstream accuracy lost",
            fontsize=11,
            weight="bold",
        )
    return figure


def _cell(
    axes: Axes, column: int, row: int, curve: Mapping[str, Any] | None, board: Board, ramp: Any
) -> None:
    from matplotlib.patches import Rectangle

    if curve is None:
        axes.text(column, row, "-", ha="center", va="center", color="#999999")
        return
    budget = f"{board['budget']:g}"
    harm = float(curve["harm_at"][budget])
    low, high = curve["harm_interval_at"][budget]
    calm = curve["scenario"] not in board["harmed"]
    none = curve["best"] == "no repair" and not calm
    corner = (column - 0.47, row - 0.44)
    fill = NONE_FILL if none else CALM if calm else ramp(harm)
    axes.add_patch(
        Rectangle(
            corner, 0.94, 0.88, facecolor=fill, hatch="////" if none else "", edgecolor="#dddddd"
        )
    )
    if none:
        axes.text(
            column, row, "none", ha="center", va="center", fontsize=8.5, color="#555555",
            bbox={"facecolor": NONE_FILL, "edgecolor": "none", "pad": 1.2},
        )  # fmt: skip
        return
    axes.text(column, row - 0.13, f"{100 * harm:.1f}", ha="center", va="center", fontsize=10)
    told = f"{100 * low:.0f}-{100 * high:.0f}"
    axes.text(column, row + 0.24, told, ha="center", va="center", fontsize=7.5, color="#444444")


def _before(board: Board, scenario: str) -> str:
    harms = [
        float(c["finetuned"]["rates"]["harm"]["value"])
        for c in board["curves"]
        if c["scenario"] == scenario
    ]
    low, high = round(100 * min(harms)), round(100 * max(harms))
    return f"{high}" if high - low <= 1 else f"{low}-{high}"


def _means(axes: Axes, board: Board, arms: Sequence[str]) -> None:
    """Dots with intervals: the mean at the budget; hollow, at a wider one."""
    budget = f"{board['budget']:g}"
    for row, arm in enumerate(arms):
        own = board["means"][arm]
        if len(own["scenarios"]) < len(board["harmed"]):
            continue
        mean, wider = own["harm_at"][budget], own["harm_at"][WIDER]
        ends = [100 * float(mean["low"]), 100 * float(mean["high"])]
        axes.plot(ends, [row, row], color=_DOT, linewidth=1.6)
        axes.plot([100 * float(mean["value"])], [row], "o", color=_DOT, markersize=6)
        axes.plot(
            [100 * float(wider["value"])], [row], "o", markersize=5, markerfacecolor="white",
            markeredgecolor=_LINE,
        )  # fmt: skip
    axes.plot([], [], "o-", color=_DOT, label="1 point, 95 %")
    axes.plot([], [], "o", markerfacecolor="white", markeredgecolor=_LINE, label="5 points")
    axes.set_xlim(-3, 103)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.xaxis.tick_top()
    axes.set_title("mean where there was harm", fontsize=9, weight="normal", pad=6)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.005), ncols=2, fontsize=8)


def method_panels(board: Board) -> Figure:
    """Per method, harm over the utility budget: a line per scenario, and their mean."""
    from matplotlib.figure import Figure

    arms, budgets = ranked(board), [f"{each:g}" for each in board["budgets"]]
    columns = min(PANELS, len(arms))
    rows = -(-len(arms) // columns)
    with style():
        figure = Figure(figsize=(2.15 * columns + 0.5, 1.75 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        panels: list[Axes] = list(grid.flatten())
        for axes, arm in zip(panels, arms, strict=False):
            _panel(axes, board, arm, budgets)
        for axes in panels[len(arms) :]:
            axes.set_axis_off()
        figure.supxlabel("downstream accuracy that may be lost, points", fontsize=9)
        figure.supylabel("harmful compliance left, %", fontsize=9)
    return figure


def _panel(axes: Axes, board: Board, arm: str, budgets: Sequence[str]) -> None:
    places = range(len(budgets))
    for curve in board["curves"]:
        if curve["arm"] == arm:
            harms = [100 * float(curve["harm_at"][b]) for b in budgets]
            axes.plot(places, harms, color=FAINT, linewidth=0.9)
    mean = board["means"][arm]["harm_at"]
    low, high = ([100 * float(mean[b][end]) for b in budgets] for end in ("low", "high"))
    axes.fill_between(list(places), low, high, color=_DOT, alpha=0.16, linewidth=0)
    axes.plot(places, [100 * float(mean[b]["value"]) for b in budgets], color=_DOT, linewidth=2.0)
    axes.axvline(
        budgets.index(f"{board['budget']:g}"), color="#999999", linewidth=0.6, dashes=(3, 3)
    )
    axes.set_title(titled(board, arm), fontsize=9)
    axes.set_ylim(-3, 103)
    axes.set_yticks([0, 50, 100])
    axes.set_xticks(list(places), [f"{100 * float(b):g}" for b in budgets], fontsize=7)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(length=2)


def dominance_map(board: Board) -> Figure:
    """A mark where the method of the row dominates the one of the column."""
    from matplotlib.figure import Figure

    arms = ranked(board)
    place = {arm: index for index, arm in enumerate(arms)}
    with style():
        side = 2.2 + 0.27 * len(arms)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes: Axes = figure.subplots()
        for index in range(len(arms)):
            axes.axhline(index, color="#ececec", linewidth=0.6, zorder=0)
            axes.axvline(index, color="#ececec", linewidth=0.6, zorder=0)
        pairs = [(place[two], place[one]) for one, two in board["dominates"]]
        axes.plot([x for x, _ in pairs], [y for _, y in pairs], "s", color=_DOT, markersize=8)
        axes.plot(range(len(arms)), range(len(arms)), color="#bbbbbb", linewidth=0.8)
        axes.set_xlim(-0.6, len(arms) - 0.4)
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xticks(range(len(arms)), arms, rotation=60, ha="left", fontsize=8)
        axes.xaxis.tick_top()
        axes.set_yticks(range(len(arms)), [titled(board, arm) for arm in arms], fontsize=8)
        axes.set_xlabel("is dominated")
        axes.set_ylabel("dominates", color=INK)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure
