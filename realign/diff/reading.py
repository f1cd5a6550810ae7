"""Both checkpoints in step, piece by piece: a few threads read and measure, sums stay in order.

A piece is at least one row of the first dimension: one expert, where experts are stacked. Every
thread holds one piece of each checkpoint. Sums do not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import local

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.reader import Checkpoint
from realign.diff.pairs import Pair
from realign.diff.terms import Meter, Terms
from realign.subspace.threads import torch_threads

PIECE_BYTES = 4 * 2**20
_MOST_THREADS = 4
_AHEAD = 3
"""Pieces that wait for each thread: enough to keep it busy, next to nothing in memory."""

Rows = tuple[int, int] | None


@dataclass(frozen=True)
class _Piece:
    pair: Pair
    a: TensorInfo
    b: TensorInfo
    rows: Rows
    nbytes: int
    """Bytes of both."""


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
        if reference is not None and _fits(reference, piece):
            third = reference.read(piece.a.name, piece.rows)
        one, two = a.read(piece.a.name, piece.rows), b.read(piece.b.name, piece.rows)
        return meter.measure(one, two, third)

    workers = max(1, min(_MOST_THREADS, os.cpu_count() or 1))
    waiting: deque[tuple[_Piece, Future[Terms]]] = deque()
    with torch_threads(1), ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for piece in _pieces(pairs, piece_bytes):
                waiting.append((piece, pool.submit(measure, piece)))
                if len(waiting) > _AHEAD * workers:
                    done, terms = waiting.popleft()
                    yield done.pair, terms.result(), done.nbytes
            while waiting:
                done, terms = waiting.popleft()
                yield done.pair, terms.result(), done.nbytes
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fits(reference: Checkpoint, piece: _Piece) -> bool:
    """Whether the reference holds all that is compared; its vocabulary may be longer."""
    there = reference.tensors.get(piece.a.name)
    if there is None or there.shape == piece.a.shape:
        return there is not None
    if piece.pair.role.kind not in ("embedding", "head") or not there.shape or not piece.a.shape:
        return False
    compared = piece.a.shape[0] if piece.pair.rows is None else piece.pair.rows
    return there.shape[0] >= compared and there.shape[1:] == piece.a.shape[1:]


def _pieces(pairs: Sequence[Pair], piece_bytes: int) -> Iterator[_Piece]:
    for pair in pairs:
        a, b = pair.a, pair.b
        if a is None or b is None or not pair.comparable:
            continue
        if not a.shape:
            yield _Piece(pair, a, b, None, a.nbytes + b.nbytes)
            continue
        total = a.shape[0] if pair.rows is None else pair.rows
        of_a, of_b = a.nbytes // max(1, a.shape[0]), b.nbytes // max(1, b.shape[0])
        step = max(1, piece_bytes // max(of_a, of_b, 1))
        for start in range(0, max(total, 1), step):
            stop = min(start + step, total)
            yield _Piece(pair, a, b, (start, stop), (stop - start) * (of_a + of_b))
