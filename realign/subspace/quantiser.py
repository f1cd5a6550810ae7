"""Integer quantisation of a matrix by rows, with trainable clipping and straight-through rounding.

Here: the grid of a row, rounding to it, and what the codes stand for, all pure. Not here: how clip
factors and smoothing are trained (`realign.repair.quantise`), how codes are stored
(`realign.checkpoint.int8`).

Per output row, b bits (OmniQuant, arXiv 2308.13137; Q-realign, arXiv 2601.08089):

    hi = sigmoid(g) max(w, 0),  lo = sigmoid(h) min(w, 0),  step = (hi - lo) / (2^b - 1)
    zero = round(-lo / step),   code = clamp(round(w / step) + zero, 0, 2^b - 1)
    w_hat = (code - zero) step

A row without a sign change is extended to 0, so that `zero` is a code and 0 stays exactly 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR_AT_START = 4.0
"""g = h = 4: sigmoid(4) = 0.982 of the row's range."""


@dataclass(frozen=True, eq=False)
class Grid:
    """The codes that a row may have.

    Attributes:
        step: [d_out, 1], above 0.
        zero: the code that stands for 0 [d_out, 1], a whole number in [0, 2^bits - 1].
        bits: of a code.
    """

    step: Tensor
    zero: Tensor
    bits: int

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1


def clip_factors(logits: Tensor | None) -> Tensor | float:
    """Return sigmoid of clip logits as a column [d_out, 1]; None: no clipping."""
    return 1.0 if logits is None else torch.sigmoid(logits).unsqueeze(1)


def row_grid(
    weight: Tensor,
    *,
    high: Tensor | float,
    low: Tensor | float,
    bits: int,
    dtype: torch.dtype | None = None,
) -> Grid:
    """Return the grid of every row; gradients flow to the clip factors.

    Args:
        weight: [d_out, d_in].
        high: factor on the row's maximum, [d_out, 1] or a number.
        low: factor on the row's minimum.
        bits: of a code.
        dtype: in which a file will hold the step; it is rounded to that here, so that what is
            stored and what is computed are the same number.
    """
    zero = weight.new_zeros(())
    top = torch.maximum(weight.amax(dim=1, keepdim=True), zero) * high
    bottom = torch.minimum(weight.amin(dim=1, keepdim=True), zero) * low
    step = (top - bottom) / (2**bits - 1)
    tiny = torch.finfo(dtype or weight.dtype).tiny
    step = torch.where(step > tiny, step, torch.ones_like(step))  # a row of zeros
    if dtype is not None:
        step = _pass_through(step.to(dtype).to(step.dtype), step)
    return Grid(step, straight_round(-bottom / step).clamp(0, 2**bits - 1), bits)


def codes_of(weight: Tensor, grid: Grid) -> Tensor:
    """Return the code of every entry, whole numbers in the weight's type; gradients flow."""
    return (straight_round(weight / grid.step) + grid.zero).clamp(0, grid.top)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Return what codes stand for."""
    return (codes - grid.zero) * grid.step


def quantise(
    weight: Tensor,
    *,
    high: Tensor | float,
    low: Tensor | float,
    bits: int,
    smooth: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return Q(W diag(v)) diag(1 / v); gradients flow to clip factors and v.

    Args:
        weight: W [d_out, d_in].
        high: factor on each row's maximum.
        low: factor on each row's minimum.
        bits: of a code.
        smooth: v [d_in], above 0; None: 1.
        dtype: see `row_grid`.
    """
    scaled = weight if smooth is None else weight * smooth
    grid = row_grid(scaled, high=high, low=low, bits=bits, dtype=dtype)
    found = decode(codes_of(scaled, grid), grid)
    return found if smooth is None else found / smooth


def straight_round(value: Tensor) -> Tensor:
    """Return the nearest whole number (half to even); its gradient is 1."""
    return _pass_through(value.round(), value)


def smoothing(inputs: Tensor, columns: Tensor) -> Tensor:
    """Return v at the start: max|x|^0.5 / max|w|^0.5 per channel [d_in].

    Args:
        inputs: max|x| of every channel over calibration [d_in].
        columns: max|w| of every channel over the matrices that read it [d_in].

    Channels that are zero on either side get 1: there is nothing to smooth.
    """
    live = (inputs > 0) & (columns > 0)
    ones = torch.ones_like(inputs)
    return torch.where(live, torch.where(live, inputs / columns, ones).sqrt(), ones)


def settled_smoothing(
    smooth: Tensor, gain: Tensor, dtype: torch.dtype, *, offset: float = 0.0
) -> Tensor:
    """Return the v nearest to `smooth` for which gain / v is what a file can hold.

    A norm that carries 1 / v in a file is rounded to the file's type. With this v the rounded norm
    is exact, so that a file with v in the norm and one with v folded back are one function.

    Args:
        smooth: v [d_in].
        gain: what the norm multiplies by [d_in].
        dtype: of the norm in the file.
        offset: what the norm adds to its stored weight (Gemma: 1).
    """
    stored = offset + (gain / smooth - offset).to(dtype).to(smooth.dtype)
    usable = (stored != 0) & torch.isfinite(stored) & (gain != 0)
    return torch.where(usable, gain / torch.where(usable, stored, 1.0), smooth)


def _pass_through(value: Tensor, of: Tensor) -> Tensor:
    return value.detach() + (of - of.detach())
