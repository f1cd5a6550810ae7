"""Two runs on one target at once, and inputs that change under a run: real processes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.crash_support import Command, Runs, runs
from support.repair_support import folder_bytes

from realign.checkpoint.verification import verify_output


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Runs, Runs]]:
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(runs(tmp_path_factory.mktemp(f"logs{i}"))) for i in range(2)
        )
        yield one, two


@pytest.mark.parametrize("options", [(), ("--patch",)], ids=["checkpoint", "patch"])
def test_two_runs_on_one_target(
    servers: tuple[Runs, Runs], command: Command, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Whatever the head start, one run writes the output and the other says so."""
    one, two = servers
    out = tmp_path / "work" / "out"
    arguments = [*command, *options, "-o", out]
    begin = time.monotonic()
    assert one.run(arguments).status == 0
    length = time.monotonic() - begin
    expected = folder_bytes(out)
    for share in (0.0, 0.0, 0.1, 0.3, 0.6, 0.9):
        shutil.rmtree(out)
        one.start(arguments)
        time.sleep(share * length)
        two.start(arguments)
        ends = sorted((one.wait(), two.wait()), key=lambda ended: ended.status)
        assert [ended.status for ended in ends] == [0, 2], [ended.stderr for ended in ends]
        loser = " ".join(ends[1].stderr.split())
        assert f"another run is writing {out}" in loser or f"{out} exists already" in loser
        assert loser.count("error: ") == 1
        assert verify_output(out).problems == () and folder_bytes(out) == expected
        assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.fixture(scope="module")
def steps(
    servers: tuple[Runs, Runs], command: Command, tmp_path_factory: pytest.TempPathFactory
) -> int:
    """How many steps on the disk a whole run takes in the folder of its target."""
    work = tmp_path_factory.mktemp("count")
    ended = servers[0].run([*command, "-o", work / "out"], {"folder": str(work)})
    return int(ended.stderr.rpartition("steps: ")[2])


@pytest.mark.parametrize("action", ["touch", "swap"])
@pytest.mark.parametrize("role", ["finetuned", "aligned", "base"])
def test_an_input_that_changes_under_a_run(
    servers: tuple[Runs, Runs],
    command: Command,
    steps: int,
    tmp_path: Path,
    role: str,
    action: str,
) -> None:
    """Written to, or replaced by a copy, in the middle of the run or near its end."""
    assert isinstance(command[1], Path)
    victim = sorted((command[1].parent / role).glob("*.safetensors"))[0]
    before = victim.read_bytes()
    work = tmp_path / "work"
    for step in (steps // 3, steps * 2 // 3):
        hook = {"action": action, "step": step, "folder": str(work), "victim": str(victim)}
        ended = servers[0].run([*command, "-o", work / "out"], hook)
        victim.write_bytes(before)
        assert ended.status == 2, ended.stderr
        words = " ".join(ended.stderr.split())
        assert words.count("error: ") == 1 and victim.name in words and "changed" in words
        assert not work.exists() or list(work.iterdir()) == []
