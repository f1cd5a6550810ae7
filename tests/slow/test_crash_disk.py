"""A disk that is full from any moment on, a disk that may not be written: real, small disks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli_support import model
from support.crash_support import Command, Runs, fill_disk
from support.hub_server import Hub, Repository, serve
from support.refusal_support import refused, repair
from support.repair_support import folder_bytes

from realign.checkpoint.verification import verify_output


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    done = subprocess.run(mounting, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("options", [(), ("--patch",)], ids=["checkpoint", "patch"])
def test_full_from_any_step_on(
    server: Runs, command: Command, disk: Path, options: tuple[str, ...]
) -> None:
    """Every third step on the disk: shards, journal, index, manifest and the renaming among them.

    A run that needs nothing more of the disk ends well; any other says that the disk is full and
    takes away what it wrote. The same command ends well once there is space.
    """
    out = disk / "out"
    arguments = [*command, *options, "-o", out]
    assert server.run(arguments).status == 0
    expected = folder_bytes(out)
    shutil.rmtree(out)
    full = step = 0
    while True:
        hook = {"action": "fill", "step": 1 + step, "folder": str(disk), "disk": str(disk)}
        ended = server.run(arguments, hook)
        filled = (disk / "filler").exists()
        (disk / "filler").unlink(missing_ok=True)
        if ended.status == 0:
            assert verify_output(out).problems == ()
            assert folder_bytes(out) == expected
            shutil.rmtree(out)
            if not filled:
                break
        else:
            full += 1
            assert ended.status == 2, ended.stderr
            assert ended.stderr.count("error: ") == 1, ended.stderr
            assert "disk is full" in ended.stderr or "free" in ended.stderr, ended.stderr
            assert str(disk) in " ".join(ended.stderr.split()), ended.stderr
            assert "Traceback" not in ended.stderr
        assert list(disk.iterdir()) == [], ended.stderr
        step += 3
    assert full >= 4


def test_a_disk_that_is_too_small_shows_before_a_byte_is_written(disk: Path) -> None:
    fill_disk(disk)
    with (disk / "filler").open("rb+") as stream:
        stream.truncate(15 * 2**20)  # a megabyte is free, the output needs two
    refused(repair(disk / "out"), disk, "free", "needs")
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_disk_that_may_not_be_written(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for options in ((), ("--patch",)):
        refused(repair(disk / "out", None, *options), disk, "Read-only file system")
    refused(repair(disk / "new" / "out"), disk, "Read-only file system")
    assert list(disk.iterdir()) == []


def test_a_cache_without_space(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_disk(disk)
    with (disk / "filler").open("rb+") as stream:
        stream.truncate(15 * 2**20)
    files = {path.name: path.read_bytes() for path in model("aligned").iterdir()}
    monkeypatch.setenv("HF_HOME", str(disk / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve(Hub({"org/aligned": Repository({"c" * 40: files}, {"main": "c" * 40})})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        result = repair(tmp_path / "out", aligned="org/aligned")
    refused(result, "org/aligned cannot be stored", "No space left", disk, "HF_HOME")
    assert not (tmp_path / "out").exists()
