"""Row-wise integer quantisation: the hand example, its bounds, what may receive gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from realign.subspace.quantiser import (
    clip_factors,
    codes_of,
    decode,
    quantise,
    row_grid,
    settled_smoothing,
    smoothing,
    straight_round,
)

ROW = torch.tensor([[-1.0, 0.0, 1.0, 2.0]], dtype=torch.float64)


def drawn(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize(("factor", "expected"), [(1.0, (-1, 0, 1, 2)), (0.5, (-0.5, 0, 1, 1))])
def test_the_hand_example(factor: float, expected: tuple[float, ...]) -> None:
    found = quantise(ROW, high=factor, low=factor, bits=2)
    assert found.tolist() == [list(expected)]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 6),
    columns=st.integers(1, 9),
    bits=st.sampled_from([2, 4, 8, 16]),
)
def test_without_clipping_no_entry_moves_by_more_than_a_step(
    seed: int, rows: int, columns: int, bits: int
) -> None:
    weight = drawn(seed, rows, columns)
    grid = row_grid(weight, high=1.0, low=1.0, bits=bits)
    found = quantise(weight, high=1.0, low=1.0, bits=bits)
    assert ((found - weight).abs() <= grid.step * (1 + 1e-9)).all()
    codes = codes_of(weight, grid)
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert torch.equal(decode(codes, grid), found)


def test_smoothing_cancels_but_for_rounding() -> None:
    weight, v = drawn(0, 5, 7), torch.linspace(0.1, 4.0, 7).double()
    plain, smoothed = (
        quantise(weight, high=1.0, low=1.0, bits=16, smooth=each) for each in (None, v)
    )
    step = row_grid(weight * v, high=1.0, low=1.0, bits=16).step
    assert ((smoothed - weight).abs() <= step / v * (1 + 1e-9)).all()
    assert not torch.equal(plain, smoothed)


@pytest.mark.parametrize("row", [(0.0, 0.0, 0.0), (1.0, 2.0, 3.0), (-3.0, -2.0, -0.5)])
def test_a_row_without_a_sign_change_keeps_zero_as_a_code(row: tuple[float, ...]) -> None:
    weight = torch.tensor([row], dtype=torch.float64)
    grid = row_grid(weight, high=1.0, low=1.0, bits=8)
    assert 0 <= grid.zero.item() <= 255
    found = quantise(weight, high=1.0, low=1.0, bits=8)
    assert torch.isfinite(found).all() and (found - weight).abs().max() <= grid.step.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_are_numbers_of_the_file(dtype: torch.dtype) -> None:
    grid = row_grid(drawn(1, 9, 33).float(), high=0.97, low=0.95, bits=8, dtype=dtype)
    assert torch.equal(grid.step, grid.step.to(dtype).float())


def test_rounding_passes_gradients_straight_through() -> None:
    value = torch.tensor([0.4, 1.6, -2.5], requires_grad=True)
    rounded = straight_round(value)
    assert rounded.tolist() == [0.0, 2.0, -2.0]
    rounded.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert value.grad is not None and value.grad.tolist() == [1.0, 2.0, 3.0]


def test_gradients_reach_clip_factors_and_smoothing() -> None:
    weight = drawn(2, 4, 6)
    g, h = (torch.full((4,), 4.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.ones(6, dtype=torch.float64, requires_grad=True)
    found = quantise(weight, high=clip_factors(g), low=clip_factors(h), bits=3, smooth=v)
    (found - weight).square().sum().backward()
    for each in (g, h, v):
        assert each.grad is not None and each.grad.abs().max() > 0
    assert clip_factors(g)[0, 0].item() == pytest.approx(0.982, abs=5e-4)


def test_smoothing_starts_at_the_balance_of_both_ranges() -> None:
    found = smoothing(torch.tensor([4.0, 9.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 1.0, 0.0]))
    assert found.tolist() == [2.0, 1.5, 1.0, 1.0]


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_settled_smoothing_is_exact_in_a_norm_of_the_file(offset: float) -> None:
    gain = drawn(3, 1, 40)[0].float().abs() + 0.1
    wanted = torch.linspace(0.3, 5.0, 40)
    found = settled_smoothing(wanted, gain, torch.bfloat16, offset=offset)
    stored = (gain / found - offset).to(torch.bfloat16)
    assert torch.allclose(stored.float() + offset, gain / found, rtol=1e-6, atol=1e-6)
    assert torch.allclose(found, wanted, rtol=0.02 if offset == 0 else 0.1)
    # a channel that the norm shuts off can carry any v
    assert settled_smoothing(wanted[:1], torch.zeros(1), torch.bfloat16).tolist() == [wanted[0]]
