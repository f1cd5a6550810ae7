"""Ours, mergekit, the naive script and the floor side by side, in one run.

    python -m benchmarks.streaming.compare RESULT.json --shape 0.1b --work /tmp/bench

Every repeat measures every contender once, one repeat forwards and the next backwards, so that
nobody always comes first. Ratios are taken within a repeat, then their median, least and most are
reported: what else the machine does changes from minute to minute, less within one round.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.streaming import contenders
from benchmarks.streaming.family import ROLES, Shape, add_shape_options, build, chosen_shape
from benchmarks.streaming.machine import load, machine, versions_in
from benchmarks.streaming.measure import Command, run, summary
from realign.repair.estimate import STREAM_BYTES

Runs = dict[str, list[dict[str, Any]]]
CHUNK = STREAM_BYTES  # what the engine reads at a time


def measure(
    commands: Sequence[Command], *, repeats: int, inputs: Sequence[Path], keep: bool = False
) -> tuple[Runs, list[float]]:
    """Run every command `repeats` times in alternating order; the last outputs are kept if asked.

    Returns:
        The runs by name, and the load of the machine before each round.
    """
    runs: Runs = {command.name: [] for command in commands}
    loads: list[float] = []
    for repeat in range(repeats):
        loads.append(load())
        for command in commands if repeat % 2 == 0 else commands[::-1]:
            facts = run(command, inputs=inputs)
            facts.pop("log")
            runs[command.name].append(facts)
            shown = f"{facts['wall']:.2f} s, {facts['peak_rss'] / 1e6:.0f} MB"
            print(f"  {repeat + 1}/{repeats} {command.name}: {shown}", file=sys.stderr, flush=True)
            if command.output is not None:
                if keep and repeat == repeats - 1:
                    forget(command.output)
                else:
                    shutil.rmtree(command.output, ignore_errors=True)
    return runs, loads


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, which is for the inputs."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def compare(
    family: Path, shape: Shape, *, work: Path, repeats: int, rival: bool, seed: int = 0
) -> dict[str, Any]:
    """Build the family, measure everything, check the outputs.

    Args:
        family: where the three checkpoints are or will be.
        shape: theirs.
        work: for outputs and mergekit's environment.
        repeats: rounds.
        rival: whether mergekit takes part.
        seed: of the family.
    """
    build(family, shape, seed=seed)
    outputs = work / "outputs"
    outputs.mkdir(parents=True, exist_ok=True)
    python = contenders.mergekit_environment(work / "mergekit") if rival else None
    commands = [
        contenders.floor(family, outputs / "floor", chunk=CHUNK, hashed=False),
        contenders.floor(family, outputs / "floor-hashed", chunk=CHUNK, hashed=True),
        contenders.ours(family, outputs / "realign"),
        contenders.ours(family, outputs / "realign-first", first=True),
    ]
    if python is not None:
        commands += [
            contenders.mergekit(family, outputs / "mergekit", python=python, exact=False),
            contenders.mergekit(family, outputs / "mergekit-32", python=python, exact=True),
        ]
    commands.append(contenders.naive(family, outputs / "naive"))
    inputs = [family / role for role in ROLES]
    run(contenders.ours(family, outputs / "realign"))  # keeps the hashes of the inputs
    for command in contenders.start_ups(python) if repeats > 1 else ():
        run(command)  # fills the page cache
    starts, _ = measure(contenders.start_ups(python), repeats=repeats, inputs=())
    runs, loads = measure(commands, repeats=repeats, inputs=inputs, keep=True)
    made = {each.name: each.output for each in commands if not each.name.startswith("floor")}
    agreement = run(
        Command(
            "agreement",
            (
                *(sys.executable, "-m", "benchmarks.streaming.agreement", str(family)),
                *map(str, made.values()),
            ),
        )
    )
    folders = {folder.name: name for name, folder in made.items() if folder is not None}
    agreed = json.loads(agreement["log"].splitlines()[-1])
    shutil.rmtree(outputs)
    return {
        "schema": "realign/bench-compare/1",
        "machine": machine(),
        "mergekit": versions_in(python, ("mergekit", "torch", "transformers", "safetensors"))
        if python
        else None,
        "gamma": contenders.GAMMA,
        "chunk_bytes": CHUNK,
        "shape": vars(shape),
        "parameters": shape.parameters,
        "checkpoint_bytes": shape.nbytes,
        "repeats": repeats,
        "load_before": loads,
        "contenders": {name: summary(each) for name, each in runs.items()},
        "start_up": {name: summary(each) for name, each in starts.items()},
        "ratios": ratios(runs, starts),
        "ratios_of_first_run": ratios(runs, starts, ours=contenders.FIRST),
        "agreement": {folders[name]: facts for name, facts in agreed.items()},
    }


def ratios(runs: Runs, starts: Runs, *, ours: str = "realign") -> dict[str, Any]:
    """Ours over the floors; the others over ours: whole commands, and without start-up."""
    begun = {
        name: {key: statistics.median(each[key] for each in repeats) for key in ("wall", "cpu")}
        for name, repeats in starts.items()
    }
    found: dict[str, Any] = {}
    for name, repeats in runs.items():
        contender = re.split(r"[ ,]", name)[0]
        if contender == "realign":
            continue
        of_ours = (runs[ours], begun["realign"])
        theirs = (repeats, begun[contender])
        (top, top_start), (low, low_start) = (
            (of_ours, theirs) if contender == "floor" else (theirs, of_ours)
        )
        pairs = list(zip(top, low, strict=True))
        found[name] = {"of": "ours / this" if contender == "floor" else "this / ours"}
        for key in ("wall", "cpu", "peak_rss"):
            found[name][key] = _spread([up[key] / down[key] for up, down in pairs])
        for key in ("wall", "cpu"):
            found[name][f"{key}_without_start_up"] = _spread(
                [(up[key] - top_start[key]) / (down[key] - low_start[key]) for up, down in pairs]
            )
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(found: Mapping[str, Any]) -> str:
    """The result as text."""
    lines = [f"{'':18}{'wall s':>9}{'CPU s':>9}{'RSS MB':>9}{'start-up s':>12}"]
    for name, each in found["contenders"].items():
        start = found["start_up"][re.split(r"[ ,]", name)[0]]["wall"]["median"]
        wall, cpu, rss = (each[key]["median"] for key in ("wall", "cpu", "peak_rss"))
        lines.append(f"{name:18}{wall:9.2f}{cpu:9.2f}{rss / 1e6:9.0f}{start:12.2f}")
    for name, each in found["ratios"].items():
        whole, work = (each[key]["median"] for key in ("wall", "wall_without_start_up"))
        memory = each["peak_rss"]["median"]
        lines.append(
            f"{each['of'].replace('this', name)}: wall {whole:.2f}, without start-up {work:.2f}, "
            f"peak RSS {memory:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path)
    add_shape_options(parser, "1.1b")
    parser.add_argument(
        "--work", type=Path, required=True, help="an empty folder, or an earlier one"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-mergekit", action="store_true")
    options = parser.parse_args()
    shape = chosen_shape(options)
    found = compare(
        options.work / "families" / options.shape,
        shape,
        work=options.work,
        repeats=options.repeats,
        rival=not options.no_mergekit,
        seed=options.seed,
    )
    options.result.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(show(found))


if __name__ == "__main__":
    main()
