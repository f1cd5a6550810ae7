"""Tensor bytes from safetensors files by position: `pread` into owned memory, never a mapping.

A mapped page counts as resident until its file is closed, so a mapped model grows to its full size
while it is streamed; a buffer is freed as soon as its tensor is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor

from realign.checkpoint.buffers import Buffers
from realign.checkpoint.headers import TensorInfo
from realign.errors import CheckpointError, HeaderError

_CHUNK = 8 * 2**20

_AHEAD = 8 * 2**20
"""What the system is asked to fetch while a file is read from front to back."""

_GAP = 2**16
"""Bytes that may be left out where a file still counts as read in order."""


class TensorFiles:
    """Open files, one handle each, read from any thread."""

    def __init__(self) -> None:
        self.observer: Callable[[Path, int, memoryview], None] | None = None
        """Called with all that is read, in the thread that reads: file, position, bytes."""
        self._buffers = Buffers()
        self._handles: dict[Path, int] = {}
        self._reached: dict[Path, tuple[int, int]] = {}  # read up to, asked for up to
        self._lock = Lock()

    def read(self, info: TensorInfo, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or rows [start, stop) of its first dimension, as stored.

        Raises:
            HeaderError: the file ended early (it changed or was cut since its header was read).
        """
        shape, offset, nbytes = info.shape, info.offset, info.nbytes
        if rows is not None:
            start, stop = rows
            assert shape and 0 <= start <= stop <= shape[0], (info.name, shape, rows)
            row_bytes = nbytes // shape[0] if shape[0] else 0
            shape = (stop - start, *shape[1:])
            offset, nbytes = offset + start * row_bytes, (stop - start) * row_bytes
        out = self._buffers.empty((prod(shape),), info.torch_dtype)
        if nbytes:
            self._fill(info, memoryview(cast(Any, out.view(torch.uint8).numpy())), offset)
        return out.reshape(shape)

    def chunks(self, info: TensorInfo) -> Iterator[Tensor]:
        """The tensor in pieces, flat, of at most 8 MiB each."""
        flat = replace(info, shape=(info.numel,))
        step = max(1, _CHUNK * info.numel // max(1, info.nbytes))
        for start in range(0, info.numel, step):
            yield self.read(flat, (start, min(start + step, info.numel)))

    def same(self, one: TensorInfo, two: TensorInfo) -> bool:
        """Whether two tensors agree in type, shape and every byte."""
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        # As bytes: a NaN differs from itself as a number.
        return all(
            torch.equal(left.view(torch.uint8), right.view(torch.uint8))
            for left, right in zip(self.chunks(one), self.chunks(two), strict=True)
        )

    def _fill(self, info: TensorInfo, buffer: memoryview, offset: int) -> None:
        handle = self._handle(info.file)
        self._ask_ahead(info.file, handle, offset, offset + len(buffer))
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(handle, [buffer[done:]], offset + done)
            except OSError as error:
                raise _unreadable(info.file, error) from error
            if count == 0:
                raise HeaderError(
                    f"{info.file} ended inside {info.name!r}: it changed while it was being read",
                    "make sure that nothing writes to the folder, then run again",
                )
            done += count
        if self.observer is not None:
            self.observer(info.file, offset, buffer)

    def _ask_ahead(self, file: Path, handle: int, start: int, end: int) -> None:
        """Have the system fetch what comes next, while this thread works on what it has.

        Only a hint, so two threads that read one file may both be wrong about it.
        """
        if not hasattr(os, "posix_fadvise"):  # pragma: no cover (macOS)
            return
        before, asked = self._reached.get(file, (-1, 0))
        if before >= 0 and 0 <= start - before <= _GAP and asked - end < _AHEAD // 2:
            asked = max(asked, end)
            os.posix_fadvise(handle, asked, _AHEAD, os.POSIX_FADV_WILLNEED)
            asked += _AHEAD
        self._reached[file] = (end, asked)

    def _handle(self, file: Path) -> int:
        with self._lock:
            if file not in self._handles:
                try:
                    self._handles[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise _unreadable(file, error) from error
            return self._handles[file]

    def close(self) -> None:
        """Close every file; reading again opens them again."""
        with self._lock:
            while self._handles:
                os.close(self._handles.popitem()[1])


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read: {error.strerror or error}", "check the file, its rights and disk"
    )
