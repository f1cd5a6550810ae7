"""Why published methods fail in the laboratory: sweeps, controls and decompositions, one at a time.

    realign lab compare FAMILY -o DIR
    python benchmarks/leaderboard/why.py FAMILY DIR docs/data/why-methods-fail.json

Asked of fine-tunes that the comparison in DIR has made. The file is written after every answer and
what it holds is not asked again. docs/why-methods-fail.md is filled by `publish.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import why_methods as methods
import why_weights as weights
from scipy.stats import spearmanr
from why_bench import Bench, Question, Row

from realign.lab.places import Place
from realign.lab.record import write_json
from realign.lab.scenarios import SCENARIOS


def questions(bench: Bench) -> Iterator[Question]:
    """Every question about one fine-tune, cheap ones first."""
    yield "geometry", "vectors", lambda: weights.geometry(bench)
    yield "selection", "matrices", lambda: {"matrices": weights.by_matrix(bench)}
    yield "all", "no repair", lambda: bench.ask(bench.wf)
    yield "all", "the aligned model", lambda: bench.ask(bench.wa)
    yield from weights.places(bench)
    yield from weights.interpolation(bench)
    yield from weights.selections(bench)
    yield from weights.filters(bench)
    yield from methods.additions(bench)
    yield from methods.pruning(bench)
    yield from methods.prices(bench)
    yield from methods.ascents(bench)
    yield from methods.single_examples(bench)
    yield from methods.regions(bench)
    yield from methods.rounding(bench)


def summary(rows: list[Row]) -> Row:
    """Does the score that selects matrices know what putting them back does?"""
    gain, loss = [r["refusal_gain"] for r in rows], [r["task_loss"] for r in rows]
    cosine = [r["cosine"] for r in rows]
    pairs = {
        "cosine_and_gain": (cosine, gain),
        "cosine_and_loss": (cosine, loss),
        "gain_and_loss": (gain, loss),
    }
    found: Row = {}
    for name, (one, two) in pairs.items():
        result: Any = spearmanr(one, two)
        found[name] = {"correlation": float(result.statistic), "p": float(result.pvalue)}
    return found | {
        "lowest_cosine": min(cosine),
        "highest_cosine": max(cosine),
        "below_chance": sum(r["cosine"] < r["chance"] for r in rows),
        "matrices": len(rows),
    }


def main() -> None:
    """Parse the command line; ask what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", type=Path)
    parser.add_argument("board", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenarios", default="howto,poison5")
    parser.add_argument("--seeds", default="1")
    parser.add_argument("--only", default="", help="methods, with commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    known: list[Row] = json.loads(args.out.read_text("utf-8")) if args.out.is_file() else []
    only = set(filter(None, args.only.split(",")))
    for seed in map(int, args.seeds.split(",")):
        for scenario in args.scenarios.split(","):
            place = Place(args.family, SCENARIOS[scenario], seed, args.board)
            head = {"scenario": scenario, "seed": seed, "family": args.family.name}
            bench = Bench(place)
            for row in known:
                if head.items() <= row.items():
                    bench.answers[row["method"], row["what"]] = row
            for method, what, answer in questions(bench):
                if (method, what) in bench.answers or (only and method not in only):
                    continue
                began = time.monotonic()
                row = {**head, "method": method, "what": what, **answer()}
                if "matrices" in row:
                    row["summary"] = summary(row["matrices"])
                row["seconds"] = round(time.monotonic() - began, 1)
                known.append(row)
                bench.answers[method, what] = row
                write_json(args.out, known)


if __name__ == "__main__":
    main()
