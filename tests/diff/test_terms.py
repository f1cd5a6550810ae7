"""Sums of two tensors: what must hold for any of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.diff_support import dense, oracle
from torch import Tensor

from realign.diff.terms import Meter, Terms

FLOATS = st.floats(min_value=-100, max_value=100, width=16)
TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    n = draw(st.integers(1, 60))
    values = st.lists(FLOATS, min_size=n, max_size=n)
    dtype, other = draw(st.sampled_from(TYPES)), draw(st.sampled_from(TYPES))
    a, b = torch.tensor(draw(values)).to(dtype), torch.tensor(draw(values)).to(other)
    return a, b


@settings(deadline=None)
@given(pairs(), st.integers(0, 60))
def test_terms_are_the_dense_sums_and_add_up_over_any_cut(
    pair: tuple[Tensor, Tensor], cut: int
) -> None:
    a, b = pair
    meter = Meter()
    whole = meter.measure(a, b)
    parts = meter.measure(a[:cut], b[:cut]) + meter.measure(a[cut:], b[cut:])
    x, y = dense(a), dense(b)
    size = float(np.abs(x) @ np.abs(y)) + 1e-300
    for found in (whole, parts):
        assert found.a == pytest.approx(x @ x, rel=1e-12)
        assert found.b == pytest.approx(y @ y, rel=1e-12)
        assert found.delta == pytest.approx((y - x) @ (y - x), rel=1e-12)
        assert abs(found.inner - float(x @ y)) <= 1e-12 * size
        assert found.largest == np.abs(y - x).max()
    assert whole.changed == parts.changed >= np.count_nonzero(x != y)


@settings(deadline=None)
@given(pairs())
def test_swapping_and_equality(pair: tuple[Tensor, Tensor]) -> None:
    a, b = pair
    meter = Meter()
    there, back = meter.measure(a, b), meter.measure(b, a)
    assert (there.a, there.b, there.delta, there.inner) == (back.b, back.a, back.delta, back.inner)
    same = meter.measure(a, a.clone())
    assert (same.changed, same.delta, same.largest) == (0, 0.0, 0.0)
    assert same.figures().relative == 0.0
    assert same.figures().cosine == (1.0 if bool(a.any()) else None)


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 3 * 2**16 + 5])
def test_blocks_meet_without_gap(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    a = torch.randn(n, generator=generator).bfloat16()
    b, r = (a + 0.01 * torch.randn(n, generator=generator) for _ in range(2))
    found = Meter().measure(a, b, r)
    x, y, z = dense(a), dense(b), dense(r)
    figures = found.figures()
    for name, value in oracle(x, y).items():
        assert getattr(figures, name) == pytest.approx(value, rel=1e-12), name
    cosine = (y - x) @ (x - z) / (np.linalg.norm(y - x) * np.linalg.norm(x - z))
    assert figures.cosine_reference == pytest.approx(cosine, rel=1e-12)


def test_every_stored_type_is_measured() -> None:
    for dtype in (torch.int64, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
                  torch.bool, torch.complex64):  # fmt: skip
        a, b = torch.tensor([1, 0, 1]).to(dtype), torch.tensor([1, 1, 1]).to(dtype)
        found = Meter().measure(a, b)
        assert (found.entries, found.changed, found.delta, found.a) == (3, 1, 1.0, 2.0), dtype


def test_what_has_no_value_is_none() -> None:
    assert Terms().figures().relative == 0.0 and Terms().figures().cosine is None
    zero, one = torch.zeros(3), torch.ones(3)
    figures = Meter().measure(zero, one).figures()
    assert (figures.relative, figures.cosine, figures.norm_delta) == (None, None, math.sqrt(3))
    bad = Meter().measure(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 2.0]))
    assert not bad.finite and bad.changed == 1
    assert bad.figures().norm_delta is None and bad.figures().largest is None
