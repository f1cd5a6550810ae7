"""Random directions in the place of found ones: the null control of every subspace claim.

Drawn on the CPU from a generator keyed by (seed, key, role), so that the draw depends neither on
the order of tensors nor on device or thread count.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from realign.subspace.spectrum import Triplets


def random_basis(dimension: int, k: int, *, seed: int, key: str, role: str) -> Tensor:
    """Return k orthonormal columns [dimension, k], float64 on the CPU, uniformly distributed.

    Args:
        dimension: length of a direction.
        k: number of directions, at most `dimension`.
        seed: of the whole experiment.
        key: of the matrix.
        role: what the directions stand for, as "left".
    """
    assert 0 <= k <= dimension, f"{k} directions in {dimension} dimensions"
    digest = hashlib.sha256(f"{seed}\0{key}\0{role}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    gaussian = torch.randn(dimension, k, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(gaussian)
    # QR alone is uniform only up to the signs that the algorithm prefers.
    return basis * torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(basis)


def random_triplets(triplets: Triplets, *, seed: int, key: str) -> Triplets:
    """Return triples with the same singular values and random directions on both sides."""
    k = triplets.s.numel()
    device = triplets.s.device
    u, v = (
        random_basis(side.shape[0], min(k, side.shape[1]), seed=seed, key=key, role=role).to(device)
        for side, role in ((triplets.u, "left"), (triplets.v, "right"))
    )
    return Triplets(u=u, s=triplets.s, v=v)
