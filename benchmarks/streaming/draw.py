"""The pictures of docs/benchmarks.md from the result files.

python -m benchmarks.streaming.draw docs
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator, ScalarFormatter

from benchmarks.streaming.page import read

plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
OURS, OTHER, GROUND, LIMIT = "#1b6ca8", "#c8743c", "#9aa5ad", "#a02020"


def draw(docs: Path) -> None:
    """Draw what has been measured."""
    data = read(docs)
    pictures = docs / "pictures"
    pictures.mkdir(exist_ok=True)
    if "compare" in data:
        _save(_compare(data["compare"]), pictures / "bench-compare.png")
    if "scaling" in data and data["scaling"]["fit"]:
        _save(_scaling(data["scaling"]), pictures / "bench-scaling.png")
    if "scaling" in data:
        runs = [*data["scaling"]["runs"], *data.get("wide", {}).get("runs", ())]
        _save(_memory(runs), pictures / "bench-memory.png")


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _colour(name: str) -> str:
    return OURS if name.startswith("realign") else GROUND if name.startswith("floor") else OTHER


def _compare(found: Mapping[str, Any]) -> Any:
    """Wall time with its start-up part, and peak memory."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.1), sharey=True)
    names = list(found["contenders"])
    places = np.arange(len(names))
    for place, name in zip(places, names, strict=True):
        each = found["contenders"][name]
        wall, rss = each["wall"], each["peak_rss"]["max"] / 1e6
        start = found["start_up"][re.split(r"[ ,]", name)[0]]["wall"]["median"]
        errors = [[wall["median"] - wall["min"]], [wall["max"] - wall["median"]]]
        left.barh(place, wall["median"], color=_colour(name), xerr=errors, capsize=3)
        left.barh(place, min(start, wall["median"]), color="white", alpha=0.45, hatch="////")
        left.text(wall["max"], place, f"  {wall['median']:.1f} s", va="center")
        right.barh(place, rss, color=_colour(name))
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        right.annotate(
            f"{rss:.0f} MB", (rss, place), (6, 0), textcoords="offset points", va="center", bbox=box
        )
    left.set_yticks(places, names)
    left.invert_yaxis()
    left.set_title("Wall time (hatched: start-up and imports)", fontsize=9, loc="left")
    right.set_title("Peak resident memory (dashed: 400 MB)", fontsize=9, loc="left")
    right.axvline(400, color=LIMIT, linestyle="--", linewidth=0.9)
    left.set_xlabel("seconds (median, least to most)")
    right.set_xlabel("MB")
    left.margins(x=0.18)
    right.margins(x=0.22)
    size = f"{found['parameters'] / 1e9:.2g} B parameters, warm page cache"
    figure.suptitle(f"W' = W_f + {found['gamma']} (W_a - W_b), {size}", fontsize=9)
    return figure


def _scaling(found: Mapping[str, Any]) -> Any:
    """Wall time on bytes with the fit; peak memory on bytes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.3))
    runs = [each for each in found["runs"] if each["method"] == "resta"]
    moved = np.array([each["moved_bytes"] / 1e9 for each in runs])
    wall = [each["wall"] for each in runs]
    middle = np.array([each["median"] for each in wall])
    errors = [
        middle - [each["min"] for each in wall],
        np.array([each["max"] for each in wall]) - middle,
    ]
    left.errorbar(moved, middle, yerr=errors, fmt="o", color=OURS, capsize=3, label="realign")
    floor = [each["floor"]["median"] for each in runs]
    left.plot(moved, floor, "s", color=GROUND, label="read-write floor")
    fit = found["fit"]
    line = np.array([0, moved.max() * 1.05])
    slope = f"{fit['seconds_at_zero']:.2f} s + {fit['seconds_per_gb']:.2f} s/GB"
    left.plot(line, fit["seconds_at_zero"] + fit["seconds_per_gb"] * line, color=OURS, alpha=0.6)
    left.set_title(f"Wall time: {slope}", fontsize=9, loc="left")
    left.set_ylabel("seconds")
    left.legend(frameon=False)
    peaks = [each["peak_rss"]["max"] / 1e6 for each in runs]
    right.plot(moved, peaks, "o", color=OURS)
    right.axhline(400, color=LIMIT, linestyle="--", linewidth=0.9)
    right.set_title("Peak resident memory (dashed: 400 MB)", fontsize=9, loc="left")
    right.set_ylabel("MB")
    right.set_ylim(0, 450)
    for axis in (left, right):
        axis.set_xlabel("GB read and written (three checkpoints in, one out)")
        axis.set_xlim(0, None)
    left.set_ylim(0, None)
    for i, (each, x, y) in enumerate(zip(runs, moved, peaks, strict=True)):
        label, place = each["family"].replace("+", " x2"), (0, -12 if i % 2 else 6)
        right.annotate(label, (x, y), place, textcoords="offset points", ha="center", fontsize=7)
    return figure


def _memory(runs: list[Mapping[str, Any]]) -> Any:
    """Predicted and measured peak memory, and the bound."""
    figure, axis = plt.subplots(figsize=(9.5, 0.42 * len(runs) + 1.3))
    places = np.arange(len(runs))
    measured = [each["measured"]["peak_memory"] / 1e6 for each in runs]
    axis.barh(places - 0.18, measured, 0.36, color=OURS, label="measured")
    predicted = [each["predicted"]["peak_memory"] / 1e6 for each in runs]
    axis.barh(places + 0.18, predicted, 0.36, color=GROUND, label="predicted by --dry-run")
    bounds = [each["bound"] / 1e6 for each in runs]
    axis.plot(bounds, places, "|", color=LIMIT, markersize=16, markeredgewidth=2, label="bound")
    names = [f"{each['family'].replace('+', ', layers x2')}, {each['method']}" for each in runs]
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(100, None)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks([each for each in (100, 200, 400, 1000, 2000, 4000) if each < 2 * max(bounds)])
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlabel("peak resident memory (MB, logarithmic)")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
