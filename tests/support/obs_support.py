"""Plain float64 references for the methods that weigh entries by their inputs' moments."""

from __future__ import annotations

import torch
from torch import Tensor


def psd(n: int, *, seed: int) -> Tensor:
    """A well-conditioned matrix of second moments with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator).double()
    x = mix @ torch.randn(n, 4 * n + 4, generator=generator).double()
    gram = x @ x.T
    return (gram + gram.T) / 2 + 0.1 * n * torch.eye(n).double()


def sweep_by_definition(
    start: Tensor, goal: Tensor, mask: Tensor, h: Tensor, *, group: int = 1
) -> Tensor:
    """Column by column: U from the inverse itself, every update at once."""
    inverse = torch.linalg.inv(h)
    u = torch.linalg.cholesky((inverse + inverse.T) / 2).T
    w = start.clone()
    for j in range(w.shape[1]):
        later = (j // group + 1) * group if group > 1 else j + 1
        q = torch.where(mask[:, j], goal[:, j], w[:, j])
        err = (w[:, j] - q) / u[j, j]
        w[:, j] = q
        w[:, later:] -= torch.outer(err, u[j, later:])
    return w
