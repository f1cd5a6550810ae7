"""The fast form of element-wise edits against the definition of the methods."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.repair import entries
from realign.repair.apply import Effect, apply_edit, unchanged_effect
from realign.repair.edit import Layer, Unchanged
from realign.repair.entries import EntryWork
from realign.repair.method import Method
from realign.repair.methods.resta import Resta
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.preparation import NO_STATISTICS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _work(method: Method, strength: float = 1.0) -> EntryWork:
    linear = method.linear_edit()
    assert linear is not None
    return EntryWork(linear, vector=method.vector_kind, strength=strength)


def _by_definition(
    method: Method, tensors: dict[str, torch.Tensor], strength: float
) -> tuple[torch.Tensor, Effect]:
    layer = Layer(key="w", module="w", layer=0, **tensors)
    edit = method.edit(layer, NO_STATISTICS)
    other = None if method.vector_kind is None else tensors[method.vector_kind]
    finetuned, aligned = tensors["finetuned"], tensors["aligned"]
    if isinstance(edit, Unchanged):
        return finetuned, unchanged_effect(finetuned, aligned=aligned, other=other)
    return apply_edit(finetuned, edit, strength=strength, aligned=aligned, other=other)


METHODS = (
    Resta(gamma=0.5, safety_vector="base"),
    Resta(gamma=1.0, safety_vector="unaligned"),
    WiseFt(a=0.3),
    WiseFt(a=1.0),
)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    strength=st.sampled_from((1.0, 0.7)),
    shape=st.sampled_from(((0,), (1,), (7,), (13, 5), (3, 4, 5))),
    types=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    seed=st.integers(0, 1000),
    equal=st.booleans(),
)
def test_the_fast_form_is_the_definition(
    method: Method,
    strength: float,
    shape: tuple[int, ...],
    types: tuple[torch.dtype, ...],
    seed: int,
    equal: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    roles = ["finetuned", "aligned"] + ([method.vector_kind] if method.vector_kind else [])
    tensors = {
        role: torch.randn(shape, generator=generator).to(dtype)
        for role, dtype in zip(roles, types, strict=False)
    }
    if equal:
        tensors = {role: tensors["aligned"].clone() for role in tensors}
    work = _work(method, strength)
    assert work.fits(tensors)
    kept, entries.BLOCK = entries.BLOCK, 8
    try:
        stored, edit, effect = work.edit(tensors)
    finally:
        entries.BLOCK = kept
    expected, figures = _by_definition(method, tensors, strength)
    assert stored.dtype == expected.dtype
    assert torch.equal(stored, expected)
    assert isinstance(edit, Unchanged) == (figures.max_edit == 0.0)
    for field in dataclasses.fields(Effect) if figures.numel else ():
        got, want = getattr(effect, field.name), getattr(figures, field.name)
        if field.name == "max_edit":
            assert (got == 0.0) == (want == 0.0) and got <= want * 1.0001
        else:
            assert got == want or got == pytest.approx(want, rel=1e-4, abs=1e-6), field.name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_sums_show_what_is_not_finite(method: Method, bad: float) -> None:
    roles = ["finetuned", "aligned"] + ([method.vector_kind] if method.vector_kind else [])
    for role in roles:
        tensors = {each: torch.randn(50).bfloat16() for each in roles}
        tensors[role][17] = bad
        assert not _work(method).edit(tensors)[2].is_finite
    assert _work(method).edit({each: torch.randn(50) for each in roles})[2].is_finite


def test_an_overflow_of_the_output_shows() -> None:
    half = {"finetuned": 6e4, "aligned": 6e4, "base": 0.0}
    tensors = {role: torch.full((9,), value, dtype=torch.float16) for role, value in half.items()}
    assert not _work(Resta(gamma=1.0, safety_vector="base")).edit(tensors)[2].is_finite


def test_what_it_leaves_to_the_definition() -> None:
    work = _work(Resta(safety_vector="base"))
    good = {role: torch.ones(3) for role in ("finetuned", "aligned", "base")}
    assert work.fits(good)
    assert not work.fits(good | {"base": torch.ones(3, dtype=torch.float64)})
    assert not work.fits({role: good[role] for role in ("finetuned", "aligned")})
    assert not work.fits(good | {"unaligned": torch.ones(3)})
