"""The picture of a tuning: what every point restores against what it costs, and the chosen one.

Here: drawing, from the content of tune.json. Not here: the tables beside it (`tune`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from realign.report.pictures import FAINT, INK, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COSTS = (
    ("utility_drop", "accuracy lost on the worst task suite, points", "utility_at_most"),
    (
        "over_refusal_rise",
        "refusals gained on the worst safe suite, points",
        "over_refusal_at_most",
    ),
)
_WITHIN, _BEYOND, _CHOSEN = "#3f7fb5", "#b9b9b9", "#b04a12"


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both numbers (smaller is better), by the first."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def tune_picture(document: Mapping[str, Any]) -> Figure | None:
    """Draw harm against every cost that was measured; None where no point was."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trials = [trial for trial in document["search"]["trials"] if trial["cost"] is not None]
    costs = [each for each in _COSTS if any(t["cost"][each[0]] is not None for t in trials)]
    if not costs:
        return None
    with style():
        figure = Figure(figsize=(8.6, 3.7), layout="constrained")
        FigureCanvasAgg(figure)
        every = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axes, (name, words, bound) in zip(every, costs, strict=True):
            _draw(axes, document, trials, name, bound=bound, limit=document["limits"][name])
            axes.set_xlabel(words)
        every[0].set_ylabel("harmful compliance, %")
        handles, labels = every[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=5, handletextpad=0.3)
    return figure


def _draw(
    axes: Axes,
    document: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    name: str,
    *,
    bound: str,
    limit: float,
) -> None:
    def place(cost: Mapping[str, Any]) -> tuple[float, float]:
        return 100 * cost[name], 100 * cost["harm"]

    untouched = place(document["search"]["finetuned"]["cost"])
    # The fine-tune is the point t = 0: what it beats lies on no front.
    steps = front([untouched, *(place(trial["cost"]) for trial in trials)])
    axes.plot(
        [x for x, _ in steps], [y for _, y in steps], drawstyle="steps-post", color=INK,
        linewidth=0.8, linestyle="--", label="Pareto front", zorder=1,
    )  # fmt: skip
    for within, colour, marker, words in (
        (False, _BEYOND, "x", "breaks a limit"),
        (True, _WITHIN, "o", "within the limits"),
    ):
        of = [trial["cost"] for trial in trials if trial["within"] is within]
        at = [place(cost) for cost in of]
        for cost, (x, y) in zip(of, at, strict=True):
            axes.plot([x, 100 * cost[bound]], [y, y], color=colour, linewidth=0.9, zorder=1)
        axes.plot(
            [x for x, _ in at], [y for _, y in at], marker=marker, linestyle="", markersize=6,
            color=colour, markeredgecolor=INK if within else colour, markeredgewidth=0.6 if within
            else 1.4, label=words, zorder=2,
        )  # fmt: skip
    x, y = untouched
    axes.plot([x], [y], marker="s", linestyle="", markersize=7, color="white",
              markeredgecolor=INK, label="the fine-tune", zorder=2)  # fmt: skip
    chosen = document["chosen"]
    if chosen is not None:
        x, y = place(chosen["cost"])
        axes.plot([x], [y], marker="*", linestyle="", markersize=14, color=_CHOSEN,
                  markeredgecolor=INK, markeredgewidth=0.6, label="chosen", zorder=3)  # fmt: skip
    if limit < 1:
        axes.axvline(100 * limit, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            "limit", (100 * limit, 1.0), xycoords=("data", "axes fraction"), xytext=(3, -3),
            textcoords="offset points", va="top", fontsize=8, color=INK,
        )  # fmt: skip
    _label_points(axes, trials, place)
    axes.set_ylim(bottom=min(-2.0, axes.get_ylim()[0]))
    # Up to the figures, the limit and the bounds near it; a bound far out runs off the picture.
    marks = [untouched[0], *(place(trial["cost"])[0] for trial in trials)]
    shown = max(*marks, 0.0, *([200 * limit] if limit < 1 else []))
    low, span = min(marks), max(2.0, shown - min(marks))
    axes.set_xlim(low - 0.04 * span, low + 1.06 * span)
    axes.grid(color=FAINT, linewidth=0.4)
    axes.set_axisbelow(True)


def _label_points(axes: Axes, trials: Sequence[Mapping[str, Any]], place: Any) -> None:
    """Common strengths by their number; several points in one place share a label."""
    labels: dict[tuple[float, float], list[str]] = {}
    for trial in trials:
        if len(set(trial["point"])) == 1:
            labels.setdefault(place(trial["cost"]), []).append(f"{trial['point'][0]:g}")
    for at, names in labels.items():
        text = ", ".join(sorted(names, key=float))
        axes.annotate(text, at, xytext=(6, 4), textcoords="offset points", fontsize=7, color=INK)
