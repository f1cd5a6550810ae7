"""The weight-only scan against a full-SVD script, and its spectrum alone against one SVD.

    python -m benchmarks.spectra.scan [--shapes 2048x2048 2048x8192] [--repeats N]

Ours is `matrix_drift`, which every audit runs on every matrix: distance, alignment, subspace and
LoX ratios, entropy and ranks, principal angles. The script computes the same numbers from
`torch.linalg.svd` of both differences in float32.
"""

from __future__ import annotations

from benchmarks.spectra.alone import one_thread

if __name__ == "__main__":
    one_thread()

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.spectra import naive
from benchmarks.spectra.synthetic import weights
from benchmarks.spectra.timing import in_turns, ratio, spoken
from realign.subspace.drift import DEFAULT_SIZE, matrix_drift
from realign.subspace.spectrum import spectrum
from realign.subspace.vectors import difference

SHAPES = ("2048x2048", "2048x8192")
TARGETS = {1: 3.5, 4: 7.0}
"""Least ratio by the aspect of the matrix."""


def measure_shape(d_out: int, d_in: int, *, repeats: int) -> dict[str, Any]:
    """Ratios of one shape, and how far the script's numbers are from ours."""
    family = weights(d_out, d_in, seed=1)
    task = difference(family.finetuned, family.aligned)
    found: dict[str, dict[str, float]] = {}

    def ours() -> None:
        metrics = matrix_drift(
            key="w",
            module="w",
            layer=0,
            reference=family.aligned,
            subject=family.finetuned,
            base=family.base,
        ).terms.metrics()
        found["ours"] = {name: getattr(metrics, name) for name in found.get("script", {})}

    def script() -> None:
        found["script"] = naive.drift(family.base, family.aligned, family.finetuned, k=DEFAULT_SIZE)

    spectrum(torch.eye(4))  # libraries are loaded before the first turn
    small = min(d_out, d_in) <= 512  # where it takes seconds, a turn to warm up changes nothing
    times = in_turns({"script": script, "ours": ours}, repeats=repeats, warm_up=small)
    times |= in_turns(
        {
            "svd": lambda: torch.linalg.svd(task, full_matrices=False),
            "svdvals": lambda: torch.linalg.svdvals(task),
            "spectrum": lambda: spectrum(task),
        },
        repeats=max(1, repeats - 2),
        warm_up=small,
    )
    errors = [
        abs(found["script"][name] - value) / max(abs(value), 1e-3)
        for name, value in found["ours"].items()
    ]
    return {
        "scan": ratio(times["script"], times["ours"]),
        "spectrum": ratio(times["svd"], times["spectrum"]),
        "values_only": ratio(times["svdvals"], times["spectrum"]),
        "seconds_of": {name: each.median for name, each in times.items()},
        "largest_difference": max(errors),
    }


def target_of(shape: str) -> float | None:
    """The least ratio for a shape; None where there is no target."""
    sides = sorted(int(part) for part in shape.split("x"))
    return TARGETS.get(sides[1] // sides[0]) if sides[1] % sides[0] == 0 else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the ratios of every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    for shape in options.shapes:
        d_out, d_in = (int(part) for part in shape.split("x"))
        found[shape] = measure_shape(d_out, d_in, repeats=options.repeats)
        row = found[shape]
        print(
            f"{shape}: scan {spoken(row['scan'])}, spectrum alone {spoken(row['spectrum'])} "
            f"against svd, {spoken(row['values_only'])} against svdvals",
            file=sys.stderr,
        )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
