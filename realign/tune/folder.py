"""The folder of a tuning: one run at a time, and a journal without half lines.

Here: the lock and the mending. Not here: what the journal says (`study`).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from realign.errors import OutputError

JOURNAL = "study.journal"
LOCK = ".tune.lock"


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the folder of a study.

    Raises:
        OutputError: it cannot be made, holds other things, or another run holds it.
    """
    try:
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if not fresh and any(folder.iterdir()) and not (folder / JOURNAL).exists():
            names = {path.name for path in folder.iterdir()}
            if names != {LOCK}:
                raise OutputError(
                    f"{folder} exists and is not the folder of a tuning", "choose another -o"
                )
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except (NotADirectoryError, FileExistsError):
        raise OutputError(f"{folder} is not a folder", "choose another -o") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"another tuning is at work in {folder}", "wait for it, or choose another -o"
            ) from None
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def drop_half_line(path: Path) -> None:
    """Cut what a killed run left of a line it was writing."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
