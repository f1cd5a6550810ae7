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
        self._writer: ShardWriter | None = None
        self._left = 0  # bytes that the open file still lacks
        self._done: list[TensorRow] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """After an error the open file stays unfinished.

        Raises:
            OutputError: the disk is full or not writable.
        """
        if error is None:
            while self._todo and not self._todo[-1].nbytes:
                self._begin()
            assert self._writer is None and not self._todo, "a weight file lacks pieces"
        self._open.__exit__(kind, error, trace)

    def write(self, piece: EditedPiece, rows: Sequence[TensorRow]) -> None:
        """Append a piece; a file is finished with its last byte.

        Args:
            piece: the next one.
            rows: of the tensors that it completes.

        Raises:
            OutputError: the disk is full or not writable.
        """
        if not piece.stored.nbytes:  # in the header only, perhaps of a file that is finished
            assert not rows, f"{piece.cut.pair.role.name} has no entries and was edited"
            return
        while self._writer is None:
            self._begin()
        self._writer.write(piece.cut.pair.role.name, piece.stored)
        self._done += rows
        self._left -= piece.stored.nbytes
        self._task.advance(piece.stored.nbytes)
        if not self._left:
            self._finish(self._writer)

    def _begin(self) -> None:
        shard = self._todo.pop()
        self._left, self._done = shard.nbytes, []
        self.rows[shard.filename] = self._done
        self._writer = self._open.enter_context(self._output.shard(shard))
        if not self._left:
            self._finish(self._writer)

    def _finish(self, writer: ShardWriter) -> None:
        writer.facts["rows"] = [row.to_json() for row in self._done]
        self._writer = None
        self._open.close()
