"""Dense float64 numpy figures of two checkpoints, to hold the streamed ones against."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from realign.checkpoint.reader import open_checkpoint
from realign.diff.compare import compare
from realign.diff.result import Difference

Array = NDArray[np.float64]


def dense(tensor: Tensor) -> Array:
    """A tensor as a float64 vector, by torch's exact upcast."""
    return tensor.to(torch.float64).reshape(-1).numpy()


def oracle(a: Array, b: Array) -> dict[str, float]:
    """Every figure of two vectors, straight from its definition."""
    delta = b - a
    norm_a, norm_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    return {
        "entries": a.size,
        "changed": int(np.count_nonzero(delta)),
        "norm_a": norm_a,
        "norm_b": norm_b,
        "norm_delta": float(np.linalg.norm(delta)),
        "relative": float(np.linalg.norm(delta)) / norm_a,
        "cosine": float(a @ b) / (norm_a * norm_b),
        "largest": float(np.abs(delta).max()),
    }


def stacked(tensors: Mapping[str, Tensor], names: list[str]) -> Array:
    """Several tensors as one long vector."""
    return np.concatenate([dense(tensors[name]) for name in names])


def difference(
    a: Path | str, b: Path | str, *, reference: Path | None = None, **options: Any
) -> Difference:
    """Compare two folders."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(open_checkpoint(each)) for each in (a, b))
        third = None if reference is None else stack.enter_context(open_checkpoint(reference))
        return compare(one, two, reference=third, **options)
