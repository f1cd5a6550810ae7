"""Concrete masks: when they pass one half, their gradients, what stands for them; TIES and cuts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from realign.subspace.concrete import concrete, factor, hard
from realign.subspace.merging import average, magnitude_at, task_arithmetic, ties


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(
    x=st.floats(-30, 30),
    u=st.floats(1e-9, 1 - 1e-9),
    tau=st.sampled_from([0.1, 0.5, 1.0, 3.0]),
)
def test_above_one_half_exactly_where_u_says_so(x: float, u: float, tau: float) -> None:
    border = 1 / (1 + math.exp(x))  # sigmoid(-x)
    if abs(u - border) > 1e-12:
        assert (float(concrete(vector(x), vector(u), tau)) > 0.5) == (u > border)


@pytest.mark.parametrize("tau", [0.25, 0.5, 2.0])
def test_the_share_above_one_half_is_sigmoid_of_the_logit(tau: float) -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for x in (-2.0, 0.0, 1.0):
        share = float((concrete(torch.full_like(u, x), u, tau) > 0.5).double().mean())
        assert share == pytest.approx(1 / (1 + math.exp(-x)), abs=4e-3)


def test_draws_at_the_ends_of_the_interval_are_finite() -> None:
    x = torch.zeros(2, requires_grad=True)
    mask = concrete(x, torch.tensor([0.0, 1.0]), 0.5)
    mask.sum().backward()
    assert mask.tolist() == [0.0, 1.0]
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(3, 4), (3, 1)])
def test_gradients_are_finite_differences_mean_included(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
    u = torch.rand(shape, generator=draw, dtype=torch.float64)
    delta = torch.randn(3, 4, generator=draw, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=draw, dtype=torch.float64)

    def loss(logits: Tensor) -> Tensor:
        fused = weight + factor(concrete(logits, u, 0.5)) * delta
        return (fused**3).sum()

    assert torch.autograd.gradcheck(loss, (x,), eps=1e-6, atol=1e-6)
    # The mean's own part matters: without it the gradient is another one.
    (whole,) = torch.autograd.grad(loss(x), x)
    mask = concrete(x, u, 0.5)
    partial = weight + mask / mask.mean().detach() * delta
    (without,) = torch.autograd.grad((partial**3).sum(), x)
    assert float((whole - without).norm()) > 0.1 * float(whole.norm())


def test_hand_example() -> None:
    x, delta = vector(2, -2, 0, 5), vector(4, -2, 1, 3)
    assert torch.allclose(factor(hard(x)) * delta, vector(16 / 3, 0, 4 / 3, 4))
    soft = torch.sigmoid(x)
    assert float(soft.mean()) == pytest.approx(0.623327, abs=5e-7)
    expected = vector(5.652233, -0.382473, 0.802147, 4.780673)
    assert torch.allclose(factor(soft) * delta, expected, atol=5e-7)


def test_thresholds_and_no_rescale() -> None:
    x = vector(-3, -1, 0, 1, 3)
    assert hard(x, 0.8).tolist() == [0, 0, 0, 0, 1]
    assert hard(x, 0.2).tolist() == [0, 1, 1, 1, 1]
    assert factor(hard(x), rescale=False).tolist() == [0, 0, 1, 1, 1]
    assert factor(hard(x - 9)).tolist() == [0, 0, 0, 0, 0]


def test_ties_by_hand() -> None:
    vectors = [vector(3, -1, 0.5, 0), vector(-2, -4, 0.4, 0.1)]
    cuts = [magnitude_at(0.5, lambda each=each: [each]) for each in vectors]
    assert cuts == [1.0, 2.0]
    assert torch.allclose(ties(vectors, 0.4, cuts), vector(1.2, -2, 0, 0))


@given(seed=st.integers(0, 10_000), count=st.integers(2, 4))
def test_the_order_of_tasks_does_not_matter(seed: int, count: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(5, 3, generator=draw) for _ in range(count)]
    cuts = [magnitude_at(0.4, lambda each=each: [each]) for each in vectors]
    order = torch.randperm(count, generator=draw).tolist()
    turned, turned_cuts = [vectors[i] for i in order], [cuts[i] for i in order]
    assert torch.equal(task_arithmetic(vectors, 0.3), task_arithmetic(turned, 0.3))
    assert torch.equal(average(vectors), average(turned))
    assert torch.equal(ties(vectors, 0.4, cuts), ties(turned, 0.4, turned_cuts))


@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=60),
    share=st.floats(0.01, 1.0),
    parts=st.integers(1, 5),
)
def test_the_cut_is_the_one_of_a_sorted_list(values: list[float], share: float, parts: int) -> None:
    whole = torch.tensor(values, dtype=torch.float32)
    count = math.ceil(share * len(values) - 1e-9)
    expected = float(whole.abs().sort(descending=True).values[count - 1])
    assert magnitude_at(share, lambda: whole.chunk(parts)) == expected
