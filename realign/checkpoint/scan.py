"""One pass over a weight file: its hash, and whether its numbers are finite.

Here: the pass. Not here: what the hash should be (`verification`), looking at tensors while a model
is repaired (`finite`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from realign.checkpoint.headers import FLOATS, Header, TensorInfo
from realign.checkpoint.names import role_of
from realign.errors import HeaderError
from realign.progress import Task

_CHUNK = 4 * 2**20
_SERIAL = 3 * 2**13
"""Entries that torch looks at without calling for threads: they would wait for the hashing ones."""


def scan_weights(header: Header, task: Task) -> tuple[str, tuple[str, ...]]:
    """Hash a weight file and look for NaN and infinity; buffers may hold them (stored masks).

    The hash of one chunk is computed in a thread while the next one is read and checked.

    Args:
        header: of the file.
        task: told the bytes.

    Returns:
        SHA-256 as 64 hex digits, and the names of the damaged tensors.

    Raises:
        HeaderError: the file ended early.
    """
    digest = hashlib.sha256()
    damaged: dict[str, None] = {}
    buffers = [torch.empty(_CHUNK, dtype=torch.uint8) for _ in range(2)]
    busy: list[Future[None] | None] = [None, None]
    turn = 0
    with (
        header.file.open("rb", buffering=0) as stream,
        ThreadPoolExecutor(max_workers=1) as pool,
    ):
        for info, size in _parts(header):
            earlier = busy[turn]
            if earlier is not None:
                earlier.result()
            view = memoryview(cast(Any, buffers[turn][:size].numpy()))
            _read_exactly(stream, view, header.file)
            busy[turn] = pool.submit(digest.update, view)
            if info is not None and not all_finite(buffers[turn][:size].view(info.torch_dtype)):
                damaged[info.name] = None
            task.advance(size)
            turn = 1 - turn
    return digest.hexdigest(), tuple(damaged)


def _parts(header: Header) -> Iterator[tuple[TensorInfo | None, int]]:
    """The file from front to back in chunks: whose numbers they are (None: not checked), bytes.

    The tensors of a readable header cover the file after its JSON without gap or overlap.
    """
    tensors = sorted(header.tensors.values(), key=lambda info: info.offset)
    size = header.file.stat().st_size
    start = min((info.offset for info in tensors if info.nbytes), default=size)
    spans: list[tuple[TensorInfo | None, int]] = [(None, start)]
    for info in tensors:
        checked = info.dtype in FLOATS and role_of(info).kind != "buffer"
        spans.append((info if checked else None, info.nbytes))
    for info, length in spans:
        for at in range(0, length, _CHUNK):
            yield info, min(_CHUNK, length - at)


def _read_exactly(stream: BinaryIO, view: memoryview, path: Path) -> None:
    while len(view):
        count = cast(Any, stream).readinto(view)
        if not count:
            raise HeaderError(
                f"{path} ended early: it changed while it was being read",
                "make sure that nothing writes to the folder, then run again",
            )
        view = view[count:]


def all_finite(values: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity.

    Minimum and maximum pass NaN on, and are found many times faster than a mask is made.
    """
    flat = values.reshape(-1)
    for start in range(0, flat.numel(), _SERIAL):
        low, high = torch.aminmax(flat[start : start + _SERIAL])
        if not (isfinite(float(low)) and isfinite(float(high))):
            return False
    return True
