"""Both checkpoints in step, piece by piece, read ahead of the arithmetic.

At most `_AHEAD` pieces of each checkpoint are in memory. A piece is at least one row of the first
dimension: one expert, where experts are stacked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.reader import Checkpoint
from realign.diff.pairs import Pair

PIECE_BYTES = 4 * 2**20
_AHEAD = 3

Rows = tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Piece:
    """The same rows of a pair of tensors, as stored."""

    pair: Pair
    a: Tensor
    b: Tensor
    reference: Tensor | None
    last: bool
    """Nothing of the pair follows."""


@dataclass(frozen=True)
class _Wanted:
    pair: Pair
    a: Future[Tensor]
    b: Future[Tensor]
    reference: Future[Tensor] | None
    last: bool

    def get(self) -> Piece:
        r = None if self.reference is None else self.reference.result()
        return Piece(self.pair, self.a.result(), self.b.result(), r, self.last)


def read_pieces(
    pairs: Sequence[Pair],
    a: Checkpoint,
    b: Checkpoint,
    *,
    reference: Checkpoint | None = None,
    piece_bytes: int = PIECE_BYTES,
) -> Iterator[Piece]:
    """Read comparable pairs in order; each ends with its `last` piece, also an empty one.

    Args:
        pairs: what to read; those that are not comparable are passed over.
        a: the first checkpoint.
        b: the second.
        reference: read where it holds A's tensor in A's shape.
        piece_bytes: about so much of one tensor at a time.
    """
    with ThreadPoolExecutor(max_workers=2 if reference is None else 3) as pool:
        waiting: deque[_Wanted] = deque()
        try:
            for pair in pairs:
                if pair.a is None or pair.b is None or not pair.comparable:
                    continue
                there = _reference_of(pair, pair.a, reference)
                for rows, last in _steps(pair, pair.a, pair.b, piece_bytes):
                    waiting.append(
                        _Wanted(
                            pair,
                            pool.submit(a.read, pair.a.name, rows),
                            pool.submit(b.read, pair.b.name, rows),
                            None if there is None else pool.submit(there.read, pair.a.name, rows),
                            last,
                        )
                    )
                    if len(waiting) >= _AHEAD:
                        yield waiting.popleft().get()
            while waiting:
                yield waiting.popleft().get()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _reference_of(pair: Pair, a: TensorInfo, reference: Checkpoint | None) -> Checkpoint | None:
    if reference is None:
        return None
    there = reference.tensors.get(a.name)
    fits = there is not None and there.shape == a.shape and pair.rows is None
    return reference if fits else None


def _steps(
    pair: Pair, a: TensorInfo, b: TensorInfo, piece_bytes: int
) -> Iterator[tuple[Rows, bool]]:
    if not a.shape:
        yield None, True
        return
    total = a.shape[0] if pair.rows is None else pair.rows
    row_bytes = max(a.nbytes // max(1, a.shape[0]), b.nbytes // max(1, b.shape[0]), 1)
    step = max(1, piece_bytes // row_bytes)
    for start in range(0, max(total, 1), step):
        stop = min(start + step, total)
        yield (start, stop), stop >= total
