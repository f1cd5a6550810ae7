"""An output folder that exists whole or not at all.

Everything is written into a hidden sibling of the target, `.NAME.realign-partial`, flushed, and
renamed at the end. The partial folder is locked while a run works in it. A journal in it lists
finished weight files with their hashes: a run with the same fingerprint that finds the bytes intact
goes on after them. What happens to the partial folder when a run ends early:

    an error                the partial folder is removed
    Ctrl-C, a killed run    finished weight files stay for the next run
    another fingerprint     removed by that run when it starts

Here: what an output consists of, and when it gets its name. Not here: whose the partial folder is
(`claim`), the journal (`journal`), the bytes of a weight file (`shards`), the manifest
(`manifest`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from realign.checkpoint.claim import Claim, check_target, sync_folder
from realign.checkpoint.journal import Journal
from realign.checkpoint.manifest import dump_json
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.shards import (
    ShardLayout,
    ShardWriter,
    TensorSpec,
    disk_error,
    index_of,
    plan_layout,
)
from realign.checkpoint.space import require_space
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

_SLACK = 4 * 2**20  # directories, sidecars and the manifest


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
        self._claim = Claim(self.target)
        self._journal = Journal(self._claim, fingerprint)
        self._inputs, self._progress = tuple(inputs), progress
        self._hashes: dict[str, str] = {}
        self._committed = self._keep = False

    @property
    def partial(self) -> Path:
        """The hidden folder while it is being filled."""
        return self._claim.folder

    def __enter__(self) -> Self:
        """Check the target, lock the partial folder, take up what is intact in it.

        Raises:
            OutputError: see `check_target`; also another run works on the target, the disk is too
                small, or the place is not writable.
        """
        check_target(self.target, self._inputs)
        self._claim.acquire(needed=self._needed())
        try:
            self._journal.take_up(self._progress)
            self._check_space()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _needed(self) -> int:
        finished = self._journal.finished
        return sum(each.file_size for each in self.layout if each.filename not in finished)

    def _check_space(self) -> None:
        require_space(self.partial.parent, self._needed() + _SLACK)

    def expect(self, layout: Sequence[ShardLayout]) -> None:
        """Say what the weight files will be, where that was not known when the folder was locked.

        Raises:
            OutputError: the disk is too small for them.
        """
        self.layout = tuple(layout)
        self._check_space()

    def is_done(self, layout: ShardLayout) -> bool:
        """Whether this weight file is finished, in this run or by an interrupted one."""
        return self._journal.is_done(layout)

    def finished(self, layout: ShardLayout) -> Mapping[str, Any] | None:
        """What `ShardWriter.facts` held when this file was finished; None: it must be written."""
        if not self.is_done(layout):
            return None
        return cast(Mapping[str, Any], self._journal.finished[layout.filename]["facts"])

    @contextmanager
    def shard(self, layout: ShardLayout) -> Generator[ShardWriter]:
        """Write one weight file; it counts as finished when the context is left without error.

        Raises:
            OutputError: the disk is full or not writable, or the context of the output was left.
        """
        assert not self.is_done(layout), layout.filename
        path = self.partial / layout.filename
        try:
            with self._claim.writing():
                path.parent.mkdir(exist_ok=True)
                path.unlink(missing_ok=True)
                writer = ShardWriter(path, layout, guard=self._claim.writing)
        except OSError as error:
            raise disk_error(error, path, layout.file_size) from error
        try:
            yield writer
            digest, size = writer.finish()
        finally:
            writer.close()
        self._journal.add(layout.filename, sha256=digest, size=size, facts=writer.facts)

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
        self._claim.write_file(path, content)
        self._hashes[name] = hashlib.sha256(content).hexdigest()

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every finished file so far, by relative name: what a manifest lists."""
        finished = self._journal.finished
        shards = {name: cast(str, entry["sha256"]) for name, entry in finished.items()}
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
            with self._claim.writing():
                self._journal.remove()
                for folder in (path for path in self.partial.rglob("*") if path.is_dir()):
                    sync_folder(folder)
                sync_folder(self.partial)
                self.partial.rename(self.target)
                sync_folder(self.partial.parent)
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
            finished = len(self._journal.finished)
            if self._keep and finished:
                self._progress.note(
                    f"{finished} finished weight files are kept in {self.partial}: the "
                    "same command goes on from there; to give up, remove that folder"
                )
                return
            self._claim.remove()
        finally:
            self._claim.release()
