"""Dense float64 references of the three methods, written apart from the product.

A reference computes the edit E of one logical matrix, and `error_in_bounds` measures the output
against |W' - (Wf + E)| <= 1 ulp + 1e-6 max|E|, entry by entry. Where a matrix lies in its stored
tensor is the product's own geometry (`slots`), which tests/checkpoint/test_slots.py holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEAD = 1e-6
ROUNDING = 256 * 2.0**-52
DEGENERATE = 1e-6
SHARE = 1e-9


def resta(base: Tensor, aligned: Tensor, *, gamma: float = 0.5) -> Tensor:
    """E = gamma (Wa - W0)."""
    return gamma * (aligned.double() - base.double())


def delta_svd(base: Tensor, aligned: Tensor, *, rank: int = 8) -> tuple[Tensor, bool]:
    """The truncated SVD of Wa - W0 [d_out, d_in], and whether the cut is degenerate."""
    delta = aligned.double() - base.double()
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    rank = min(rank, len(s))
    edit = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return edit, _degenerate(s.square(), rank)


def lssf(
    base: Tensor, aligned: Tensor, *, kind: str, n: int, s1: Tensor, s2: Tensor, rank: int
) -> tuple[Tensor, bool]:
    """E = U_r U_r^T (Wa - W0), U_r the leading left singular vectors of standardised outputs.

    Args:
        base: W0 [d_out, d_in].
        aligned: Wa [d_out, d_in].
        kind: "input" or "output": what s1 and s2 are sums of.
        n: tokens counted.
        s1: sum of v [d].
        s2: sum of v v^T [d, d].
        rank: r, as the run recorded it; held to the entropy rule here.

    Returns:
        E, and whether the cut at r is degenerate.
    """
    weight = aligned.double()
    mean = s1.double() / n
    covariance = s2.double() / n - torch.outer(mean, mean)
    if kind == "input":
        covariance = weight @ covariance @ weight.T
        mean = weight @ mean
    variance = covariance.diagonal().clamp(min=0)
    deviation = variance.sqrt()
    live = (deviation > DEAD * deviation.max()) & (variance > ROUNDING * (variance + mean**2))
    scale = torch.where(live, 1 / deviation.clamp(min=1e-300), torch.zeros_like(deviation))
    correlation = scale[:, None] * covariance * scale
    values, vectors = torch.linalg.eigh((correlation + correlation.T) / 2)
    energies = values.flip(0).clamp(min=0)
    assert _is_entropy_rank(energies, rank), f"rank {rank} is not that of the entropy rule"
    u = vectors.flip(1)[:, :rank]
    return u @ (u.T @ (weight - base.double())), _degenerate(energies, rank)


def _is_entropy_rank(energies: Tensor, rank: int, eta: float = 0.85) -> bool:
    """Whether r is the smallest rank whose share of the spectrum's entropy exceeds eta.

    Where a share meets eta but for rounding, both sides of it are right.
    """
    p = energies / energies.sum()
    terms = -torch.special.xlogy(p, p)
    shares = torch.cat([torch.zeros(1).double(), terms.cumsum(0)]) / terms.sum()
    return bool(shares[rank - 1] <= eta + SHARE and shares[rank] > eta - SHARE)


def _degenerate(energies: Tensor, rank: int) -> bool:
    if rank >= len(energies):
        return False
    return bool(energies[rank - 1] - energies[rank] < DEGENERATE * energies[rank - 1])


def error_in_bounds(result: Tensor, finetuned: Tensor, edit: Tensor) -> float:
    """The largest |W' - (Wf + E)| in units of 1 ulp + 1e-6 max|E|; at most 1 is right."""
    reference = finetuned.double() + edit
    info = torch.finfo(result.dtype)
    exponent = torch.floor(torch.log2(reference.abs().clamp_min(info.tiny)))
    allowed = torch.exp2(exponent) * info.eps + 1e-6 * edit.abs().max()
    return float(((result.double() - reference).abs() / allowed).max())
