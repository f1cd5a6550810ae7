"""Sums of vectors and of their outer products, streamed without losing what matters.

Here: `Sums`, which vectors are added to, and `Moments`, what comes of them. Tensor arithmetic only:
which vectors are summed, and what for, is decided in moments.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from realign.errors import MismatchError

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


@dataclass(frozen=True)
class Moments:
    """Sums over n token positions of vectors of width d; float64, on the CPU."""

    n: int
    s1: Tensor
    """[d], sum of v."""
    s2: Tensor
    """[d, d], sum of v v^T; or [d], its diagonal, where only that was asked for."""
    kind: MomentKind
    """v: a layer's input; its output without bias; or that output standardised per token."""

    @property
    def mean(self) -> Tensor:
        """[d], the mean of v; needs n > 0."""
        return self.s1 / self.n

    @property
    def diagonal(self) -> Tensor:
        """[d], the diagonal of sum v v^T."""
        return self.s2 if self.s2.dim() == 1 else self.s2.diagonal()

    def covariance(self) -> Tensor:
        """[d, d], the population covariance of v, symmetric; needs n > 0 and all of S2."""
        mean = self.mean
        covariance = self.s2 / self.n - torch.outer(mean, mean)
        return (covariance + covariance.T) / 2

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of positions together.

        Raises:
            MismatchError: of different kinds or widths.
        """
        if self.kind != other.kind or self.s2.shape != other.s2.shape:
            raise MismatchError(
                f"moments of {self.kind} vectors of width {len(self.s1)} and of {other.kind} "
                f"vectors of width {len(other.s1)} cannot be merged"
            )
        return Moments(self.n + other.n, self.s1 + other.s1, self.s2 + other.s2, self.kind)

    def through(self, weight: Tensor) -> Moments:
        """Output moments from input moments: n, W s1, W s2 W^T for weight W [d_out, d_in].

        Raises:
            MismatchError: these are not input moments of a layer with this weight.
        """
        if self.kind != "input" or weight.shape[1] != self.s1.shape[0]:
            raise MismatchError(
                f"{self.kind} moments of width {len(self.s1)} do not feed a weight of shape "
                f"{tuple(weight.shape)}"
            )
        w = weight.to(torch.float64)
        return Moments(self.n, w @ self.s1, w @ self.s2 @ w.T, "output")


class Sums:
    """n, sum v and sum v v^T, accumulated without losing a small spread beside a large mean."""

    def __init__(
        self, width: int, device: torch.device, precision: Precision, *, diagonal: bool = False
    ) -> None:
        self.n = 0
        self.diagonal = diagonal  # of sum v v^T only, as a vector
        self.exact = precision == "float64"
        self.dtype = torch.float64 if self.exact else torch.float32
        # float32: mean and centred scatter live in float64 on the CPU, batches are summed around a
        # pivot (the first batch's mean) on the device.
        home = device if self.exact else torch.device("cpu")
        self.first = torch.zeros(width, dtype=torch.float64, device=home)  # sum, or mean - pivot
        shape = (width,) if diagonal else (width, width)
        self.second = torch.zeros(shape, dtype=torch.float64, device=home)
        self.pivot: Tensor | None = None

    def add(self, v_nd: Tensor) -> None:
        """Count the rows of `v_nd` [N, d], of any float dtype, on the device given."""
        count = int(v_nd.shape[0])
        if count == 0:
            return
        v = v_nd.to(self.dtype)
        if self.exact:
            self.first += v.sum(dim=0)
            if self.diagonal:
                self.second += v.square().sum(dim=0)
            else:
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
        scatter = centred.square().sum(dim=0) if self.diagonal else _gram(centred)
        step = mean.to("cpu", torch.float64) - self.first
        total = self.n + count
        self.second += scatter.to("cpu", torch.float64)
        self.second += self._square(step) * (self.n * count / total)
        self.first += step * (count / total)

    def finish(self) -> tuple[int, Tensor, Tensor]:
        """The number n, sum v [d] and sum v v^T [d, d] (or its diagonal [d]), float64, CPU."""
        first, second = self.first.cpu(), self.second.cpu()
        if not self.exact:
            pivot = torch.zeros_like(first) if self.pivot is None else self.pivot.to("cpu").double()
            mean = first + pivot
            first, second = self.n * mean, second + self.n * self._square(mean)
        return self.n, first, second if self.diagonal else (second + second.T) / 2

    def _square(self, vector: Tensor) -> Tensor:
        return vector.square() if self.diagonal else torch.outer(vector, vector)


def _gram(rows: Tensor) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 keeps ten bits
    try:
        return rows.T @ rows
    finally:
        torch.set_float32_matmul_precision(before)
