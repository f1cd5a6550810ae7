"""Differences of weights: where every task vector and every safety vector comes from.

Here: subtraction in enough precision, and Frobenius inner products. Not here: what the difference
means (that is the method's or the auditor's business).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Entries upcast at once on the CPU."""
DEVICE_BLOCK = 1 << 24
"""Entries upcast at once on an accelerator."""


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Return `a - b`, upcast before subtracting.

    The float32 difference of two bfloat16 values is exact unless their magnitudes differ by more
    than about 2^15; subtracting in bfloat16 would round the result to 8 bits.

    Args:
        a: any shape, any floating dtype.
        b: the shape of `a`.

    Returns:
        A new tensor, float64 if either input is float64, else float32; the inputs are untouched.
    """
    assert a.shape == b.shape, f"{tuple(a.shape)} minus {tuple(b.shape)}"
    double = torch.float64 in (a.dtype, b.dtype)
    dtype = torch.float64 if double else torch.float32
    if a.dtype == dtype:
        return a - b.to(dtype)
    return a.to(dtype).sub_(b.to(dtype))  # the cast made a copy: reuse it


def inner(a: Tensor, b: Tensor) -> float:
    """Return the Frobenius inner product <a, b>, accumulated in float64."""
    assert a.shape == b.shape, f"<{tuple(a.shape)}, {tuple(b.shape)}>"
    one, two = _flat(a), _flat(b)
    total = torch.zeros((), dtype=torch.float64, device=one.device)
    for x, y in zip(_blocks(one), _blocks(two), strict=True):
        total += torch.dot(x, y)
    return float(total)


def squared_norm(a: Tensor) -> float:
    """Return the squared Frobenius norm, accumulated in float64."""
    flat = _flat(a)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for x in _blocks(flat):
        total += torch.dot(x, x)
    return float(total)


def _flat(a: Tensor) -> Tensor:
    if a.device.type == "mps":  # no float64 there
        a = a.cpu()
    return a.detach().reshape(-1)


def _blocks(flat: Tensor) -> Iterator[Tensor]:
    """Blocks in float64: never the whole, and on the CPU no more than its cache holds."""
    size = BLOCK if flat.device.type == "cpu" else DEVICE_BLOCK
    for start in range(0, flat.numel(), size):
        yield flat[start : start + size].to(torch.float64)
