"""What is done with a basis: weights of its directions, projection, energy, claims about it.

A basis is its factor U_r [d, r] with orthonormal columns; the projector U_r U_r^T is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from realign.subspace.vectors import squared_norm

FLAT = 1e-6
"""Relative gap below which singular values count as equal."""


def direction_weights(sigmas: Tensor, alpha1: float) -> Tensor:
    """Return alpha_i [r] = 1 + (alpha1 - 1)(sigma_i - sigma_r)/(sigma_1 - sigma_r).

    arXiv 2602.00038, eq. 11. A direction is multiplied by alpha_i *squared*, since both factors of
    P' carry it. Edge cases, where the formula is 0/0: r = 1 gives alpha1 (the top direction always
    carries it); a flat spectrum with r >= 2 gives ones (no evidence to prefer a direction, and the
    result must not depend on an arbitrary basis).

    Args:
        sigmas: [r], the kept singular values, descending.
        alpha1: weight of the first direction.
    """
    if sigmas.numel() == 0:
        return sigmas.clone()
    first, last = sigmas[0], sigmas[-1]
    if sigmas.numel() == 1:
        return torch.full_like(sigmas, alpha1)
    if float(first - last) <= FLAT * float(first):
        return torch.ones_like(sigmas)
    return 1.0 + (alpha1 - 1.0) * (sigmas - last) / (first - last)


def project(u: Tensor, m: Tensor) -> Tensor:
    """Return U (U^T M) for U [d_out, r] and M [d_out, d_in], in the dtype of M."""
    u = u.to(m)
    return u @ (u.T @ m)


def energy_share(u: Tensor, m: Tensor) -> float | None:
    """Return norm(U^T M)^2 / norm(M)^2, None if M is zero."""
    whole = squared_norm(m)
    return squared_norm(u.to(m).T @ m) / whole if whole > 0.0 else None


def degenerate_cut(energies: Tensor, r: int) -> bool:
    """Whether lambda_r - lambda_{r+1} < 1e-6 lambda_r: the kept subspace is then not unique."""
    if not 0 < r < energies.numel():
        return False
    kept, lost = float(energies[r - 1]), float(energies[r])
    return kept > 0.0 and kept - lost < FLAT * kept


def fix_signs(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Flip pairs of columns so that the largest-magnitude entry of each column of u is positive.

    Makes exported factors reproducible; u diag(s) v^T does not change.
    """
    if u.shape[1] == 0:
        return u, v
    rows = u.abs().argmax(dim=0, keepdim=True)
    signs = torch.where(u.gather(0, rows) < 0, -1.0, 1.0).to(u)
    return u * signs, v * signs.to(v)


@dataclass(frozen=True)
class Overlap:
    """How far two bases of the same size span the same space.

    Attributes:
        cosines: of the principal angles, descending; None where the cut of a basis is degenerate.
        overlap: mean squared cosine, 1 for the same space.
        chance: r / d, the expected overlap of random spaces.
    """

    cosines: tuple[float, ...] | None
    overlap: float
    chance: float


def basis_overlap(a: Tensor, b: Tensor, *, degenerate: bool = False) -> Overlap:
    """Compare two bases [d, r] (stability of a safety subspace under fine-tuning).

    Args:
        a: orthonormal columns.
        b: orthonormal columns, as many.
        degenerate: the cut of either basis is not unique: the angles are then meaningless and left
            out, the overlap is kept.
    """
    assert a.shape == b.shape, f"bases {tuple(a.shape)} and {tuple(b.shape)}"
    d, r = a.shape
    cosines = torch.linalg.svdvals(a.T.to(torch.float64) @ b.to(torch.float64)).clamp(max=1.0)
    return Overlap(
        cosines=None if degenerate else tuple(float(c) for c in cosines),
        overlap=float(cosines.square().mean()) if r else math.nan,
        chance=r / d,
    )


@dataclass(frozen=True)
class Isolation:
    """How much of a weight delta lies in a basis.

    Attributes:
        share: norm(U^T delta)^2 / norm(delta)^2; None for a zero delta.
        chance: r / d_out.
        excess: share / chance, 1 for a delta that ignores the basis; None for a zero delta.
    """

    share: float | None
    chance: float
    excess: float | None


def isolation(u: Tensor, delta: Tensor) -> Isolation:
    """Measure the share of `delta` [d_out, d_in] in the basis U [d_out, r] (claim of isolation)."""
    chance = u.shape[1] / u.shape[0]
    share = energy_share(u, delta)
    excess = share / chance if share is not None and chance > 0.0 else None
    return Isolation(share=share, chance=chance, excess=excess)
