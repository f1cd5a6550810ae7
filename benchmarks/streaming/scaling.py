"""Time and memory against size, and what `--dry-run` predicted.

    python -m benchmarks.streaming.scaling RESULT.json --work /tmp/bench
    python -m benchmarks.streaming.scaling RESULT.json --work /tmp/bench --wide

The series grows in width and depth, and doubles the layers at two fixed widths. With --wide it is
one layer in the shape of a 70 B model with its embeddings, which is about memory: the bound is
stated in the largest matrix that is decomposed, and this is a large one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.streaming import contenders
from benchmarks.streaming.compare import CHUNK, measure
from benchmarks.streaming.family import ROLES, SHAPES, Shape, build
from benchmarks.streaming.machine import machine
from benchmarks.streaming.measure import run, summary

FIXED = 400e6
"""Bytes that a repair may hold whatever the model."""

MATRICES = 6
"""How many float32 copies of the largest decomposed matrix it may hold on top."""


@dataclass(frozen=True)
class Step:
    """One family of the series and the methods that run on it."""

    name: str
    shape: Shape
    methods: tuple[str, ...]


def series(names: Sequence[str]) -> Iterable[Step]:
    """The shapes by name; NAME+ is NAME with twice its layers."""
    for name in names:
        shape = SHAPES[name.rstrip("+")]
        if name.endswith("+"):
            shape = replace(shape, layers=2 * shape.layers)
        spectral = name.startswith("0.1b")
        yield Step(name, shape, ("resta", "delta_svd") if spectral else ("resta",))


SERIES = ("0.1b", "0.1b+", "0.3b", "0.3b+", "1.1b")


def measure_series(
    steps: Iterable[Step], *, work: Path, repeats: int, keep: Sequence[str] = (), seed: int = 0
) -> dict[str, Any]:
    """Build each family, measure its repairs, and remove it unless it is in `keep`."""
    runs: list[dict[str, Any]] = []
    for step in steps:
        family = work / "families" / step.name
        print(f"{step.name}: {step.shape.parameters / 1e9:.2f} B", file=sys.stderr, flush=True)
        build(family, step.shape, seed=seed)
        runs += [_row(step, family, method, work, repeats) for method in step.methods]
        if step.name not in keep:
            shutil.rmtree(family)
    return {"machine": machine(), "repeats": repeats, "runs": runs, "fit": fit(runs)}


def _row(step: Step, family: Path, method: str, work: Path, repeats: int) -> dict[str, Any]:
    inputs = [family / role for role in ROLES]
    output = work / "outputs" / "realign"
    output.parent.mkdir(parents=True, exist_ok=True)
    dry = run(contenders.ours(family, None, method=method))
    predicted = json.loads(dry["log"])["estimate"]
    command = contenders.ours(family, output, method=method)
    floor = contenders.floor(family, output.with_name("floor"), chunk=CHUNK, hashed=False)
    # The floor is timed beside the element-wise method only: decompositions are no streaming.
    commands = [command, floor] if method == "resta" else [command]
    # Predictions are those of a first run, which reads everything for its hash; timed runs find the
    # hashes that an earlier run has kept.
    first = run(contenders.ours(family, output, method=method, first=True))
    if method == "resta":
        run(command)
    runs, loads = measure(commands, repeats=repeats, inputs=inputs)
    found = summary(runs["realign"])
    largest = predicted["largest_matrix"]
    # What the dry run itself reads (modules, headers) is not part of the prediction.
    measured = {
        "read": first["bytes_read"] - dry["bytes_read"],
        "written": found["bytes_written"]["median"],
        "peak_memory": found["peak_rss"]["max"],
    }
    return {
        "family": step.name,
        "method": method,
        "shape": vars(step.shape),
        "parameters": step.shape.parameters,
        "checkpoint_bytes": step.shape.nbytes,
        "moved_bytes": 4 * step.shape.nbytes,
        "load_before": loads,
        "wall": found["wall"],
        "cpu": found["cpu"],
        "peak_rss": found["peak_rss"],
        "floor": summary(runs["floor"])["wall"] if "floor" in runs else None,
        "predicted": {key: predicted[key] for key in measured},
        "measured": measured,
        "predicted_over_measured": {key: predicted[key] / measured[key] for key in measured},
        "largest_matrix": largest,
        "bound": FIXED + MATRICES * 4 * largest,
    }


def fit(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Least squares of median wall time on bytes moved, element-wise method."""
    chosen = [each for each in runs if each["method"] == "resta"]
    if len(chosen) < 3:
        return None
    moved = np.array([each["moved_bytes"] / 1e9 for each in chosen])
    wall = np.array([each["wall"]["median"] for each in chosen])
    design = np.stack([np.ones_like(moved), moved], axis=1)
    (start, slope), *_ = np.linalg.lstsq(design, wall, rcond=None)
    residuals = wall - (start + slope * moved)
    scatter = float(((wall - wall.mean()) ** 2).sum())
    peaks = [each["peak_rss"]["median"] for each in chosen]
    return {
        "seconds_at_zero": float(start),
        "seconds_per_gb": float(slope),
        "residuals": {each["family"]: float(r) for each, r in zip(chosen, residuals, strict=True)},
        "largest_relative_residual": float(np.abs(residuals / wall).max()),
        "r_squared": 1 - float((residuals**2).sum()) / scatter,
        "peak_rss_most_over_least": max(peaks) / min(peaks),
        "size_most_over_least": float(moved.max() / moved.min()),
    }


def show(found: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'':20}{'GB moved':>10}{'wall s':>9}{'RSS MB':>9}{'bound MB':>10}{'predicted':>11}"]
    for each in found["runs"]:
        lines.append(
            f"{each['family'] + ' ' + each['method']:20}{each['moved_bytes'] / 1e9:10.2f}"
            f"{each['wall']['median']:9.2f}{each['peak_rss']['max'] / 1e6:9.0f}"
            f"{each['bound'] / 1e6:10.0f}{each['predicted']['peak_memory'] / 1e6:11.0f}"
        )
    if found["fit"]:
        each = found["fit"]
        worst, grown = each["largest_relative_residual"], each["peak_rss_most_over_least"]
        lines.append(
            f"wall = {each['seconds_at_zero']:.2f} s + {each['seconds_per_gb']:.3f} s/GB, "
            f"residuals at most {100 * worst:.0f} %; peak RSS grows {grown:.2f}x"
        )
    return "\n".join(lines)


def wide_step(*, layers: int | None = None, vocab: int | None = None) -> Step:
    """The 70 B-shaped layer, with fewer embeddings or more layers if asked."""
    shape = SHAPES["70b-layer"]
    shape = replace(shape, layers=layers or shape.layers, vocab=vocab or shape.vocab)
    return Step("70b-layer", shape, ("resta", "delta_svd"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=list(SERIES), metavar="NAME[+]")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", nargs="*", default=[], help="families that are not removed")
    parser.add_argument("--wide", action="store_true", help="one 70 B-shaped layer, once")
    parser.add_argument("--layers", type=int, help="of the wide shape")
    parser.add_argument("--vocab", type=int, help="of the wide shape")
    options = parser.parse_args()
    steps = (
        [wide_step(layers=options.layers, vocab=options.vocab)]
        if options.wide
        else series(options.families)
    )
    repeats = 1 if options.wide else options.repeats
    found = measure_series(steps, work=options.work, repeats=repeats, keep=options.keep)
    found = {"schema": f"realign/bench-{'wide' if options.wide else 'scaling'}/1", **found}
    options.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(show(found))


if __name__ == "__main__":
    main()
