"""Pieces of a tensor of a given size, for what passes through it from front to back.

A piece is some rows. Where a row is a matrix (the experts of a layer in one stack) and larger than
a piece, it is some rows of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from realign.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of a tensor; a scalar is one row."""

    start: int
    stop: int
    numel: int
    """Entries in it."""
    within: tuple[int, int] | None = None
    """Only these rows of the one matrix `start` of a stack."""


def chunks_of(
    tensors: Sequence[tuple[Checkpoint, str]],
    *,
    nbytes: int,
    rows: tuple[int, int] | None = None,
) -> Iterator[Chunk]:
    """Cut rows of a tensor, in order and without gap.

    Args:
        tensors: those whose chunks will be read, in one shape but for the number of rows; the first
            says how large one is. Where a checkpoint would make a whole matrix of a stack for every
            part of it, there are no parts.
        nbytes: how large a chunk should be; one row at least.
        rows: half-open range on the first dimension; None: all.
    """
    first_of, name = tensors[0]
    info = first_of.tensors[name]
    shape = info.shape or (1,)
    first, last = rows or (0, shape[0])
    if not info.numel:
        if first < last:
            yield Chunk(first, last, 0)
        return
    elements = max(1, nbytes * info.numel // info.nbytes)
    width = math.prod(shape[1:])
    if len(shape) == 3 and width > elements and all(c.reads_within(n) for c, n in tensors):
        step = max(1, elements // shape[2])
        for index in range(first, last):
            for at in range(0, shape[1], step):
                end = min(at + step, shape[1])
                yield Chunk(index, index + 1, (end - at) * shape[2], (at, end))
        return
    step = max(1, elements // width)
    for at in range(first, last, step):
        end = min(at + step, last)
        yield Chunk(at, end, (end - at) * width)


def read_chunk(checkpoint: Checkpoint, name: str, chunk: Chunk) -> Tensor:
    """Read a chunk: [n, ...], or [n, columns] where it lies within one matrix of a stack."""
    if chunk.within is not None:
        return checkpoint.read_within(name, chunk.start, chunk.within)
    return read_rows(checkpoint, name, (chunk.start, chunk.stop))


def read_rows(checkpoint: Checkpoint, name: str, rows: tuple[int, int]) -> Tensor:
    """Rows [start, stop) of a tensor; a scalar is one row of no dimension but that."""
    shape = checkpoint.tensors[name].shape
    if not shape:
        return checkpoint.read(name).reshape(1)
    if rows == (0, shape[0]):
        return checkpoint.read(name)
    return checkpoint.read(name, rows)
