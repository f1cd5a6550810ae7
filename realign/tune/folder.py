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
        descriptor = _acquired(folder / LOCK)
    except (NotADirectoryError, FileExistsError):
        raise OutputError(f"{folder} is not a folder", "choose another -o") from None
    if descriptor is None:
        # The lock file is that of the run which holds it, so it stays.
        raise OutputError(
            f"another tuning is at work in {folder}", "wait for it, or choose another -o"
        )
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def _acquired(lock: Path) -> int | None:
    """The lock file, opened and held; None where another run holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended in between has removed what we opened: held it would lock nobody out.
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)


def drop_half_line(path: Path) -> None:
    """Cut what a killed run left of a line it was writing."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
