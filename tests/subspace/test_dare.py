"""Drop and rescale: what is kept, what it becomes, and that chunks do not matter."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import matrix
from torch import Tensor

from realign.subspace.dare import kept_entries, rescale_kept


def kept(like: Tensor, rate: float, *, seed: int = 0, start: int = 0) -> Tensor:
    return kept_entries(like, rate, seed=seed, method="resta", key="w", role="task", start=start)


def test_a_rate_of_zero_is_the_identity() -> None:
    delta = matrix(5, 7, seed=1)
    assert torch.equal(rescale_kept(delta, kept(delta, 0.0), 0.0), delta)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.9])
def test_kept_entries_are_exactly_enlarged_and_the_others_zero(rate: float) -> None:
    delta = matrix(40, 50, seed=1)
    there = kept(delta, rate)
    found = rescale_kept(delta, there, rate)
    assert torch.equal(found[there], delta[there] / (1.0 - rate))
    assert not bool(found[~there].any())
    sigma = math.sqrt(rate * (1 - rate) / delta.numel())
    assert abs(float(there.double().mean()) - (1 - rate)) <= 5 * sigma


def test_the_mean_over_many_seeds_tends_to_the_difference() -> None:
    delta, rate, seeds = matrix(6, 5, seed=1), 0.3, 1000
    total = sum(rescale_kept(delta, kept(delta, rate, seed=s), rate) for s in range(seeds))
    assert isinstance(total, Tensor)
    spread = delta.abs() * math.sqrt(rate / (1 - rate) / seeds)
    assert bool(((total / seeds - delta).abs() <= 5 * spread).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60))
def test_the_mask_does_not_depend_on_chunks(one: int, two: int) -> None:
    flat = torch.zeros(60)
    first, second = sorted((one, two))
    parts = [(0, first), (first, second), (second, 60)]
    found = torch.cat([kept(flat[a:b], 0.4, start=a) for a, b in parts])
    assert torch.equal(found, kept(flat, 0.4))


def test_every_seed_tensor_and_role_draws_its_own_mask() -> None:
    like = torch.zeros(400)
    masks = [
        kept_entries(like, 0.5, seed=seed, method="resta", key=key, role=role)
        for seed in (0, 1)
        for key in ("a", "b")
        for role in ("task", "safety")
    ]
    agreement = [float((m == n).double().mean()) for i, m in enumerate(masks) for n in masks[:i]]
    assert all(0.35 < share < 0.65 for share in agreement)
