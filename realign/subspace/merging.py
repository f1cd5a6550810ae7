"""Several task vectors into one: task arithmetic, average, TIES.

    task arithmetic   lambda * sum of the vectors            Ilharco et al., arXiv 2212.04089
    average           their mean
    TIES              keep the largest entries of each vector, elect every coordinate's sign by the
                      sum, add the entries of that sign, times lambda     after arXiv 2306.01708

TIES cuts each vector at one magnitude for all tensors, which is found here as well. DARE is task
arithmetic of thinned vectors (`dare`). Not here: masks (`concrete`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_HALF = 16  # bits of a float32 that one pass looks at


def task_arithmetic(vectors: Sequence[Tensor], scale: float) -> Tensor:
    """Return scale * the sum of the vectors, in one order whatever order they come in."""
    return scale * _sum(vectors)


def average(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean of the vectors."""
    return _sum(vectors) / len(vectors)


def ties(vectors: Sequence[Tensor], scale: float, thresholds: Sequence[float]) -> Tensor:
    """Return what TIES makes of the vectors.

    Args:
        vectors: of one shape.
        scale: lambda.
        thresholds: of each vector, the smallest magnitude that is kept; see `magnitude_at`.
    """
    kept = [
        vector.where(vector.abs() >= threshold, 0.0)
        for vector, threshold in zip(vectors, thresholds, strict=True)
    ]
    sign = torch.sign(_sum(kept))
    return scale * _sum([vector.where(torch.sign(vector) == sign, 0.0) for vector in kept])


def magnitude_at(share: float, tensors: Callable[[], Iterable[Tensor]]) -> float:
    """Return the smallest magnitude among the given share of largest entries of many tensors.

    Exact for float32: two passes count bit patterns, whose order is that of magnitudes, so that
    nothing is sorted or held.

    Args:
        share: of all entries, in (0, 1]; the count is rounded up.
        tensors: gives the tensors, twice the same.
    """
    high = torch.zeros(1 << _HALF, dtype=torch.int64)
    for bits in map(_bits, tensors()):
        high += torch.bincount(bits >> _HALF, minlength=1 << _HALF).cpu()
    wanted = math.ceil(share * int(high.sum()) - 1e-9)
    if wanted < 1:
        return math.inf
    top, wanted = _bucket(high, wanted)
    low = torch.zeros(1 << _HALF, dtype=torch.int64)
    for bits in map(_bits, tensors()):
        inside = bits[(bits >> _HALF) == top]
        low += torch.bincount(inside & ((1 << _HALF) - 1), minlength=1 << _HALF).cpu()
    bottom, _ = _bucket(low, wanted)
    pattern = torch.tensor((top << _HALF) | bottom, dtype=torch.int32)
    return float(pattern.view(torch.float32))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().float().abs().contiguous().view(-1).view(torch.int32)


def _bucket(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bucket in which the entry lies that has `wanted` - 1 larger ones; and its place there."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, torch.tensor(wanted)))
    before = int(above[place - 1]) if place else 0
    return counts.numel() - 1 - place, wanted - before


def _sum(vectors: Sequence[Tensor]) -> Tensor:
    """The sum in an order of the vectors' own, so that it does not depend on theirs."""
    if len(vectors) == 2:
        return vectors[0] + vectors[1]  # addition of two commutes
    return torch.stack(list(vectors)).sort(0).values.sum(0)
