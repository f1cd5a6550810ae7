"""Ctrl-C while a repair trains, at a real terminal; trainings with several threads, and an adapter.

The process gets SIGINT when its terminal shows that the training has begun.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.repair_support import folder_bytes
from support.training_layouts_support import check_adapter, make_bench
from support.training_support import (
    DRIFTED,
    SUITES,
    TINY,
    refusals,
    repair_tiny,
    rows,
    weights_of,
    write_rows,
)

from realign.checkpoint.verification import verify_output
from realign.subspace.threads import torch_threads

LONG = 240.0
TRAININGS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "somf": ("training the mask", ("safe-data", "keep-data"), ("epochs=30", "lr=0.3")),
    "one_shot": ("one refusal", ("safe-data",), ("mode=sft", "epochs=300", "lr=1e-4")),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    return {
        "safe-data": write_rows(folder / "safe.jsonl", refusals(16)),
        "keep-data": write_rows(folder / "keep.jsonl", rows("keep", 16)),
        "harmful-data": write_rows(folder / "harmful.jsonl", rows("harmful", 16)),
        "anchors": SUITES / "anchors.jsonl",
    }


class Terminal:
    """A command of ours whose standard error is a terminal."""

    def __init__(self, arguments: list[str], cache: Path) -> None:
        self._own, theirs = pty.openpty()
        environment = {**os.environ, "REALIGN_CACHE": str(cache), "TERM": "xterm", "COLUMNS": "200"}
        code = "import sys; from realign_cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=theirs,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def wait_for(self, words: str) -> None:
        """Until the terminal has shown these words."""
        until = time.monotonic() + LONG
        while words not in self.shown:
            assert time.monotonic() < until, self.shown
            assert self._read(), f"ended without {words!r}: {self.shown}"

    def end(self) -> int:
        """The exit code."""
        while self._read():
            pass
        os.close(self._own)
        return self.process.wait(timeout=LONG)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._own], [], [], LONG)
        try:
            new = os.read(self._own, 65536) if ready else b""
        except OSError:  # the other side is closed
            return False
        self.shown += new.decode("utf-8", "replace")
        return bool(new)


@pytest.mark.parametrize("method", TRAININGS)
def test_ctrl_c_while_training_leaves_nothing_and_a_second_run_succeeds(
    tmp_path: Path, texts: Mapping[str, Path], method: str
) -> None:
    label, data, settings = TRAININGS[method]
    before = folder_bytes(TINY)
    out, cache = tmp_path / "results" / "out", tmp_path / "cache"
    out.parent.mkdir()
    arguments = [
        *("repair", str(DRIFTED), "--aligned", str(TINY / "aligned"), "--method", method),
        *("--device", "cpu", "--out", str(out)),
        *(part for name in data for part in (f"--{name}", str(texts[name]))),
        *(part for each in settings for part in ("--set", each)),
    ]
    first = Terminal(arguments, cache)
    first.wait_for(label)
    first.process.send_signal(signal.SIGINT)
    status = first.end()
    assert (status, "interrupted" in first.shown) == (2, True), first.shown
    assert "Traceback" not in first.shown
    assert list(out.parent.iterdir()) == []
    assert [path.name for path in cache.rglob("*") if method in path.name.replace("-", "_")] == []
    assert folder_bytes(TINY) == before

    second = Terminal(arguments, cache)
    status = second.end()
    assert status == 0, second.shown
    verify_output(out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert folder_bytes(TINY) == before


CASES: Mapping[str, tuple[tuple[str, ...], Mapping[str, Any]]] = {
    "one_shot": (("safe-data",), {"rounds": 2, "example": "safe"}),
    "safe_patching": (("harmful-data",), {"lr": 3e-4, "steps": 4, "batch": 8}),
    "somf": (("safe-data", "keep-data"), {"epochs": 2, "lr": 0.3}),
    "q_realign": (("anchors", "keep-data"), {"prompts": 16, "epochs_first": 1, "epochs_rest": 1}),
}


@pytest.mark.parametrize("method", CASES)
def test_a_training_does_not_depend_on_threads(
    tmp_path: Path, texts: Mapping[str, Path], method: str
) -> None:
    """Another number of threads, and a cache of its own: the same bytes."""
    data, settings = CASES[method]
    given = {name.replace("-", "_"): texts[name] for name in data}
    found: list[bytes] = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        with torch_threads(threads):
            repair_tiny(method, out, settings=dict(settings), **given)
        found.append(weights_of(out))
    assert found[0] == found[1] != weights_of(DRIFTED)


def test_quantising_an_adapter_is_quantising_the_model_that_peft_merges(tmp_path: Path) -> None:
    check_adapter(make_bench(tmp_path), tmp_path, "q_realign")
