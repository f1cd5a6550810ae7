"""Measuring one command in a child process, with the page cache warm and nothing left to flush.

Here: the conditions of every measurement. Not here: which commands (`contenders`, `floor`).
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_BLOCK = 16 * 2**20


@dataclass(frozen=True)
class Command:
    """What is run, and where its result goes."""

    name: str
    argv: tuple[str, ...]
    output: Path | None = None
    """Removed before the command is run."""


class CommandFailed(Exception):
    """A measured command did not do its work; the message holds the end of its log."""


def warm(folders: Iterable[Path]) -> None:
    """Read every weight file once, so that the page cache holds it."""
    buffer = bytearray(_BLOCK)
    for folder in folders:
        for file in sorted(folder.glob("*.safetensors")):
            with file.open("rb", buffering=0) as handle:
                while handle.readinto(buffer):
                    pass


def run(command: Command, *, inputs: Iterable[Path] = ()) -> dict[str, Any]:
    """Run a command once and say what it cost.

    Args:
        command: what to run.
        inputs: folders that are in the page cache when it starts.

    Returns:
        Seconds (`wall`, `user`, `system`, `cpu`, and `sync`: what flushing the disk took after the
        command had ended), bytes (`peak_rss` and others), `log`: what was printed.
    """
    if command.output is not None:
        shutil.rmtree(command.output, ignore_errors=True)
    os.sync()
    warm(inputs)
    # Threads are the contender's own choice, as for somebody who sets nothing.
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as scratch:
        result, log = Path(scratch, "result.json"), Path(scratch, "log")
        # A small process in between: see launch.py.
        launcher = [sys.executable, "-I", "-S", HERE / "launch.py", result, log]
        subprocess.run([*launcher, *command.argv], env=environment, check=True)
        facts: dict[str, Any] = json.loads(result.read_text("utf-8"))
        printed = log.read_text("utf-8", errors="replace")
    start = time.perf_counter()
    os.sync()
    facts["sync"] = time.perf_counter() - start
    facts["cpu"] = facts["user"] + facts["system"]
    if facts.pop("exit"):
        raise CommandFailed(f"{command.name} failed: {' '.join(command.argv)}\n{printed[-3000:]}")
    return {**facts, "log": printed}


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median, least and most of every figure of repeated runs."""
    keys = [key for key, value in runs[0].items() if isinstance(value, int | float)]
    found: dict[str, Any] = {"repeats": len(runs)}
    for key in keys:
        values = [each[key] for each in runs]
        found[key] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
    return found
