"""The hidden folder of an output: made, locked while a run works in it, taken away.

`.NAME.realign-partial` beside the target belongs to the run that holds its lock. Whatever is
written into it is written inside `Claim.writing`, which refuses once the lock is given back: the
next run may own the folder by then, or its name. Here: whose the folder is. Not here: what is in it
(`writer`, `journal`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from realign.checkpoint.shards import disk_error
from realign.errors import OutputError


def check_target(target: Path, inputs: Sequence[Path] = ()) -> None:
    """Refuse a target that exists or would change an input.

    Args:
        target: the folder to be made.
        inputs: folders that must stay untouched.

    Raises:
        OutputError: the target exists, is an input, lies inside one or would hold one.
    """
    real = target.absolute().resolve()
    for folder in inputs:
        there = folder.resolve()
        if real == there or real.is_relative_to(there):
            raise OutputError(
                f"{target} {'is' if real == there else 'lies inside'} the input {folder}",
                "inputs are never changed: choose a folder outside of them",
            )
    if os.path.lexists(target):
        raise OutputError(f"{target} exists already", "choose another folder, or remove it first")


class Claim:
    """The right to write the hidden folder of one target."""

    def __init__(self, target: Path) -> None:
        """Nothing is touched before `acquire`."""
        self.folder = target.absolute().parent / f".{target.name}.realign-partial"
        """The hidden folder."""
        self._target = target
        self._parents: list[Path] = []  # made for this run
        self._made = False  # the hidden folder, too
        self._handle = -1
        self._state = threading.RLock()

    def acquire(self, *, needed: int) -> None:
        """Make the folder where it is missing, and lock it.

        Args:
            needed: bytes that will be written, for the message where the place is not writable.

        Raises:
            OutputError: another run holds it, the target exists by now, or the place is not
                writable. Nothing that was made for this run is left.
        """
        try:
            self._make_parents()
            self._lock()
            check_target(self._target)  # again: the run that held the lock may have ended well
        except BaseException as error:
            if self._made:
                with suppress(OSError):
                    self.folder.rmdir()
            self.release()
            self._remove_parents()
            if isinstance(error, OSError):
                raise disk_error(error, self.folder, needed) from error
            raise

    def _make_parents(self) -> None:
        parent = self.folder.parent
        missing = [each for each in (parent, *parent.parents) if not each.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._parents.append(folder)

    def _remove_parents(self) -> None:
        for folder in reversed(self._parents):
            with suppress(OSError):  # somebody else uses it by now
                folder.rmdir()

    def _lock(self) -> None:
        while True:
            try:
                self.folder.mkdir()
                self._made = True
            except FileExistsError:
                self._made = False
            try:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
                self._handle = os.open(self.folder, flags)
            except FileNotFoundError:
                continue  # the other run has just renamed or removed it
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._made = False  # whoever made it, it is theirs
                raise OutputError(
                    f"another run is writing {self._target}",
                    "wait for it, or choose another folder",
                ) from None
            # The folder may have been renamed or removed between opening and locking it.
            with suppress(FileNotFoundError):
                if os.fstat(self._handle).st_ino == self.folder.stat().st_ino:
                    return
            self.release()

    @contextmanager
    def writing(self) -> Generator[None]:
        """While something in the folder is changed; the lock is not given back meanwhile.

        Raises:
            OutputError: the lock has been given back.
        """
        with self._state:
            if self._handle < 0:
                raise OutputError(
                    f"{self._target} is not written any more: its run has ended", "run it again"
                )
            yield

    def write_file(self, path: Path, content: bytes) -> None:
        """Write a small file in the folder and flush it to the disk.

        Raises:
            OutputError: the disk is full or not writable, or the lock has been given back.
        """
        with self.writing():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError as error:
                raise disk_error(error, path, len(content)) from error

    def remove(self) -> None:
        """Take away the folder with all that is in it, and the parents made for this run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._remove_parents()

    def release(self) -> None:
        """Give the lock back; nothing is written from here on."""
        with self._state:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
