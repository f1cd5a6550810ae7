"""Changes of input files while they are being read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

from realign.progress import SilentProgress


class During(SilentProgress):
    """Calls something when the first bytes of the output are written."""

    def __init__(self, action: Callable[[], object], *, after: int = 0) -> None:
        self._action: Callable[[], object] | None = action
        self._left = after

    @contextmanager
    def task(self, description: str, *, total: float | None, unit: str = "") -> Iterator[object]:
        with super().task(description, total=total, unit=unit) as silent:
            watched = {"repairing", "computing the patch", "applying the patch", "scaling"}
            yield self if description in watched else silent

    def advance(self, amount: float = 1.0) -> None:
        self._left -= 1
        if self._left < 0 and self._action is not None:
            action, self._action = self._action, None
            action()


def last_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def other_numbers(file: Path) -> None:
    """The same size and the same time of change, other numbers."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def other_header(file: Path) -> None:
    save_file({name: value.reshape(-1) for name, value in load_file(file).items()}, file)


def replaced(file: Path) -> None:
    copy = file.with_name("copy.tmp")
    shutil.copyfile(file, copy)
    copy.replace(file)


def longer(file: Path) -> None:
    """A file of text with one more line."""
    file.write_text(file.read_text() + "\n")
