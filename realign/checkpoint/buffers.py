"""Memory for chunks that come and go: blocks are used again instead of being mapped afresh.

Fresh memory costs a page fault for every 4 KiB, which is dearer than copying into it. A tensor from
here gives its block back when the last view of it is gone, whoever holds it: nothing can be used
again too early. Not here: what is read into it (`pread`).
"""

from __future__ import annotations

import weakref
from collections import deque
from math import prod

import torch
from torch import Tensor

_LARGEST = 8 * 2**20
"""Larger tensors are rare, and keeping their memory would cost more than it saves."""

_KEPT = 8 * 2**20


class Buffers:
    """Blocks of a few sizes; at most 8 MiB of them wait to be used again. Any thread may ask."""

    def __init__(self) -> None:
        self._free: dict[int, deque[Tensor]] = {}
        self._kept = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on the CPU, as `torch.empty`."""
        nbytes = prod(shape) * dtype.itemsize
        if not 2**16 <= nbytes <= _LARGEST:
            return torch.empty(shape, dtype=dtype)
        try:
            block = self._free[nbytes].pop()
            self._kept -= nbytes
        except (KeyError, IndexError):
            block = torch.empty(nbytes, dtype=torch.uint8)
        lent = block.numpy()[:]  # an object of its own: the storage made of it keeps it alive
        weakref.finalize(lent, self._take_back, block).atexit = False
        return torch.from_numpy(lent).view(dtype).reshape(shape)

    def _take_back(self, block: Tensor) -> None:
        nbytes = block.nbytes
        if self._kept + nbytes <= _KEPT:
            self._kept += nbytes
            self._free.setdefault(nbytes, deque()).append(block)
