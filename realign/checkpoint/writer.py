"""An output folder that exists whole or not at all.

Everything is written into a hidden sibling of the target, `.NAME.realign-partial`, flushed, and
renamed at the end. The partial folder is locked while a run works in it. A journal in it lists
finished weight files with their hashes: a run with the same fingerprint that finds the bytes intact
goes on after them. What happens to the partial folder when a run ends early:

    an error                the partial folder is removed
    Ctrl-C, a killed run    finished weight files stay for the next run
    another fingerprint     removed by that run when it starts

Here: the folder. Not here: the bytes of a weight file (`shards`), the manifest (`manifest`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from realign.checkpoint.manifest import dump_json, sha256_file
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.shards import (
    ShardLayout,
    ShardWriter,
    TensorSpec,
    disk_error,
    index_of,
    plan_layout,
)
from realign.checkpoint.weights import INDEX_FILE
from realign.errors import OutputError
from realign.progress import SILENT, Progress

__all__ = [
    "OutputFolder",
    "ShardLayout",
    "ShardWriter",
    "TensorSpec",
    "check_target",
    "plan_layout",
]

JOURNAL_NAME = "journal.json"
JOURNAL_SCHEMA = "realign/journal/1"

_SLACK = 4 * 2**20  # directories, sidecars and the manifest


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


class OutputFolder:
    """A context manager around one output; nothing is visible under its name before `commit`.

    Leaving the context without `commit`, or by an error, removes what was written.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        fingerprint: str,
        layout: Sequence[ShardLayout] = (),
        inputs: Sequence[Path] = (),
        progress: Progress = SILENT,
    ) -> None:
        """Describe the output; nothing is touched before the context is entered.

        Args:
            target: the folder to be made; missing parents are made, too.
            fingerprint: identifies the run's inputs and settings. Only a run with the same one
                resumes what an interrupted run has left.
            layout: the weight files, to check the free space and, at the end, that none is missing.
            inputs: folders that the target must not lie in.
            progress: told what is resumed, kept or discarded.
        """
        self.target = Path(target).expanduser()
        self.layout = tuple(layout)
        self.partial = self.target.absolute().parent / f".{self.target.name}.realign-partial"
        """The hidden folder while it is being filled."""
        self._fingerprint, self._inputs, self._progress = fingerprint, tuple(inputs), progress
        self._finished: dict[str, dict[str, Any]] = {}
        self._hashes: dict[str, str] = {}
        self._made: list[Path] = []
        self._lock = -1
        self._committed = self._keep = False

    def __enter__(self) -> Self:
        """Check the target, lock the partial folder, take up what is intact in it.

        Raises:
            OutputError: see `check_target`; also another run works on the target, the disk is too
                small, or the place is not writable.
        """
        check_target(self.target, self._inputs)
        try:
            self._make_parents()
            self._acquire()
        except OSError as error:
            self._release()
            self._remove_parents()
            raise disk_error(error, self.partial, self._needed()) from error
        except BaseException:
            self._release()
            self._remove_parents()
            raise
        try:
            self._take_up()
            self._check_space()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _make_parents(self) -> None:
        parent = self.partial.parent
        missing = [each for each in (parent, *parent.parents) if not each.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._made.append(folder)

    def _remove_parents(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody else uses it by now
                folder.rmdir()

    def _acquire(self) -> None:
        while True:
            with suppress(FileExistsError):
                self.partial.mkdir()
            try:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
                self._lock = os.open(self.partial, flags)
            except FileNotFoundError:
                continue  # the other run has just renamed or removed it
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"another run is writing {self.target}",
                    "wait for it, or choose another folder",
                ) from None
            # The folder may have been renamed or removed between opening and locking it.
            with suppress(FileNotFoundError):
                if os.fstat(self._lock).st_ino == self.partial.stat().st_ino:
                    break
            self._release()
        check_target(self.target)

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _take_up(self) -> None:
        journal = self._read_journal()
        left = [path for path in self.partial.iterdir() if path.name != JOURNAL_NAME]
        if journal is not None and journal.get("fingerprint") == self._fingerprint:
            shards = cast(dict[str, dict[str, Any]], journal.get("shards", {}))
            with self._progress.task(
                "check finished files", total=sum(e["size"] for e in shards.values()), unit="B"
            ) as task:
                for name, entry in shards.items():
                    if self._is_intact(name, entry):
                        self._finished[name] = entry
                    task.advance(entry["size"])
            if self._finished:
                self._progress.note(
                    f"resuming: {len(self._finished)} weight files of an interrupted run are intact"
                )
        elif left:
            self._progress.note(f"discarding what another, interrupted run left in {self.partial}")
        for path in left:
            if path.name not in self._finished:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._write_journal()

    def _read_journal(self) -> dict[str, Any] | None:
        try:
            value = json.loads((self.partial / JOURNAL_NAME).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(value, dict):
            return None
        journal = cast(dict[str, Any], value)
        return journal if journal.get("schema") == JOURNAL_SCHEMA else None

    def _is_intact(self, name: str, entry: Mapping[str, Any]) -> bool:
        path = self.partial / name
        return (
            path.is_file()
            and entry["size"] == path.stat().st_size
            and sha256_file(path) == entry["sha256"]
        )

    def _write_journal(self) -> None:
        journal = {
            "schema": JOURNAL_SCHEMA,
            "fingerprint": self._fingerprint,
            "shards": self._finished,
        }
        new = self.partial / f"{JOURNAL_NAME}.new"
        self._write_file(new, dump_json(journal).encode("utf-8"))
        new.replace(self.partial / JOURNAL_NAME)
        _sync_folder(self.partial)

    def _needed(self) -> int:
        return sum(each.file_size for each in self.layout if each.filename not in self._finished)

    def _check_space(self) -> None:
        needed, free = self._needed() + _SLACK, shutil.disk_usage(self.partial).free
        if free < needed:
            raise OutputError(
                f"{self.partial.parent} has {free} bytes free ({free / 1e6:,.1f} MB), the output "
                f"needs {needed} ({needed / 1e6:,.1f} MB)",
                "free some space, or choose a folder on another disk",
            )

    def expect(self, layout: Sequence[ShardLayout]) -> None:
        """Say what the weight files will be, where that was not known when the folder was locked.

        Raises:
            OutputError: the disk is too small for them.
        """
        self.layout = tuple(layout)
        self._check_space()

    def is_done(self, layout: ShardLayout) -> bool:
        """Whether this weight file is finished, in this run or by an interrupted one."""
        entry = self._finished.get(layout.filename)
        return entry is not None and entry["size"] == layout.file_size

    def finished(self, layout: ShardLayout) -> Mapping[str, Any] | None:
        """What `ShardWriter.facts` held when this file was finished; None: it must be written."""
        if not self.is_done(layout):
            return None
        return cast(Mapping[str, Any], self._finished[layout.filename]["facts"])

    @contextmanager
    def shard(self, layout: ShardLayout) -> Generator[ShardWriter]:
        """Write one weight file; it counts as finished when the context is left without error.

        Raises:
            OutputError: the disk is full or not writable.
        """
        assert not self.is_done(layout), layout.filename
        path = self.partial / layout.filename
        path.unlink(missing_ok=True)
        try:
            writer = ShardWriter(path, layout)
        except OSError as error:
            raise disk_error(error, path, layout.file_size) from error
        try:
            yield writer
            digest, size = writer.finish()
        finally:
            writer.close()
        self._finished[layout.filename] = {"sha256": digest, "size": size, "facts": writer.facts}
        self._write_journal()

    def copy_sidecars(self, source: Checkpoint) -> None:
        """Copy the small files of a checkpoint byte for byte (see `sidecars`).

        Raises:
            OutputError: the disk is full or not writable.
        """
        for name, content in source.sidecars().items():
            if isinstance(content, bytes):
                self.write_bytes(name, content)
            else:
                self.copy_file(content, name)

    def copy_file(self, source: Path, name: str) -> None:
        """Copy one small file byte for byte under a relative name.

        Raises:
            OutputError: the disk is full or not writable.
        """
        self.write_bytes(name, source.read_bytes())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write an object as JSON with sorted keys.

        Raises:
            OutputError: the disk is full or not writable.
            ValueError: it holds NaN or infinity.
        """
        self.write_bytes(name, dump_json(value).encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one small file under a relative name, replacing an earlier one.

        Raises:
            OutputError: the disk is full or not writable.
        """
        path = self.partial / name
        assert path.resolve().is_relative_to(self.partial.resolve()), name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, path, len(content)) from error
        self._write_file(path, content)
        self._hashes[name] = hashlib.sha256(content).hexdigest()

    def _write_file(self, path: Path, content: bytes) -> None:
        try:
            with path.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise disk_error(error, path, len(content)) from error

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every finished file so far, by relative name: what a manifest lists."""
        shards = {name: cast(str, entry["sha256"]) for name, entry in self._finished.items()}
        return dict(sorted({**shards, **self._hashes}.items()))

    def write_index(self, layout: Sequence[ShardLayout]) -> None:
        """Write the index of a sharded checkpoint; a single file needs none.

        Raises:
            OutputError: the disk is full or not writable.
        """
        missing = [each.filename for each in layout if not self.is_done(each)]
        assert not missing, f"not written: {missing}"
        index = index_of(tuple(layout))
        if index is not None:
            self.write_json(INDEX_FILE, index)

    def commit(self) -> Path:
        """Give the output its name. Returns the target.

        Raises:
            OutputError: the target has come into being meanwhile (the work is kept for a rerun), or
                it cannot be renamed.
        """
        missing = [each.filename for each in self.layout if not self.is_done(each)]
        assert not missing, f"not written: {missing}"
        try:
            check_target(self.target, self._inputs)
        except OutputError:
            self._keep = True
            raise
        try:
            (self.partial / JOURNAL_NAME).unlink()
            for folder in (path for path in self.partial.rglob("*") if path.is_dir()):
                _sync_folder(folder)
            _sync_folder(self.partial)
            self.partial.rename(self.target)
            _sync_folder(self.partial.parent)
        except OSError as error:
            raise disk_error(error, self.target, self._needed()) from error
        self._committed = True
        return self.target

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the partial folder, or keep what a later run can use."""
        try:
            if self._committed:
                return
            if isinstance(error, KeyboardInterrupt):
                self._keep = True
            if self._keep and self._finished:
                self._progress.note(
                    f"{len(self._finished)} finished weight files are kept in {self.partial}: the "
                    "same command goes on from there; to give up, remove that folder"
                )
                return
            shutil.rmtree(self.partial, ignore_errors=True)
            self._remove_parents()
        finally:
            self._release()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
