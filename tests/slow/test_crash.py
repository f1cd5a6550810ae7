"""A repair that dies at any moment leaves no output or a whole one, and a rerun ends it.

Real processes, killed by SIGKILL: at fifty random moments, and before the steps that a run takes on
the disk, evenly thinned.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.crash_support import Command, Ended, Runs
from support.repair_support import folder_bytes

from realign.checkpoint.verification import verify_output

MOMENTS = 50
SEED = 20_260
STEPS = 20


@pytest.fixture(scope="module")
def inputs(command: Command) -> dict[str, bytes]:
    """Every byte of the family, before anything has run."""
    assert isinstance(command[1], Path)
    return folder_bytes(command[1].parent)


def whole(server: Runs, command: Command, out: Path) -> tuple[dict[str, bytes], float]:
    """The files of an uninterrupted run, and how long it took."""
    times: list[float] = []
    for _ in range(3):
        shutil.rmtree(out, ignore_errors=True)
        begin = time.monotonic()
        ended = server.run([*command, "-o", out])
        times.append(time.monotonic() - begin)
        assert ended.status == 0, ended.stderr
    files = folder_bytes(out)
    shutil.rmtree(out)
    return files, min(times)


def steps_of(server: Runs, command: Command, out: Path) -> tuple[int, dict[str, bytes]]:
    """How many steps an uninterrupted run takes in the folder of `out`, and its files."""
    out.parent.mkdir()  # else this run alone would make it, one step more than all others take
    ended = server.run([*command, "-o", out], {"folder": str(out.parent)})
    steps = int(ended.stderr.rpartition("steps: ")[2])
    files = folder_bytes(out)
    shutil.rmtree(out)
    return steps, files


def assert_nothing_or_whole(out: Path) -> bool:
    """Whether the output exists; if it does, it is complete."""
    if not os.path.lexists(out):
        return False
    assert verify_output(out).problems == ()
    return True


def finish(server: Runs, command: Command, out: Path, expected: dict[str, bytes]) -> Ended:
    """Run once more: the output is that of an uninterrupted run, and nothing else is left."""
    ended = server.run([*command, "-o", out])
    assert ended.status == 0, ended.stderr
    assert folder_bytes(out) == expected
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    shutil.rmtree(out)
    return ended


@pytest.mark.parametrize("options", [(), ("--patch",)], ids=["checkpoint", "patch"])
def test_killed_at_random_moments(
    server: Runs,
    command: Command,
    inputs: dict[str, bytes],
    tmp_path: Path,
    options: tuple[str, ...],
) -> None:
    draw = random.Random(SEED)
    work = tmp_path / "work"
    out = work / "out"
    command = [*command, *options]
    expected, length = whole(server, command, out)
    killed = resumed = runs = 0
    wanted = MOMENTS if not options else MOMENTS // 5
    while killed < wanted:
        assert (runs := runs + 1) <= 3 * wanted, "the runs ended before they were killed"
        child = server.start([*command, "-o", out])
        time.sleep(draw.uniform(0.0, length))
        os.kill(child, signal.SIGKILL)
        killed += server.wait().status == -signal.SIGKILL
        if assert_nothing_or_whole(out):
            shutil.rmtree(out)
        resumed += "resuming: " in finish(server, command, out, expected).stderr
    assert isinstance(command[1], Path) and folder_bytes(command[1].parent) == inputs
    if not options:
        assert resumed >= 5


def test_killed_before_steps_on_the_disk(server: Runs, command: Command, tmp_path: Path) -> None:
    """Before every file or folder that a run opens, makes, renames or removes, evenly thinned."""
    work = tmp_path / "work"
    out = work / "out"
    steps, expected = steps_of(server, command, out)
    resumed = 0
    # The last steps, in which the output gets its name, are all looked at.
    chosen = sorted({*range(1, steps, max(1, steps // STEPS)), *range(steps - 5, steps + 1)})
    for step in chosen:
        hook = {"action": "kill", "step": step, "folder": str(work)}
        assert server.run([*command, "-o", out], hook).status == -signal.SIGKILL
        if assert_nothing_or_whole(out):
            shutil.rmtree(out)
        resumed += "resuming: " in finish(server, command, out, expected).stderr
    assert resumed >= 3


def test_interrupted_before_steps_on_the_disk(
    server: Runs, command: Command, tmp_path: Path
) -> None:
    """Ctrl-C while some thread is at a file: what is left is whole, and the next run goes on."""
    work = tmp_path / "work"
    out = work / "out"
    steps, expected = steps_of(server, command, out)
    resumed = 0
    for step in range(1, steps, max(1, steps // STEPS)):
        ended = server.run(
            [*command, "-o", out], {"action": "interrupt", "step": step, "folder": str(work)}
        )
        assert ended.status in (0, 2), ended.stderr
        assert ended.status == 0 or "error: interrupted" in ended.stderr, ended.stderr
        if assert_nothing_or_whole(out):
            shutil.rmtree(out)
        resumed += "resuming: " in finish(server, command, out, expected).stderr
    assert resumed >= 3
