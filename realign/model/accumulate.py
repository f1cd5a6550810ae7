"""Sums of vectors and of their outer products, streamed without losing what matters.

Tensor arithmetic only: which vectors are summed, and what for, is decided in moments.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float64", "float32"]
MomentKind = Literal["input", "output", "token"]
"""What is summed: inputs, outputs, or outputs standardised token by token."""


def standardise_tokens(z_td: Tensor) -> Tensor:
    """Each row (one token's outputs) minus its mean, over its population standard deviation.

    A row without spread becomes zero. (LSSF, arXiv 2602.00038, with "j" read as the token.)
    """
    centred = z_td - z_td.mean(dim=1, keepdim=True)
    spread = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / spread, torch.zeros_like(centred))


class Sums:
    """n, sum v and sum v v^T, accumulated without losing a small spread beside a large mean."""

    def __init__(self, width: int, device: torch.device, precision: Precision) -> None:
        self.n = 0
        self.exact = precision == "float64"
        self.dtype = torch.float64 if self.exact else torch.float32
        # float32: mean and centred scatter live in float64 on the CPU, batches are summed around a
        # pivot (the first batch's mean) on the device.
        home = device if self.exact else torch.device("cpu")
        self.first = torch.zeros(width, dtype=torch.float64, device=home)  # sum, or mean - pivot
        self.second = torch.zeros(width, width, dtype=torch.float64, device=home)
        self.pivot: Tensor | None = None

    def add(self, v_nd: Tensor) -> None:
        """Count the rows of `v_nd` [N, d], of any float dtype, on the device given."""
        count = int(v_nd.shape[0])
        if count == 0:
            return
        v = v_nd.to(self.dtype)
        if self.exact:
            self.first += v.sum(dim=0)
            self.second.addmm_(v.T, v)
        else:
            self._merge_around_pivot(v, count)
        self.n += count

    def _merge_around_pivot(self, v: Tensor, count: int) -> None:
        if self.pivot is None:
            self.pivot = v.mean(dim=0)
        shifted = v - self.pivot
        mean = shifted.mean(dim=0)
        centred = shifted - mean
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 keeps ten bits
        try:
            scatter = centred.T @ centred
        finally:
            torch.set_float32_matmul_precision(before)
        step = mean.to("cpu", torch.float64) - self.first
        total = self.n + count
        self.second += scatter.to("cpu", torch.float64)
        self.second += torch.outer(step, step) * (self.n * count / total)
        self.first += step * (count / total)

    def finish(self) -> tuple[int, Tensor, Tensor]:
        """The number n, sum v [d] and sum v v^T [d, d], float64 on the CPU, symmetric."""
        first, second = self.first.cpu(), self.second.cpu()
        if not self.exact:
            pivot = torch.zeros_like(first) if self.pivot is None else self.pivot.to("cpu").double()
            mean = first + pivot
            first, second = self.n * mean, second + self.n * torch.outer(mean, mean)
        return self.n, first, (second + second.T) / 2
