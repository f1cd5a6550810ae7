from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.subspace.vectors import difference, inner, squared_norm


def test_bf16_difference_is_exact_because_it_is_upcast_first() -> None:
    a = torch.tensor([1.0, 256.0], dtype=torch.bfloat16)
    b = torch.tensor([2.0**-9, 1.0078125], dtype=torch.bfloat16)
    assert difference(a, b).tolist() == [1.0 - 2.0**-9, 256.0 - 1.0078125]
    assert (a - b).float().tolist() != difference(a, b).tolist()


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtype_and_inputs_untouched(
    left: torch.dtype, right: torch.dtype, expected: torch.dtype
) -> None:
    a, b = torch.full((2, 3), 3.0, dtype=left), torch.full((2, 3), 1.0, dtype=right)
    out = difference(a, b)
    assert out.dtype == expected
    out.mul_(0)
    assert bool((a == 3).all())
    assert bool((b == 1).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_inner_product_accumulates_in_float64(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(7, 5, generator=g), torch.randn(7, 5, generator=g)
    assert inner(a, b) == pytest.approx(
        float((a.double() * b.double()).sum()), rel=1e-12, abs=1e-14
    )
    assert squared_norm(a) == pytest.approx(float(a.double().norm()) ** 2, rel=1e-13)


def test_small_terms_survive_a_large_sum() -> None:
    a = torch.cat([torch.tensor([2.0**13]), torch.ones(1000)])
    assert squared_norm(a) == 2.0**26 + 1000
