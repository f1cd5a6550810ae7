"""Safe LoRA: hand example, both forms, selection, and what the public code gets wrong."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from support.alignment_support import (
    adapter_layer,
    dense_filter,
    dense_safe_lora,
    named,
    orthogonal,
    selected,
    whole,
)
from support.subspace_support import edit_of, error, layer_of, matrix, repaired, with_safety
from torch.utils._python_dispatch import TorchDispatchMode

from realign.errors import UsageError
from realign.repair.edit import Dense, Layer, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.safe_lora import SafeLora
from realign.repair.preparation import NO_STATISTICS, Statistics

SHAPES = [(9, 9), (6, 14), (14, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES)
ALL = SafeLora(tau=2.0)


def test_hand_example() -> None:
    v = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    eye = torch.eye(2, dtype=torch.float64)
    layer = with_safety(v, -eye)  # Wa = 0 and Wf = I
    score = SafeLora().score(layer)
    assert score is not None
    assert score["cosine"] == pytest.approx(0.962964, abs=5e-7)
    projected = torch.diag(torch.tensor([1.8, 3.2], dtype=torch.float64))
    assert torch.allclose(repaired(ALL, layer, selected(ALL, [layer])), projected, atol=1e-12)


@shapes
@pytest.mark.parametrize("kind", ["base", "unaligned"])
@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_equals_the_dense_filter(
    shape: tuple[int, int], kind: str, form: str, dtype: torch.dtype, bound: float
) -> None:
    method = SafeLora(tau=2.0, safety_vector=kind)
    if form == "full":
        layer = layer_of(shape, dtype=dtype)
        assert layer.aligned is not None
        expected = dense_safe_lora(layer, kind) - layer.finetuned.double()
    else:
        layer = cast_weights(adapter_layer(shape), dtype)
        assert layer.lora is not None
        task = layer.lora.scale * (layer.lora.up.double() @ layer.lora.down.double())
        expected = dense_filter(layer, kind) @ task - task  # on the merge before its rounding
    assert error(edit_of(method, layer), expected) <= bound


def cast_weights(layer: Layer, dtype: torch.dtype) -> Layer:
    """An adapter over weights of another type: its factors stay as they are."""
    roles = ("finetuned", "aligned", "base", "unaligned")
    return dataclasses.replace(layer, **{role: getattr(layer, role).to(dtype) for role in roles})


@shapes
def test_the_adapter_form_equals_the_full_one_on_the_merged_model(shape: tuple[int, int]) -> None:
    layer = adapter_layer(shape)
    for method in (ALL, SafeLora(tau=2.0, projector="unit")):
        one, two = edit_of(method, layer), edit_of(method, whole(layer))
        assert error(one, two) <= 1e-10
    a, b = ALL.score(layer), ALL.score(whole(layer))
    assert a is not None and b is not None
    assert a == pytest.approx(b, rel=1e-10)


def test_of_an_adapter_only_b_changes() -> None:
    """E = (B' - B) A with A as it is: the repaired adapter is of the same rank."""
    layer = adapter_layer((12, 20), rank=3)
    assert layer.lora is not None
    edit = ALL.edit(layer, NO_STATISTICS)
    assert isinstance(edit, LowRank)
    assert edit.rank == 3
    assert torch.equal(edit.right, layer.lora.down)


def test_factors_are_told_apart_by_name() -> None:
    """A square B has as many rows as the rank: a look at its shape would take it for A."""
    layer = adapter_layer((4, 7), rank=4)
    expected = dense_safe_lora(layer) - layer.finetuned
    assert error(edit_of(ALL, layer), expected) <= 1e-10


@shapes
@pytest.mark.parametrize("adapter", [True, False])
def test_a_larger_vector_keeps_the_cosine_and_scales_the_projected_part(
    shape: tuple[int, int], adapter: bool
) -> None:
    layer = adapter_layer(shape) if adapter else layer_of(shape)
    aligned, base = layer.require("aligned"), layer.require("base")
    larger = dataclasses.replace(layer, base=aligned - 3 * (aligned - base))
    one, three = ALL.score(layer), ALL.score(larger)
    assert one is not None and three is not None
    assert three == pytest.approx(one, rel=1e-9)
    part, tripled = (repaired(ALL, each) - aligned for each in (layer, larger))
    assert error(tripled, 3 * part) <= 1e-10
    unit = SafeLora(tau=2.0, projector="unit")
    assert error(repaired(unit, larger), repaired(unit, layer)) <= 1e-10


def test_a_vector_that_is_a_rotation_scales_the_task_vector() -> None:
    v = 0.6 * orthogonal(9, seed=2)
    layer = with_safety(v, matrix(9, 9, seed=3))
    score = ALL.score(layer)
    assert score is not None
    assert score["cosine"] == pytest.approx(1.0, abs=1e-12)
    assert score["chance_cosine"] == pytest.approx(1.0, abs=1e-12)
    aligned = layer.require("aligned")
    found = repaired(ALL, layer) - aligned
    assert error(found, 0.6 / 3.0 * (layer.finetuned - aligned)) <= 1e-12


def test_the_unit_filter_never_enlarges() -> None:
    layer = layer_of((8, 8))
    loud = dataclasses.replace(layer, base=layer.require("aligned") + 50 * matrix(8, 8, seed=5))
    part = repaired(SafeLora(tau=2.0, projector="unit"), loud) - loud.require("aligned")
    task = loud.finetuned - loud.require("aligned")
    assert float(torch.linalg.matrix_norm(part, 2)) <= float(torch.linalg.matrix_norm(task, 2))
    paper = repaired(ALL, loud) - loud.require("aligned")
    assert float(paper.norm()) > float(task.norm())  # the paper's C does


def layers() -> list[Layer]:
    """Six matrices with different cosines."""
    made = [named(layer_of((6, 10), seed=10 * n), n) for n in range(6)]
    parts = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    return [
        dataclasses.replace(
            layer,
            finetuned=layer.require("aligned")
            + part * layer.safety_vector("base")
            + (1 - part) * 0.1 * matrix(6, 10, seed=77 + number),
        )
        for number, (layer, part) in enumerate(zip(made, parts, strict=True))
    ]


def test_the_threshold_is_strict_and_may_be_the_chance_level() -> None:
    scores = {
        "a": {"cosine": 0.5, "chance_cosine": 0.6},
        "b": {"cosine": 0.4999, "chance_cosine": 0.3},
        "c": {"cosine": 0.9, "chance_cosine": 0.91},
        "d": {"cosine": 0.7, "chance_cosine": 0.7},
    }
    assert SafeLora(tau=0.5).select(scores) == {"b"}
    assert SafeLora(tau="auto").select(scores) == {"a", "c"}
    assert SafeLora(tau=0.0).select({"z": {"cosine": 0.0, "chance_cosine": 0.1}}) == frozenset()


def test_number_takes_exactly_the_lowest_ties_by_name() -> None:
    """Cosines are compared as they are: rounded to five digits these would all be one."""
    scores = {
        name: {"cosine": 0.3 + step, "chance_cosine": 0.5}
        for name, step in (("d", 2e-6), ("c", 1e-6), ("b", 1e-6), ("a", 3e-6), ("e", 1e-6))
    }
    for count, expected in ((1, "b"), (2, "bc"), (3, "bce"), (4, "bcde"), (99, "abcde")):
        method = SafeLora(selection="number", num_layers=count)
        for order in itertools.islice(itertools.permutations(scores), 12):
            shuffled = {name: scores[name] for name in order}
            assert method.select(shuffled) == set(expected)


@pytest.mark.parametrize("adapter", [False, True])
def test_what_is_not_selected_stays_and_says_why(adapter: bool) -> None:
    every = layers()
    if adapter:
        every = [named(dataclasses.replace(adapter_layer((6, 10)), seed=n), n) for n in range(3)]
    method = SafeLora(selection="number", num_layers=2)
    statistics = selected(method, every)
    edited = [
        each.key for each in every if not isinstance(method.edit(each, statistics), Unchanged)
    ]
    assert len(edited) == 2
    assert set(edited) == statistics.selection
    for layer in every:
        edit = method.edit(layer, statistics)
        if isinstance(edit, Unchanged):
            assert edit.reason == "its cosine is not among the 2 lowest"
        else:
            assert edit.facts == statistics.scores[layer.key]


def test_a_threshold_of_zero_selects_nothing_and_the_order_of_files_decides_nothing() -> None:
    every = layers()
    none = SafeLora(tau=0.0)
    statistics = selected(none, every)
    assert {none.edit(each, statistics) for each in every} == {
        Unchanged("its cosine is not below 0")
    }
    method = SafeLora(tau=0.8)
    one, two = selected(method, every), selected(method, reversed(every))
    assert one.selection == two.selection
    assert 0 < len(one.selection or ()) < len(every)
    for layer in every:
        assert torch.equal(repaired(method, layer, one), repaired(method, layer, two))


@pytest.mark.parametrize("adapter", [False, True])
def test_zero_vectors_give_reasons_and_no_nan(adapter: bool) -> None:
    layer = adapter_layer((5, 8)) if adapter else layer_of((5, 8))
    untouched = dataclasses.replace(layer, base=layer.aligned)
    lora = layer.lora
    still = dataclasses.replace(
        layer,
        finetuned=layer.aligned,
        lora=None if lora is None else dataclasses.replace(lora, up=0 * lora.up),
    )
    for method in (ALL, SafeLora(selection="number", num_layers=5)):
        for each, reason in (
            (untouched, "alignment did not touch this tensor"),
            (still, "task vector is zero"),
        ):
            statistics = selected(method, [each])
            assert statistics.selection == frozenset()
            assert method.edit(each, statistics) == Unchanged(reason)
            assert method.edit(each, NO_STATISTICS) == Unchanged(reason)


def test_selection_is_by_the_untouched_input() -> None:
    """A second pass would see other cosines; `edit` looks at nothing but what was selected."""
    layer = layer_of((7, 7))
    once = repaired(ALL, layer)
    again = repaired(ALL, dataclasses.replace(layer, finetuned=once))
    assert error(again, once) > 1e-3  # not idempotent, so projecting twice would show
    statistics = selected(ALL, [layer])
    assert torch.equal(repaired(ALL, layer, statistics), once)
    elsewhere = Statistics(scores=statistics.scores, selection=frozenset({"another"}))
    assert isinstance(ALL.edit(layer, elsewhere), Unchanged)


@shapes
def test_the_product_is_not_taken_in_16_bits(shape: tuple[int, int]) -> None:
    layer = layer_of(shape, seed=3, dtype=torch.bfloat16)
    aligned, finetuned = layer.require("aligned"), layer.finetuned
    expected = dense_safe_lora(layer) - aligned.double()
    v = aligned - layer.require("base")
    trap = (v @ v.T / v.norm()) @ (finetuned - aligned)
    found = edit_of(ALL, layer).double() + finetuned.double() - aligned.double()
    assert error(found, expected) <= 1e-5
    assert error(trap, expected) > 1e-3


class Largest(TorchDispatchMode):
    """Notes the most entries that any result of an operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("shape", [(300, 20), (20, 300)])
def test_nothing_larger_than_the_matrix_is_formed(adapter: bool, shape: tuple[int, int]) -> None:
    """The public code keeps a C of [d_out, d_out] for every matrix: over 15 GB for 7 B weights."""
    layer = adapter_layer(shape) if adapter else layer_of(shape)
    with Largest() as seen:
        statistics = selected(ALL, [layer])
        edit = ALL.edit(layer, statistics)
    assert not isinstance(edit, Unchanged)
    assert seen.numel <= 300 * 20


def test_settings() -> None:
    with pytest.raises(UsageError, match="tau = 0 selects no matrix"):
        SafeLora(tau=0.0).check_settings()
    SafeLora(tau=0.0, selection="number").check_settings()
    assert SafeLora().settled(Given(frozenset({"aligned", "base"}))).note == ""
    assert SafeLora().required_roles() == {"aligned", "base"}
    assert (
        "deviation"
        in SafeLora(safety_vector="unaligned").settled(Given(frozenset({"unaligned"}))).note
    )
    for bad in ({"tau": -0.1}, {"tau": "low"}, {"num_layers": 0}, {"projector": "true"}):
        with pytest.raises(UsageError):
            SafeLora(**bad)  # type: ignore[arg-type]


def test_facts_of_an_edit_are_its_scores() -> None:
    layer = layer_of((6, 6))
    edit = ALL.edit(layer, selected(ALL, [layer]))
    assert isinstance(edit, Dense)
    assert set(edit.facts) == {"cosine", "chance_cosine"}
