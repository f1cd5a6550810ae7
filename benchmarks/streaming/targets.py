"""The targets and whether the recorded measurements meet them.

Here: the arithmetic from result files to rows. Not here: how rows look on the page (`page`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Data = Mapping[str, Mapping[str, Any]]
"""Result files by their name without `bench-` and `.json`."""

FLOOR, MERGEKIT, NAIVE, MEMORY = 1.4, 2.5, 3.5, 400e6
MERGEKIT_MEMORY, NAIVE_MEMORY = 10, 19
PREDICTION = 0.25
LINEAR, FLAT = 0.15, 1.1


@dataclass(frozen=True)
class Row:
    """One target."""

    what: str
    target: str
    measured: str | None = None
    """None: not measured yet."""
    met: bool | None = None
    conditions: str = ""
    script: str = ""


def spread(each: Mapping[str, float], digits: int = 2, unit: str = "") -> str:
    """Median with least and most."""
    low, high = each["min"], each["max"]
    return f"{each['median']:.{digits}f}{unit} ({low:.{digits}f}-{high:.{digits}f})"


OTHERS = (
    ("LSSF edit pass", "at least 3x faster than a naive full-SVD script (CPU)"),
    ("Rank decisions", "identical to float64 SVD on a suite of at least 96 matrices"),
    ("Weight-only scan", "at least 3.5x (square) and 7x (4:1) faster than a full-SVD script"),
    ("Scan of a further fine-tune", "at most 2x of only reading subject and reference"),
    ("GPU", "at most 1.3x of the read-write floor; all layers of 8 B decomposed in 30 s"),
)
"""Measured by other scripts; each result file brings its rows under `targets`."""


def rows(data: Data) -> list[Row]:
    """Every target in the order of the page."""
    found = [
        *_compare(data.get("compare")),
        *_memory(data),
        *_scaling(data.get("scaling")),
        _predicted(data),
    ]
    brought = [
        Row(**{key: each[key] for key in Row.__dataclass_fields__ if key in each})
        for source in data.values()
        for each in source.get("targets", ())
    ]
    for start, target in OTHERS:
        fitting = [row for row in brought if row.what.lower().startswith(start.lower())]
        found += fitting or [Row(start, target)]
        brought = [row for row in brought if row not in fitting]
    return found + brought


def _compare(found: Mapping[str, Any] | None) -> list[Row]:
    script = "benchmarks/streaming/compare.py"

    def row(
        what: str,
        target: str,
        name: str,
        key: str,
        holds: Callable[[float], bool],
        note: str,
        ratios: str = "ratios",
    ) -> Row:
        if found is None or name not in found.get(ratios, {}):
            return Row(what, target, script=script)
        each = found[ratios][name][key]
        return Row(what, target, spread(each, unit="x"), holds(each["median"]), note, script)

    work, whole = "start-up of both taken off", "whole commands, start-up included"
    resta = "Element-wise repair (RESTA), wall"
    wall, inner = "wall", "wall_without_start_up"
    return [
        row(
            f"{resta} over the read-write floor",
            f"at most {FLOOR}x",
            "floor",
            inner,
            lambda ratio: ratio <= FLOOR,
            work,
        ),
        row(
            "the same on a first run, over the floor that hashes, too",
            f"at most {FLOOR}x",
            "floor + SHA-256",
            inner,
            lambda ratio: ratio <= FLOOR,
            f"{work}; a manifest needs the hashes",
            "ratios_of_first_run",
        ),
        row(
            f"{resta} against mergekit",
            f"at least {MERGEKIT}x faster",
            "mergekit",
            wall,
            lambda ratio: ratio >= MERGEKIT,
            whole,
        ),
        row(
            "the same against mergekit in float32, whose output has our bits",
            f"at least {MERGEKIT}x faster",
            "mergekit, float32",
            wall,
            lambda ratio: ratio >= MERGEKIT,
            whole,
        ),
        row(
            f"{resta} against the naive script",
            f"at least {NAIVE}x faster",
            "naive",
            wall,
            lambda ratio: ratio >= NAIVE,
            whole,
        ),
        row(
            "the same on a first run, which hashes its inputs, against mergekit",
            f"at least {MERGEKIT}x faster",
            "mergekit",
            wall,
            lambda ratio: ratio >= MERGEKIT,
            f"{whole}; mergekit hashes nothing",
            "ratios_of_first_run",
        ),
        row(
            "the same on a first run, against the naive script",
            f"at least {NAIVE}x faster",
            "naive",
            wall,
            lambda ratio: ratio >= NAIVE,
            f"{whole}; the script hashes nothing",
            "ratios_of_first_run",
        ),
        _peak(found, script),
        row(
            "Peak RSS against mergekit",
            f"{MERGEKIT_MEMORY}x less",
            "mergekit",
            "peak_rss",
            lambda ratio: ratio >= MERGEKIT_MEMORY,
            "pages of mapped files count",
        ),
        row(
            "Peak RSS against the naive script",
            f"{NAIVE_MEMORY}x less",
            "naive",
            "peak_rss",
            lambda ratio: ratio >= NAIVE_MEMORY,
            "pages of mapped files count",
        ),
    ]


def _peak(found: Mapping[str, Any] | None, script: str) -> Row:
    what, target = "Peak RSS of an element-wise repair", f"at most {MEMORY / 1e6:.0f} MB"
    if found is None:
        return Row(what, target, script=script)
    ours = [each for name, each in found["contenders"].items() if name.startswith("realign")]
    peak = max(each["peak_rss"]["max"] for each in ours)
    size = f"{found['parameters'] / 1e9:.1f} B parameters"
    return Row(what, target, f"{peak / 1e6:.0f} MB", peak <= MEMORY, size, script)


def _memory(data: Data) -> list[Row]:
    script = "benchmarks/streaming/scaling.py"
    what = "Peak RSS while repairing"
    target = "at most 400 MB + 6 x the largest decomposed matrix in float32"
    found: list[Row] = []
    for name in ("wide", "scaling"):
        for each in data.get(name, {}).get("runs", ()):
            if name == "scaling" and each["method"] == "resta":
                continue
            peak, bound = each["peak_rss"]["max"], each["bound"]
            measured = f"{peak / 1e6:.0f} MB of {bound / 1e6:.0f} MB"
            where = f"{each['family']}, {each['method']}"
            found.append(Row(what, target, measured, peak <= bound, where, script))
    return found or [Row(what, target, script=script)]


def _scaling(found: Mapping[str, Any] | None) -> list[Row]:
    script = "benchmarks/streaming/scaling.py"
    linear = ("Wall time linear in bytes", f"every residual below {100 * LINEAR:.0f} % of its run")
    flat = ("Peak RSS flat over the series", f"most over least at most {FLAT}")
    if found is None or found["fit"] is None:
        return [Row(*linear, script=script), Row(*flat, script=script)]
    fit = found["fit"]
    worst = fit["largest_relative_residual"]
    grown = fit["peak_rss_most_over_least"]
    times = f"{fit['size_most_over_least']:.0f}x in bytes, layers doubled twice"
    return [
        Row(*linear, f"at most {100 * worst:.0f} %", worst <= LINEAR, times, script),
        Row(*flat, f"{grown:.2f}x", grown <= FLAT, times, script),
    ]


def _predicted(data: Data) -> Row:
    script = "benchmarks/streaming/scaling.py"
    predicted = ("`--dry-run` predicts bytes and peak memory", "within 25 % on every run")
    runs = [each for name in ("wide", "scaling") for each in data.get(name, {}).get("runs", ())]
    if not runs:
        return Row(*predicted, script=script)
    off = {
        key: max(
            (each["predicted_over_measured"][key] for each in runs),
            key=lambda ratio: abs(ratio - 1),
        )
        for key in ("read", "written", "peak_memory")
    }
    text = ", ".join(f"{re.sub('_', ' ', key)} {ratio:.2f}x" for key, ratio in off.items())
    good = all(abs(ratio - 1) <= PREDICTION for ratio in off.values())
    return Row(*predicted, f"worst: {text}", good, "predicted over measured", script)
