"""Targets that cannot be written and inputs that cannot be reached, through the real command."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.cli_support import Outcome, damaged, family_options, model
from support.refusal_support import refused, repair, untouched

PARTIAL = ".out.realign-partial"
KINDS = [pytest.param((), id="checkpoint"), pytest.param(("--patch",), id="patch")]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The folder of the target."""
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("role", ["howto2_p5", "aligned", "base"])
def test_a_target_inside_an_input(tmp_path: Path, role: str, options: Sequence[str]) -> None:
    copy = damaged(role, tmp_path)
    link = tmp_path / "link"
    link.symlink_to(copy)
    given = {} if role == "howto2_p5" else {role: copy}
    finetuned = copy if role == "howto2_p5" else None
    with untouched(copy):
        for target in (copy, copy / "out", link / "deep" / "out", copy / ".." / role / "out"):
            refused(repair(target, finetuned, *options, **given), copy, "never changed")


def test_an_input_inside_the_target(tmp_path: Path) -> None:
    copy = damaged("howto2_p5", tmp_path / "models")
    with untouched(tmp_path / "models"):
        refused(repair(tmp_path / "models", copy), tmp_path / "models", "exists already")


@pytest.mark.parametrize("options", KINDS)
def test_a_target_that_is_a_link(work: Path, options: Sequence[str]) -> None:
    (work / "out").symlink_to(work / "nowhere")
    refused(repair(work / "out", None, *options), work / "out", "exists already")
    assert [path.name for path in work.iterdir()] == ["out"]


def test_a_target_below_a_file(work: Path) -> None:
    (work / "file").write_text("mine")
    refused(repair(work / "file" / "out"), work / "file", "is not a folder")
    assert (work / "file").read_text() == "mine"


def test_a_target_whose_name_is_too_long(work: Path) -> None:
    refused(repair(work / ("x" * 300)), "x" * 300)
    assert list(work.iterdir()) == []


def test_missing_parents_are_made_and_taken_away_again(tmp_path: Path, work: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.norm.weight"][0] = torch.nan
        return tensors

    copy = damaged("howto2_p5", tmp_path, tensors=poison)
    refused(repair(work / "new" / "deep" / "out", copy), "model.norm.weight")
    assert list(work.iterdir()) == []


def test_what_stands_where_the_partial_folder_must(work: Path) -> None:
    precious = work / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    for make in (lambda p: p.symlink_to(precious), lambda p: p.write_text("mine")):
        partial = work / PARTIAL
        make(partial)
        refused(repair(work / "out"), partial)
        assert (precious / "file").read_text() == "mine"
        partial.unlink()


@pytest.mark.parametrize("options", KINDS)
def test_another_run_on_the_same_target(work: Path, options: Sequence[str]) -> None:
    partial = work / PARTIAL
    partial.mkdir()
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as the other run holds it
    try:
        refused(repair(work / "out", None, *options), "another run is writing", work / "out")
        assert partial.is_dir()
    finally:
        os.close(held)
        partial.rmdir()


def test_a_disk_that_is_too_small_for_a_patch(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    refused(repair(work / "out", None, "--patch"), work, "free")
    assert list(work.iterdir()) == []


# --- rights --------------------------------------------------------------------------------------

_CHILD = """
import contextlib, io, json, sys
from realign_cli.main import run
outcomes = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(arguments)
    outcomes.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(outcomes))
"""


def _without_privileges() -> None:
    """Drop what lets the superuser pass by permission bits (CAP_DAC_*), for the child to be."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert libc.prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


def run_unprivileged(commands: Sequence[Sequence[str | Path]]) -> list[Outcome]:
    """Run commands in one child process that permission bits bind."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps([[str(a) for a in c] for c in commands])],
        preexec_fn=_without_privileges,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [Outcome(*outcome) for outcome in json.loads(done.stdout)]


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_what_may_not_be_read_or_written(tmp_path: Path, work: Path) -> None:
    def command(finetuned: Path, target: Path) -> list[str | Path]:
        options = ("--method", "replace", "--device", "cpu", "--quiet", "-o", target)
        return ["repair", finetuned, *family_options(), *options]

    denied: list[Path] = []
    for name in ("config.json", "model.safetensors", "tokenizer.json", ""):
        copy = damaged("howto2_p5", tmp_path / f"no {name or 'folder'}")
        denied.append(copy / name if name else copy)
    shut = tmp_path / "shut"
    shut.mkdir()
    commands = [
        *(command(path if path.is_dir() else path.parent, work / "out") for path in denied),
        command(model(), shut / "out"),
        command(model(), shut / "new" / "out"),
    ]
    for path in denied:
        path.chmod(0)
    shut.chmod(0o500)
    try:
        outcomes = run_unprivileged(commands)
    finally:
        for path in (*denied, shut):
            path.chmod(0o700)
    for path, outcome in zip([*denied, shut, shut], outcomes, strict=True):
        refused(outcome, path)
    assert list(work.iterdir()) == [] and list(shut.iterdir()) == []
