from __future__ import annotations

import torch
from support.subspace_support import matrix

from realign.subspace.null import random_basis, random_triplets
from realign.subspace.spectrum import top_triplets


def test_random_directions_are_orthonormal_reproducible_and_keyed() -> None:
    one = random_basis(12, 4, seed=0, key="a", role="left")
    assert torch.allclose(one.T @ one, torch.eye(4, dtype=torch.float64), atol=1e-14)
    assert torch.equal(one, random_basis(12, 4, seed=0, key="a", role="left"))
    others = [
        random_basis(12, 4, seed=1, key="a", role="left"),
        random_basis(12, 4, seed=0, key="b", role="left"),
        random_basis(12, 4, seed=0, key="a", role="right"),
    ]
    assert all(not torch.allclose(one, other) for other in others)


def test_random_directions_have_no_preferred_half_space() -> None:
    signs = [float(random_basis(3, 1, seed=s, key="a", role="left")[0, 0] > 0) for s in range(400)]
    assert 0.4 < sum(signs) / 400 < 0.6


def test_null_triplets_keep_the_singular_values_and_nothing_else() -> None:
    found = top_triplets(matrix(40, 60, seed=1), 5)
    null = random_triplets(found, seed=0, key="a")
    assert torch.equal(null.s, found.s)
    assert null.u.shape == found.u.shape
    assert null.v.shape == found.v.shape
    assert float((null.u.T @ found.u).square().sum()) / 5 < 0.5
