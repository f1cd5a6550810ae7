"""Both checkpoints in step, piece by piece: a few threads read and measure, sums stay in order.

Every thread holds one piece of each checkpoint. Sums do not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import local

from realign.checkpoint.chunks import Chunk, chunks_of, read_chunk
from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.reader import Checkpoint
from realign.diff.pairs import Pair
from realign.diff.terms import Meter, Terms
from realign.subspace.threads import torch_threads

PIECE_BYTES = 4 * 2**20
_MOST_THREADS = 4
_AHEAD = 3
"""Pieces that wait for each thread: enough to keep it busy, next to nothing in memory."""


@dataclass(frozen=True)
class _Piece:
    pair: Pair
    a: TensorInfo
    b: TensorInfo
    chunk: Chunk
    nbytes: int
    """Bytes of both."""
    in_reference: bool = False
    """Whether the reference holds the tensor, too."""


def measure_pieces(
    pairs: Sequence[Pair],
    a: Checkpoint,
    b: Checkpoint,
    *,
    reference: Checkpoint | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[tuple[Pair, Terms, int]]:
    """Yield the terms of every piece of the comparable pairs in order, and its bytes.

    Args:
        pairs: what to read; those that are not comparable are passed over.
        a: the first checkpoint.
        b: the second.
        reference: read where it holds A's tensor in A's shape, or more rows of a vocabulary.
        piece_bytes: about so much of one tensor at a time.
    """
    own = local()

    def measure(piece: _Piece) -> Terms:
        if not hasattr(own, "meter"):
            own.meter = Meter()
        meter: Meter = own.meter
        third = None
        if reference is not None and piece.in_reference:
            third = read_chunk(reference, piece.a.name, piece.chunk)
        one = read_chunk(a, piece.a.name, piece.chunk)
        two = read_chunk(b, piece.b.name, piece.chunk)
        return meter.measure(one, two, third)

    workers = max(1, min(_MOST_THREADS, os.cpu_count() or 1))
    waiting: deque[tuple[_Piece, Future[Terms]]] = deque()
    with torch_threads(1), ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for piece in _pieces(pairs, a, b, reference, piece_bytes):
                waiting.append((piece, pool.submit(measure, piece)))
                if len(waiting) > _AHEAD * workers:
                    done, terms = waiting.popleft()
                    yield done.pair, terms.result(), done.nbytes
            while waiting:
                done, terms = waiting.popleft()
                yield done.pair, terms.result(), done.nbytes
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fits(reference: Checkpoint, pair: Pair, a: TensorInfo) -> bool:
    """Whether the reference holds all that is compared; its vocabulary may be longer."""
    there = reference.tensors.get(a.name)
    if there is None or there.shape == a.shape:
        return there is not None
    if pair.role.kind not in ("embedding", "head") or not there.shape or not a.shape:
        return False
    compared = a.shape[0] if pair.rows is None else pair.rows
    return there.shape[0] >= compared and there.shape[1:] == a.shape[1:]


def _pieces(
    pairs: Sequence[Pair],
    a: Checkpoint,
    b: Checkpoint,
    reference: Checkpoint | None,
    piece_bytes: int,
) -> Iterator[_Piece]:
    for pair in pairs:
        if pair.a is None or pair.b is None or not pair.comparable:
            continue
        if not pair.a.numel or pair.rows == 0:  # it counts as a tensor
            yield _Piece(pair, pair.a, pair.b, Chunk(0, 0, 0), 0)
            continue
        # The wider type first: it says how many rows a piece holds.
        tensors = sorted(((a, pair.a), (b, pair.b)), key=lambda each: -each[1].torch_dtype.itemsize)
        sources = [(checkpoint, info.name) for checkpoint, info in tensors]
        third = reference is not None and _fits(reference, pair, pair.a)
        if reference is not None and third:
            sources.append((reference, pair.a.name))
        rows = None if pair.rows is None else (0, pair.rows)
        both = pair.a.torch_dtype.itemsize + pair.b.torch_dtype.itemsize
        for chunk in chunks_of(sources, nbytes=piece_bytes, rows=rows):
            yield _Piece(pair, pair.a, pair.b, chunk, chunk.numel * both, third)
