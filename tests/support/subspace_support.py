"""Plain float64 references for subspace and method tests: full SVDs, dense projectors, loops."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from realign.model.moments import Moments
from realign.repair.edit import Dense, Edit, Layer, LowRank, Unchanged
from realign.repair.method import Method
from realign.repair.preparation import NO_STATISTICS, Statistics

KEY = "model.layers.0.self_attn.q_proj.weight"


def matrix(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def layer_of(shape: tuple[int, int], *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Layer:
    """Four related random weights: base, aligned, unaligned, fine-tuned."""
    base = matrix(*shape, seed=seed)
    aligned = base + matrix(*shape, seed=seed + 1, scale=0.1)
    unaligned = aligned + matrix(*shape, seed=seed + 2, scale=0.1)
    finetuned = aligned + matrix(*shape, seed=seed + 3, scale=0.1)
    return Layer(
        key=KEY,
        module="q_proj",
        layer=0,
        finetuned=finetuned.to(dtype),
        aligned=aligned.to(dtype),
        base=base.to(dtype),
        unaligned=unaligned.to(dtype),
    )


def with_safety(delta_safe: Tensor, drift: Tensor | None = None) -> Layer:
    """A layer with a given safety vector under both definitions and drift D = Wa - Wf."""
    aligned = torch.zeros_like(delta_safe)
    finetuned = aligned - (torch.ones_like(aligned) if drift is None else drift)
    return Layer(
        key=KEY,
        module="q_proj",
        layer=0,
        finetuned=finetuned,
        aligned=aligned,
        base=aligned - delta_safe,
        unaligned=aligned - delta_safe,
    )


def full(edit: Edit) -> Tensor:
    """The edit as a dense matrix."""
    assert not isinstance(edit, Unchanged), edit
    assert isinstance(edit, LowRank | Dense)
    return edit.dense()


def edit_of(method: Method, layer: Layer, statistics: Statistics = NO_STATISTICS) -> Tensor:
    return full(method.edit(layer, statistics))


def repaired(method: Method, layer: Layer, statistics: Statistics = NO_STATISTICS) -> Tensor:
    """W' as the engine would write it at strength 1."""
    edit = method.edit(layer, statistics)
    if isinstance(edit, Unchanged):
        return layer.finetuned.clone()
    if isinstance(edit, Dense) and edit.target is not None:
        return edit.target.clone()
    return (layer.finetuned.to(edit.dense()) + edit.dense()).to(layer.finetuned.dtype)


def error(found: Tensor, expected: Tensor) -> float:
    """Relative Frobenius error."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


# ---- activations -------------------------------------------------------------------------------


def input_moments(x: Tensor) -> Moments:
    return Moments(x.shape[1], x.sum(1), x @ x.T, "input")


def output_moments(z: Tensor) -> Moments:
    return Moments(z.shape[1], z.sum(1), z @ z.T, "output")


def token_moments(z: Tensor) -> Moments:
    zs = standardised(z, "token")
    return Moments(z.shape[1], zs.sum(1), zs @ zs.T, "token")


def given(moments: Moments) -> Statistics:
    return Statistics({KEY: moments})


def standardised(z: Tensor, how: str) -> Tensor:
    """Z~ [d_out, N] by the definition, entry by entry."""
    if how == "none":
        return z
    axis = 1 if how == "neuron" else 0
    mean = z.mean(axis, keepdim=True)
    std = z.std(axis, keepdim=True, correction=0)
    floor = 1e-6 * std.max() if how == "neuron" else 0.0
    return torch.where(std > floor, (z - mean) / torch.where(std > floor, std, 1.0), 0.0)


# ---- ranks by definition -----------------------------------------------------------------------


def entropy_rank_by_loop(energies: list[float], eta: float) -> int:
    total = math.fsum(energies)
    terms = [-(e / total) * math.log(e / total) if e > 0 else 0.0 for e in energies]
    whole = math.fsum(terms)
    for rho in range(1, len(energies) + 1):
        if whole > 0 and math.fsum(terms[:rho]) / whole > eta:
            return rho
    return sum(e > 0 for e in energies)


def energy_rank_by_loop(energies: list[float], eta: float) -> int:
    total = math.fsum(energies)
    for rho in range(1, len(energies) + 1):
        if math.fsum(energies[:rho]) / total >= eta:
            return rho
    return len(energies)


# ---- dense LSSF --------------------------------------------------------------------------------


def dense_lssf(
    z: Tensor, delta_safe: Tensor, *, standardize: str, eta: float, alpha1: float, alpha: float
) -> tuple[int, Tensor, Tensor]:
    """Rank, P' and the edit by a full SVD of Z~ and multiplied-out matrices (numpy, float64)."""
    u, s, _ = np.linalg.svd(standardised(z, standardize).numpy(), full_matrices=True)
    r = entropy_rank_by_loop([float(x) for x in s**2], eta)
    if eta >= 1:
        r = int((s > s[0] * 1e-7).sum())
    if r == 1:
        weights = [alpha1]
    elif s[0] - s[r - 1] <= 1e-6 * s[0]:
        weights = [1.0] * r
    else:
        weights = [1 + (alpha1 - 1) * (s[i] - s[r - 1]) / (s[0] - s[r - 1]) for i in range(r)]
    scaled = u[:, :r] * np.array(weights)
    p = torch.from_numpy(scaled @ scaled.T)
    return r, p, alpha * p @ delta_safe


def dense_svd_edit(delta: Tensor, r: int, weights: list[float] | None = None) -> Tensor:
    """sum_{i <= r} w_i S_i u_i v_i^T by a full float64 SVD."""
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    w = torch.tensor(weights or [1.0] * r, dtype=torch.float64)
    return (u[:, :r] * (w * s[:r])) @ vt[:r]


def dense_replace(layer: Layer, k: int, side: str) -> Tensor:
    """P D + D Q - P D Q with the projectors formed, by a full float64 SVD."""
    assert layer.aligned is not None
    assert layer.base is not None
    aligned = layer.aligned.double()
    drift = aligned - layer.finetuned.double()
    u, _, vt = torch.linalg.svd(aligned - layer.base.double(), full_matrices=False)
    p, q = u[:, :k] @ u[:, :k].T, vt[:k].T @ vt[:k]
    if side == "left":
        return p @ drift
    if side == "right":
        return drift @ q
    return p @ drift + drift @ q - p @ drift @ q
