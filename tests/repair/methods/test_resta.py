from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import edit_of, error, layer_of, repaired

from realign.repair.edit import Layer, Unchanged
from realign.repair.methods.resta import Resta
from realign.repair.preparation import NO_STATISTICS


@pytest.mark.parametrize("kind", ["base", "unaligned"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_adds_a_multiple_of_the_safety_vector(kind: str, dtype: torch.dtype, bound: float) -> None:
    layer = layer_of((5, 7), seed=1, dtype=dtype)
    other = layer.base if kind == "base" else layer.unaligned
    assert layer.aligned is not None
    assert other is not None
    expected = 0.3 * (layer.aligned.double() - other.double())
    assert error(edit_of(Resta(gamma=0.3, safety_vector=kind), layer), expected) <= bound


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 5), st.integers(0, 100))
def test_linear_in_gamma(gamma: float, seed: int) -> None:
    layer = layer_of((4, 6), seed=seed)
    one = edit_of(Resta(gamma=1.0, safety_vector="base"), layer)
    found = edit_of(Resta(gamma=gamma, safety_vector="base"), layer)
    assert torch.allclose(found, gamma * one, rtol=1e-14)


def test_adding_then_subtracting_restores_the_fine_tune() -> None:
    layer = layer_of((6, 6), seed=2, dtype=torch.float32)
    method = Resta(gamma=0.7, safety_vector="base")
    there = repaired(method, layer)
    swapped = dataclasses.replace(
        layer, finetuned=there, aligned=layer.base, base=layer.aligned
    )  # the same vector with the other sign
    back = repaired(method, swapped)
    assert float((back - layer.finetuned).abs().max()) <= 2e-7 * float(there.abs().max())
    assert not torch.equal(there, layer.finetuned)


def test_with_the_aligned_model_itself_it_extrapolates_alignment() -> None:
    layer = layer_of((4, 5), seed=3)
    assert layer.aligned is not None
    assert layer.base is not None
    same = dataclasses.replace(layer, finetuned=layer.aligned)
    found = repaired(Resta(gamma=1.0, safety_vector="base"), same)
    assert torch.allclose(found, 2 * layer.aligned - layer.base, rtol=1e-14)


def test_gamma_zero_and_zero_vector_are_no_edits() -> None:
    layer = layer_of((3, 3))
    assert Resta(gamma=0.0, safety_vector="base").edit(layer, NO_STATISTICS) == Unchanged(
        "gamma is 0"
    )
    same = dataclasses.replace(layer, base=layer.aligned)
    assert Resta(safety_vector="base").edit(same, NO_STATISTICS) == Unchanged(
        "safety vector is zero"
    )


@pytest.mark.parametrize("shape", [(11,), (3, 4, 5)])
def test_any_shape_and_any_chunk_of_rows(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=g) for _ in range(3)]

    def layer(rows: slice) -> Layer:
        f, a, b = (w[rows] for w in weights)
        return Layer(key="norm", module="norm", layer=None, finetuned=f, aligned=a, base=b)

    method = Resta(safety_vector="base")
    whole = edit_of(method, layer(slice(None)))
    parts = [edit_of(method, layer(slice(0, 1))), edit_of(method, layer(slice(1, None)))]
    assert torch.equal(torch.cat(parts), whole)
