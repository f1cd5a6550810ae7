from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import edit_of, layer_of, repaired

from realign.errors import UsageError
from realign.repair.edit import Dense, Layer, Unchanged
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.preparation import NO_STATISTICS


def test_hand_example() -> None:
    one = Layer(
        key="w",
        module="w",
        layer=None,
        finetuned=torch.tensor([3.0]),
        aligned=torch.tensor([1.0]),
    )
    assert repaired(WiseFt(a=0.25), one).tolist() == [2.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_one_is_the_aligned_weight_bit_for_bit(dtype: torch.dtype) -> None:
    layer = layer_of((6, 5), seed=1, dtype=dtype)
    assert layer.aligned is not None
    edit = WiseFt(a=1.0).edit(layer, NO_STATISTICS)
    assert isinstance(edit, Dense)
    assert edit.target is not None
    assert torch.equal(edit.target, layer.aligned)
    expected = layer.aligned.double() - layer.finetuned.double()
    assert torch.allclose(edit.delta.double(), expected, rtol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 100))
def test_twice_once_linear_and_mirrored(a: float, seed: int) -> None:
    layer = layer_of((4, 6), seed=seed)
    assert layer.aligned is not None
    once = repaired(WiseFt(a=a), layer)
    expected = (1 - a) * layer.finetuned + a * layer.aligned
    assert torch.allclose(once, expected, rtol=0, atol=1e-14)
    twice = repaired(WiseFt(a=a), dataclasses.replace(layer, finetuned=once))
    direct = repaired(WiseFt(a=1 - (1 - a) ** 2), layer)
    assert torch.allclose(twice, direct, rtol=0, atol=1e-14)
    full = edit_of(WiseFt(a=1.0), layer)
    assert torch.allclose(edit_of(WiseFt(a=a), layer), a * full, rtol=1e-14)
    mirrored = dataclasses.replace(layer, finetuned=layer.aligned, aligned=layer.finetuned)
    assert torch.allclose(repaired(WiseFt(a=1 - a), mirrored), once, rtol=0, atol=1e-14)


def test_to_stay_is_no_run_and_to_go_all_the_way_is_one() -> None:
    with pytest.raises(UsageError, match="a = 0 is the fine-tune itself"):
        WiseFt(a=0.0).check_settings()
    WiseFt(a=1.0).check_settings()


def test_no_edits() -> None:
    layer = layer_of((3, 3))
    assert WiseFt(a=0.0).edit(layer, NO_STATISTICS) == Unchanged("a is 0")
    new = dataclasses.replace(layer, aligned=None)
    assert WiseFt().edit(new, NO_STATISTICS) == Unchanged("absent from the aligned model")
    same = dataclasses.replace(layer, finetuned=layer.aligned)
    assert WiseFt().edit(same, NO_STATISTICS) == Unchanged("task vector is zero")
