"""One weight file of an output: what it will hold, and writing it as a stream.

Here: the layout of the files (that of the fine-tune), the header, and a writer that takes tensors
in order, in row chunks, and hashes what it writes. Not here: the folder around them (`writer`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from realign.checkpoint.headers import DTYPES, FLOATS
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.space import size_text
from realign.checkpoint.writeback import start_writing
from realign.errors import OutputError, UsageError

_CHUNK = 8 * 2**20
_SEND = 32 * 2**20
"""The disk is told to begin with so much at a time: left to itself the system begins when the file
is closed, and then there is nothing to do but to wait for it."""

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    """Safetensors spelling."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ShardLayout:
    """One weight file: its name and its tensors, in the order in which they are written."""

    filename: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, header excluded."""
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def file_size(self) -> int:
        """Size of the whole file."""
        return len(self.header()) + self.nbytes

    def header(self) -> bytes:
        """The file's first bytes: length and JSON, padded so that the data start on 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for spec in self.tensors:
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            at += spec.nbytes
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_layout(checkpoint: Checkpoint, *, dtype: str | None = None) -> tuple[ShardLayout, ...]:
    """The files of an output that is to look like `checkpoint`: same names, same sharding.

    Args:
        checkpoint: the fine-tune. An adapter is laid out like its base, merged.
        dtype: store floating-point tensors as this type ("F32", "BF16", ...) instead of their own.

    Raises:
        UsageError: `dtype` is not a floating-point type.
    """
    if dtype is not None and dtype not in FLOATS:
        raise UsageError(f"the output cannot be {dtype}", f"use one of {', '.join(sorted(FLOATS))}")
    stored = checkpoint
    while stored.kind == "adapter":
        stored = cast(Checkpoint, getattr(stored, "base"))  # noqa: B009 - declared by adapters only
    last = max((info.file.name for info in stored.tensors.values()), default="")
    shards: dict[str, list[TensorSpec]] = {}
    for name, info in checkpoint.tensors.items():
        file = stored.tensors[name].file.name if name in stored.tensors else last
        kind = dtype if dtype is not None and info.dtype in FLOATS else info.dtype
        shards.setdefault(file, []).append(TensorSpec(name, kind, info.shape))
    return tuple(ShardLayout(file, tuple(specs)) for file, specs in sorted(shards.items()))


class ShardWriter:
    """Writes one weight file from front to back; nothing is kept but the hash."""

    def __init__(
        self,
        path: Path,
        layout: ShardLayout,
        *,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Create the file and write its header.

        Args:
            path: a file that does not exist.
            layout: what it will hold.
            guard: entered around every change of the file; an exception of it ends the writing.
        """
        self.facts: dict[str, Any] = {}
        """JSON that the journal keeps with the finished shard, for a run that resumes after it."""
        self._path, self._layout, self._guard = path, layout, guard
        self._digest = hashlib.sha256()
        self._size = self._sent = 0
        self._at, self._done = 0, 0
        # Mode 0666 under the umask, as any program creates a file.
        with guard():
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._put(memoryview(layout.header()))

    def write(self, name: str, rows: Tensor) -> None:
        """Append rows of the tensor whose turn it is.

        Args:
            name: the next unfinished tensor of the layout.
            rows: the following rows [n, ...] in the layout's type, or of one of its matrices where
                it is a stack, or the whole tensor.

        Raises:
            OutputError: the disk is full.
        """
        if not rows.numel():
            return
        self._skip_empty()
        spec = self._layout.tensors[self._at]
        assert name == spec.name, f"{name} was written where {spec.name} was due"
        assert rows.dtype == DTYPES[spec.dtype], (name, rows.dtype, spec.dtype)
        of_matrix = len(spec.shape) == 3 and rows.shape[1:] == spec.shape[2:]
        assert of_matrix or rows.shape[1:] == spec.shape[1:], (name, rows.shape)
        assert self._done + rows.nbytes <= spec.nbytes, f"{name}: too many rows"
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._put(memoryview(cast(Any, data)))
        self._done += rows.nbytes
        if self._done == spec.nbytes:
            self._at, self._done = self._at + 1, 0

    def _skip_empty(self) -> None:
        tensors = self._layout.tensors
        while self._at < len(tensors) and tensors[self._at].nbytes == 0:
            self._at += 1

    def _put(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            self._digest.update(chunk)
            while len(chunk):
                try:
                    with self._guard():
                        count = os.write(self._handle, chunk)
                except OSError as error:
                    raise disk_error(error, self._path, self._layout.file_size) from error
                chunk = chunk[count:]
                self._size += count
        if self._size - self._sent >= _SEND:
            start_writing(self._handle, self._sent, self._size - self._sent)
            self._sent = self._size

    def finish(self) -> tuple[str, int]:
        """Flush to the disk and close; returns SHA-256 and size.

        Raises:
            OutputError: the disk is full.
        """
        self._skip_empty()
        assert self._at == len(self._layout.tensors), (
            f"{self._layout.filename}: {self._layout.tensors[self._at].name} was not written"
        )
        try:
            os.fsync(self._handle)
        except OSError as error:
            raise disk_error(error, self._path, self._layout.file_size) from error
        self.close()
        return self._digest.hexdigest(), self._size

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def disk_error(error: OSError, path: Path, needed: int) -> OutputError:
    """What to tell when writing fails."""
    if error.errno in _NO_SPACE:
        return OutputError(
            f"the disk is full: {path} needs {needed} bytes ({size_text(needed)})",
            "free some space, or choose a folder on another disk",
        )
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}", "check the folder and its rights"
    )


def index_of(layout: tuple[ShardLayout, ...]) -> Mapping[str, Any] | None:
    """The index of a sharded output; None where one plain file is found without."""
    if len(layout) == 1 and "-of-" not in layout[0].filename:
        return None
    specs = [spec for shard in layout for spec in shard.tensors]
    return {
        "metadata": {
            "total_parameters": sum(prod(spec.shape) for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        },
        "weight_map": dict(
            sorted((spec.name, shard.filename) for shard in layout for spec in shard.tensors)
        ),
    }
