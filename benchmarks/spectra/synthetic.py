"""Weights, drifts and activations as real models have them: decaying spectra, outliers, bf16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OUTLIER = 30.0
"""How much larger the few outlying input features of a transformer are."""


@dataclass(frozen=True)
class Weights:
    """One matrix [d_out, d_in] in the checkpoints of a family, bfloat16 unless said otherwise."""

    base: Tensor
    aligned: Tensor
    unaligned: Tensor
    finetuned: Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(d_out: int, d_in: int, *, seed: int, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """A family: deviations of 0.02, drifts that are a few strong directions over a weak bulk."""
    draw = generator(seed)
    base = 0.02 * torch.randn(d_out, d_in, generator=draw)
    aligned = base + drift(d_out, d_in, seed=seed + 1)
    unaligned = aligned + drift(d_out, d_in, seed=seed + 2)
    finetuned = aligned + drift(d_out, d_in, seed=seed + 3)
    return Weights(*(each.to(dtype) for each in (base, aligned, unaligned, finetuned)))


def drift(d_out: int, d_in: int, *, seed: int, rank: int = 16, size: float = 1e-3) -> Tensor:
    """A weight delta [d_out, d_in], float32: rank 16 of falling strength over a bulk of 1e-3."""
    draw = generator(seed)
    left = torch.randn(d_out, rank, generator=draw) * torch.arange(1, rank + 1) ** -0.5
    right = torch.randn(rank, d_in, generator=draw)
    return size * (torch.randn(d_out, d_in, generator=draw) + left @ right)


def activations(tokens: int, width: int, *, seed: int, decay: float = 0.6) -> Tensor:
    """Inputs [tokens, width], float32: singular values fall as i^-decay, means are not 0."""
    draw = generator(seed)
    strength = torch.arange(1, width + 1, dtype=torch.float32) ** -decay
    mixing = torch.randn(width, width, generator=draw) / width**0.5
    x = (torch.randn(tokens, width, generator=draw) * strength * width**0.5) @ mixing
    x += 0.3 * torch.randn(width, generator=draw)
    x[:, : max(1, width // 512)] *= OUTLIER
    return x
