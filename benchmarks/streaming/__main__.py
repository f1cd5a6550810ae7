"""Every streaming benchmark, stage by stage.

    python -m benchmarks.streaming [STAGE ...] --work FOLDER

Stages: compare, scaling, wide, page (all by default). A stage whose result is in FOLDER/results is
not run again (--again runs it), so an interrupted run goes on where it stopped. `page` copies the
results to docs/data, writes the tables of docs/benchmarks.md and draws its pictures. Disk at its
highest: 16 GB (compare), 25 GB (wide). Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.streaming import compare, draw, page, scaling
from benchmarks.streaming.family import SHAPES

ROOT = Path(__file__).parents[2]
STAGES = ("compare", "scaling", "wide", "page")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--work", type=Path, required=True, help="for families and results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--again", action="store_true", help="measure again what has a result")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b", help="of compare")
    parser.add_argument("--families", nargs="+", default=list(scaling.SERIES), metavar="NAME[+]")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--layers", type=int, help="of wide")
    parser.add_argument("--vocab", type=int, help="of wide; less than 128256 saves disk and time")
    options = parser.parse_args()
    options.work = options.work.resolve()
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    results = options.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    run = {
        "compare": (lambda: _compare(options), compare.show),
        "scaling": (lambda: _scaling(options), scaling.show),
        "wide": (lambda: _wide(options), scaling.show),
    }
    for stage in options.stages or STAGES:
        if stage == "page":
            _page(options.docs, results)
        else:
            _stage(stage, *run[stage], file=results / f"bench-{stage}.json", again=options.again)


def _stage(
    name: str,
    measure: Callable[[], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
    *,
    file: Path,
    again: bool,
) -> None:
    if again or not file.exists():
        start = time.monotonic()
        found = measure()
        file.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(f"{name}\n{show(json.loads(file.read_text('utf-8')))}\n")


def _compare(options: argparse.Namespace) -> dict[str, Any]:
    family = options.work / "families" / options.shape
    found = compare.compare(
        family,
        SHAPES[options.shape],
        work=options.work,
        repeats=options.repeats,
        rival=not options.no_mergekit,
    )
    if options.shape not in options.families:  # the series takes it up and removes it
        shutil.rmtree(family)
    return found


def _scaling(options: argparse.Namespace) -> dict[str, Any]:
    steps = scaling.series(options.families)
    found = scaling.measure_series(steps, work=options.work, repeats=options.repeats)
    return {"schema": "realign/bench-scaling/1", **found}


def _wide(options: argparse.Namespace) -> dict[str, Any]:
    step = scaling.wide_step(layers=options.layers, vocab=options.vocab)
    found = scaling.measure_series([step], work=options.work, repeats=1)
    return {"schema": "realign/bench-wide/1", **found}


def _page(docs: Path, results: Path) -> None:
    (docs / "data").mkdir(exist_ok=True)
    for file in results.glob("bench-*.json"):
        shutil.copyfile(file, docs / "data" / file.name)
    draw.draw(docs)
    page.write(docs)


if __name__ == "__main__":
    main()
