"""Where edited pieces go: the weight files of an output, filled one after the other.

Here: which file a piece belongs to, and what the journal keeps with a finished one. Not here: one
file (`realign.checkpoint.shards`), the folder around it (`realign.checkpoint.writer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from realign.checkpoint.shards import ShardLayout, ShardWriter
from realign.checkpoint.writer import OutputFolder
from realign.progress import Task
from realign.repair.editor import EditedPiece
from realign.repair.record import TensorRow


class ShardSink:
    """A context manager; takes the pieces of all files in order, from one thread at a time."""

    def __init__(self, output: OutputFolder, shards: Sequence[ShardLayout], task: Task) -> None:
        """Nothing is opened yet.

        Args:
            output: the folder.
            shards: the files to write, in order.
            task: told the bytes that are written.
        """
        self.rows: dict[str, list[TensorRow]] = {}
        """What was done, by finished file."""
        self._output, self._todo, self._task = output, list(reversed(shards)), task
        self._open = ExitStack()
        self._shard: ShardLayout | None = None
        self._writer: ShardWriter | None = None
        self._names: frozenset[str] = frozenset()  # of the open file's tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the last file; after an error it stays unfinished.

        Raises:
            OutputError: the disk is full or not writable.
        """
        if error is None:
            while self._todo:  # without a single tensor, or it would have been begun
                self._begin_next()
            self._finish()
        self._open.__exit__(kind, error, trace)

    def write(self, piece: EditedPiece, rows: Sequence[TensorRow]) -> None:
        """Append a piece.

        Args:
            piece: the next one.
            rows: of the tensors that it completes.

        Raises:
            OutputError: the disk is full or not writable.
        """
        name = piece.cut.pair.role.name
        while name not in self._names:
            self._begin_next()
        assert self._writer is not None and self._shard is not None
        self._writer.write(name, piece.stored)
        self.rows[self._shard.filename] += rows
        self._task.advance(piece.stored.nbytes)

    def _begin_next(self) -> None:
        self._finish()
        self._shard = self._todo.pop()
        self._names = frozenset(spec.name for spec in self._shard.tensors)
        self.rows[self._shard.filename] = []
        self._writer = self._open.enter_context(self._output.shard(self._shard))

    def _finish(self) -> None:
        """Not before the next file is due: tensors without bytes may follow the last byte."""
        if self._writer is not None and self._shard is not None:
            rows = self.rows[self._shard.filename]
            self._writer.facts["rows"] = [row.to_json() for row in rows]
            self._writer = None
            self._open.close()
