"""A safetensors file that is written tensor by tensor, so that no more than one is held.

The format begins with a header that lists everything; room is left for it and filled in at the
end. The file appears under its name as a whole or not at all, readable by its owner alone. Here:
bytes. Not here: what the tensors mean (`moments_file`, `gradients`).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from realign.errors import OutputError

_DTYPES = {torch.float64: "F64", torch.float32: "F32"}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


class GrowingFile:
    """A file under way; a context manager that leaves nothing behind unless `finish` was called."""

    def __init__(self, path: Path, *, header_bytes: int = 2**20) -> None:
        """Open it beside its target.

        Args:
            path: the target, in an existing folder; replaced if it exists.
            header_bytes: room for the header; one that turns out larger costs a copy.

        Raises:
            OutputError: the file cannot be written.
        """
        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._start = 8 + -(-header_bytes // 8) * 8
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        self._end = 0
        try:
            # Private from the first byte on, like the texts it was measured on.
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            self._file = os.open(self._partial, flags, 0o600)
        except OSError as error:
            raise self._cannot(error) from error

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor of float32 or float64 on the CPU.

        Raises:
            OutputError: it cannot be written.
        """
        assert name not in self._entries, name
        start, nbytes = self._end, tensor.numel() * tensor.element_size()
        self._entries[name] = (_DTYPES[tensor.dtype], tuple(tensor.shape), start, start + nbytes)
        self._end += nbytes
        self._write(tensor, start)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the same kind over one that was added.

        Raises:
            OutputError: it cannot be written.
        """
        dtype, shape, start, _ = self._entries[name]
        assert (dtype, shape) == (_DTYPES[tensor.dtype], tuple(tensor.shape)), name
        self._write(tensor, start)

    def get(self, name: str) -> Tensor:
        """Read a tensor that was added, in memory of its own."""
        dtype, shape, start, stop = self._entries[name]
        tensor = torch.empty(math.prod(shape), dtype=_BY_NAME[dtype])
        view = _bytes_of(tensor) if stop > start else memoryview(b"")
        at = 0
        while at < len(view):
            count = os.preadv(self._file, [view[at:]], self._start + start + at)
            if count == 0:
                raise OutputError(f"{self._partial} was cut while it was written")
            at += count
        return tensor.view(shape)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and give the file its name.

        Raises:
            OutputError: it cannot be written.
        """
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        for name, (dtype, shape, start, stop) in self._entries.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        text = json.dumps(header).encode()
        try:
            if len(text) + 8 > self._start:
                self._move(8 + -(-len(text) // 8) * 8)
            room = self._start - 8
            os.pwrite(self._file, room.to_bytes(8, "little") + text.ljust(room), 0)
            self.close()
            self._partial.replace(self.path)
        except OSError as error:
            raise self._cannot(error) from error

    def close(self) -> None:
        """Let go of the file; without `finish` it is removed by the end of the context."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> GrowingFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def _write(self, tensor: Tensor, start: int) -> None:
        if tensor.numel() == 0:
            return
        view = _bytes_of(tensor.detach().contiguous().view(-1))
        at = 0
        try:
            while at < len(view):
                at += os.pwrite(self._file, view[at:], self._start + start + at)
        except OSError as error:
            raise self._cannot(error) from error

    def _move(self, start: int) -> None:
        """Make room for a longer header: copy what is there behind it."""
        longer = self._partial.with_suffix(".longer")
        try:
            longer.touch(mode=0o600)
            with longer.open("r+b") as target, self._partial.open("rb") as source:
                source.seek(self._start)
                target.seek(start)
                shutil.copyfileobj(source, target, 2**20)
            longer.replace(self._partial)
        finally:
            longer.unlink(missing_ok=True)
        os.close(self._file)
        self._file = os.open(self._partial, os.O_RDWR)
        self._start = start

    def _cannot(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path} cannot be written: {error}", "is the disk full?")


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")
