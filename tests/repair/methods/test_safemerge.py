"""SafeMERGE: hand example, both forms, with and without a safety model, and peft's linear trap."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.alignment_support import adapter_layer, named, safe_adapter, selected, whole
from support.subspace_support import KEY, edit_of, error, layer_of, matrix, repaired
from torch import Tensor

from realign.errors import UsageError
from realign.repair.edit import Dense, Layer, LoraFactors, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.safe_lora import SafeLora
from realign.repair.methods.safemerge import Safemerge
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.preparation import NO_STATISTICS

SHAPES = [(9, 9), (6, 14), (14, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES)
GIVEN = Safemerge(tau=2.0, safety_model="safety")
ALONE = Safemerge(tau=2.0, safety_model="aligned")


def with_safety_model(layer: Layer) -> Layer:
    shape = tuple(layer.finetuned.shape)
    safety = layer.require("aligned") + matrix(*shape, seed=9, scale=0.1).to(layer.finetuned)
    return dataclasses.replace(layer, safety=safety)


def hand() -> Layer:
    """B_f = e1, A_f = e1^T, B_s = e2, A_s = e2^T over Wa = 0, with V = I."""
    eye = torch.eye(2, dtype=torch.float64)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    own = LoraFactors(down=eye[:1], up=eye[:, :1], scale=1.0)
    safe = LoraFactors(down=eye[1:], up=eye[:, 1:], scale=1.0)
    return Layer(
        key=KEY,
        module="q_proj",
        layer=0,
        finetuned=own.up @ own.down,
        aligned=zero,
        base=-eye,
        safety=safe.up @ safe.down,
        lora=own,
        safety_lora=safe,
    )


@pytest.mark.parametrize("form", ["adapters", "full"])
def test_hand_example_and_the_trap_of_mixing_factors(form: str) -> None:
    layer = hand() if form == "adapters" else whole(hand())
    found = repaired(GIVEN, layer)
    assert torch.allclose(found, torch.diag(torch.tensor([0.8, 0.2], dtype=torch.float64)))
    own, safe = hand().lora, hand().safety_lora
    assert own is not None and safe is not None
    roots = math.sqrt(0.8), math.sqrt(0.2)
    up = roots[0] * own.up + roots[1] * safe.up
    down = roots[0] * own.down + roots[1] * safe.down
    trap = torch.tensor([[0.8, 0.4], [0.4, 0.2]], dtype=torch.float64)
    assert torch.allclose(up @ down, trap)  # what peft's "linear" makes of the same two adapters
    assert not torch.allclose(found, trap)


@shapes
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize("w", [0.0, 0.3, 0.8])
def test_the_full_form_is_the_weighted_mean(
    shape: tuple[int, int], dtype: torch.dtype, bound: float, w: float
) -> None:
    layer = with_safety_model(layer_of(shape, dtype=dtype))
    method = dataclasses.replace(GIVEN, w=w)
    f, s = layer.finetuned.double(), layer.require("safety").double()
    assert error(edit_of(method, layer), w * f + (1 - w) * s - f) <= bound
    if w == 0.0:
        assert torch.equal(repaired(method, layer), layer.require("safety"))


@shapes
@pytest.mark.parametrize(("own", "safe"), [((2, 1.5), (2, 1.5)), ((1, 4.0), (3, 0.25))])
def test_adapters_laid_side_by_side_are_the_dense_mix(
    shape: tuple[int, int], own: tuple[int, float], safe: tuple[int, float]
) -> None:
    layer = adapter_layer(shape, rank=own[0], scale=own[1])
    layer = safe_adapter(layer, rank=safe[0], scale=safe[1])
    for w in (0.2, 0.8):
        method = dataclasses.replace(GIVEN, w=w)
        expected = w * layer.finetuned + (1 - w) * layer.require("safety") - layer.finetuned
        found = edit_of(method, layer)
        assert error(found, expected) <= 1e-12
        assert error(edit_of(method, whole(layer)), found) <= 1e-12
        assert int(torch.linalg.matrix_rank(found, rtol=1e-9)) <= own[0] + safe[0]


def test_the_repaired_adapter_is_the_concatenation() -> None:
    layer = safe_adapter(adapter_layer((20, 30), rank=2, scale=1.5), rank=3, scale=0.5)
    edit = GIVEN.edit(layer, NO_STATISTICS)
    assert isinstance(edit, LowRank)
    own, safe = layer.lora, layer.safety_lora
    assert own is not None and safe is not None
    up = torch.cat([0.8 * own.scale * own.up, 0.2 * safe.scale * safe.up], dim=1)
    down = torch.cat([own.down, safe.down])
    aligned = layer.require("aligned")
    assert error(layer.finetuned + edit.dense(), aligned + up @ down) <= 1e-12
    assert edit.rank == 5


@shapes
@pytest.mark.parametrize("adapter", [False, True])
def test_without_a_safety_model_and_all_selected_it_is_wise_ft(
    shape: tuple[int, int], adapter: bool
) -> None:
    layer = adapter_layer(shape) if adapter else layer_of(shape)
    for w in (0.25, 0.8):
        found = edit_of(dataclasses.replace(ALONE, w=w), layer)
        assert error(found, edit_of(WiseFt(a=1 - w), layer)) <= 1e-12
    same = dataclasses.replace(layer, safety=layer.aligned)
    assert error(edit_of(GIVEN, same), edit_of(ALONE, layer)) <= 1e-12


def test_a_safety_model_that_leaves_a_module_alone_keeps_the_edit_of_an_adapter_low_rank() -> None:
    layer = adapter_layer((20, 30))
    edit = GIVEN.edit(dataclasses.replace(layer, safety=layer.aligned), NO_STATISTICS)
    assert isinstance(edit, LowRank)
    assert edit.rank == 2


def test_selection_is_that_of_safe_lora() -> None:
    every = [named(with_safety_model(layer_of((6, 9), seed=n)), n) for n in range(5)]
    cosines = sorted(SafeLora().score(each)["cosine"] for each in every)  # type: ignore[index]
    tau = (cosines[1] + cosines[2]) / 2
    method, other = Safemerge(tau=tau, safety_model="safety"), SafeLora(tau=tau)
    statistics = selected(method, every)
    assert statistics.selection == selected(other, every).selection
    assert len(statistics.selection or ()) == 2
    edits = {each.key: method.edit(each, statistics) for each in every}
    assert {k for k, e in edits.items() if not isinstance(e, Unchanged)} == statistics.selection
    backwards = selected(method, reversed(every))
    assert backwards.selection == statistics.selection


def test_what_is_no_edit() -> None:
    for method in (Safemerge(tau=0.0), Safemerge(w=1.0)):
        with pytest.raises(UsageError, match="would change nothing"):
            method.check_settings()
    Safemerge().check_settings()
    layer = with_safety_model(layer_of((6, 6)))
    assert dataclasses.replace(GIVEN, w=1.0).edit(layer, NO_STATISTICS) == Unchanged("w is 1")
    zero = Safemerge(tau=0.0, safety_model="safety")
    assert isinstance(zero.edit(layer, selected(zero, [layer])), Unchanged)
    agreed = dataclasses.replace(layer, safety=layer.finetuned)
    assert isinstance(GIVEN.edit(agreed, NO_STATISTICS), Unchanged)


@pytest.mark.parametrize("method", [GIVEN, ALONE])
def test_a_zero_vector_is_not_a_cosine_of_zero(method: Safemerge) -> None:
    """It would always be merged: there is nothing below any threshold here."""
    layer = with_safety_model(layer_of((6, 6)))
    untouched = dataclasses.replace(layer, base=layer.aligned)
    reason = Unchanged("alignment did not touch this tensor")
    assert method.edit(untouched, selected(method, [untouched])) == reason
    assert method.edit(untouched, NO_STATISTICS) == reason
    still = dataclasses.replace(layer, finetuned=layer.aligned)
    for statistics in (NO_STATISTICS, selected(method, [still])):
        assert method.edit(still, statistics) == Unchanged("task vector is zero")


def test_the_safety_model_is_used_if_it_is_given_and_its_absence_said() -> None:
    roles = frozenset({"aligned", "base"})
    alone = Safemerge().settled(Given(roles))
    assert alone.method.settings()["safety_model"] == "aligned"
    assert "safety_model = aligned" in alone.note
    assert alone.method.required_roles() == roles
    given = Safemerge().settled(Given(roles | {"safety"}))
    assert given.method.settings()["safety_model"] == "safety"
    assert given.note == ""
    assert given.method.required_roles() == roles | {"safety"}
    chosen = Safemerge(safety_model="aligned").settled(Given(roles | {"safety"}))
    assert chosen.method.required_roles() == roles
    assert chosen.note == ""
    with pytest.raises(UsageError) as caught:
        Safemerge(safety_model="safety").settled(Given(roles))
    assert "--safety-model" in caught.value.hint
    for bad in ({"w": 1.1}, {"w": -0.1}, {"tau": -1.0}):
        with pytest.raises(UsageError):
            Safemerge(**bad)


def test_the_mix_is_taken_on_products_in_single_precision() -> None:
    layer = with_safety_model(layer_of((8, 8), dtype=torch.bfloat16))
    f, s = layer.finetuned, layer.require("safety")
    expected = 0.2 * (s.double() - f.double())
    trap: Tensor = (s - f) * 0.2  # in 16 bits
    assert error(edit_of(GIVEN, layer), expected) <= 1e-6
    assert error(trap, expected) > 1e-4
    assert isinstance(GIVEN.edit(layer, NO_STATISTICS), Dense)
