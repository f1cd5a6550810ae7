"""Random projections against the full decomposition, where there is a gap at k."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.subspace_support import error, matrix
from torch import Tensor

from realign.subspace.randomised import randomised_triplets


def with_gap(shape: tuple[int, int], *, k: int) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix(*shape, seed=1), full_matrices=False)
    s = torch.cat([torch.linspace(2, 1, k).double(), torch.linspace(0.5, 0.1, len(u.T) - k)])
    return (u * s) @ vh


@pytest.mark.parametrize("shape", [(40, 40), (30, 70), (70, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_truncation_agrees_across_a_gap(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m = with_gap(shape, k=5)
    found = randomised_triplets(m.to(dtype), 5, generator=np.random.default_rng(0))
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    exact = (u[:, :5] * s[:5]) @ vh[:5]
    assert error((found.u * found.s) @ found.v.T, exact) <= 1e-4
    assert torch.allclose(found.s, s[:5], rtol=1e-6)
    eye = torch.eye(5, dtype=torch.float64)
    assert torch.allclose(found.u.T @ found.u, eye, atol=1e-5)
    assert torch.allclose(found.v.T @ found.v, eye, atol=1e-12)


def test_more_triples_than_there_are() -> None:
    m = matrix(4, 9, seed=2)
    found = randomised_triplets(m, 20, generator=np.random.default_rng(0))
    assert found.u.shape == (4, 4)
    assert error((found.u * found.s) @ found.v.T, m) <= 1e-12


def test_the_same_generator_gives_the_same_triples() -> None:
    m = matrix(20, 30, seed=3)
    one, two, other = (
        randomised_triplets(m, 3, generator=np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one.u, two.u)
    assert not torch.equal(one.u, other.u)
