"""Outputs that cannot be: in the way, inside an input, on a disk that is full, interrupted."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cli_support import damaged, family_options, model
from support.refusal_support import nothing_left, refused
from support.refusal_support import repair_at_work as repair

from realign_cli import progress as progress_module

LIMIT = 40_000


@pytest.fixture(autouse=True)
def nothing_changes_and_nothing_stays(tmp_path: Path) -> Iterator[None]:
    with nothing_left(tmp_path / "work"):
        yield


@pytest.mark.parametrize("kind", ["folder", "file", "empty folder"])
def test_an_output_that_exists(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "here"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "precious.txt").write_text("mine")
    result = repair(tmp_path, None, "-o", out)
    refused(result, str(out), "exists")
    if kind == "folder":
        assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_an_output_inside_an_input(tmp_path: Path) -> None:
    copy = damaged("howto2_p5", tmp_path)
    refused(repair(tmp_path, copy, "-o", copy / "repaired"), "inside")
    assert not (copy / "repaired").exists()


def test_a_disk_that_is_too_small_shows_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    refused(repair(tmp_path), "free", "needs")


def limited(*arguments: object, limit: int) -> subprocess.CompletedProcess[str]:
    """The command in a process whose files may not exceed `limit` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", "from realign_cli.main import main; main()", *map(str, arguments)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert "fault in realign" not in done.stderr
    return done


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    """The operating system refuses the write: files of this process may not exceed 64 kB."""
    out = tmp_path / "work" / "out"
    arguments = ("repair", model(), *family_options(), "--method", "replace", "--quiet", "-o", out)
    limited(*arguments, limit=65536)
    assert not out.exists()


def test_a_disk_that_fills_up_while_the_subspace_is_drawn(tmp_path: Path) -> None:
    """The file of one direction fits below the limit, its picture does not: neither stays."""
    out = tmp_path / "work" / "safety.safetensors"
    arguments = ("subspace", model("aligned"), "--base", model("base"), "--rank", "1")
    done = limited(*arguments, "--device", "cpu", "--quiet", "-o", out, limit=LIMIT)
    assert "safety.safetensors cannot be written" not in done.stderr
    assert list((tmp_path / "work").iterdir()) == []


def test_ctrl_c_leaves_no_output_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = progress_module._Counter.advance

    def interrupt(self: object, amount: float = 1.0) -> None:
        monkeypatch.setattr(progress_module._Counter, "advance", advance)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress_module._Counter, "advance", interrupt)
    result = repair(tmp_path)
    assert result.exit_code == 2
    assert "interrupted" in result.words
    assert result.stdout == ""
    out = tmp_path / "work" / "out"
    assert not out.exists()
    again = repair(tmp_path)
    assert again.exit_code == 0, again.stderr
    assert (out / "model.safetensors").is_file()
    assert not list(out.parent.glob(".out*")), "the partial folder became the output"
    shutil.rmtree(out)
