"""Identities across methods: they catch most errors of sign, scale and transposition."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.subspace_support import (
    dense_svd_edit,
    edit_of,
    error,
    given,
    input_moments,
    layer_of,
    matrix,
    output_moments,
    repaired,
)
from torch import Tensor

from realign.repair.edit import Layer, Unchanged
from realign.repair.method import Method
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.replace import Replace
from realign.repair.methods.resta import Resta
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.preparation import Statistics

SHAPES = [(8, 8), (5, 12), (12, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def lox(layer: Layer, k: int, alpha: float) -> Tensor:
    """Post-hoc LoX as published (arXiv 2506.15606): Wf + alpha trunc_k(Wa - W0)."""
    assert layer.aligned is not None
    assert layer.base is not None
    return layer.finetuned + alpha * dense_svd_edit(layer.aligned - layer.base, k)


def anchors(shape: tuple[int, int], seed: int = 7) -> Statistics:
    return given(input_moments(matrix(shape[1], 60, seed=seed)))


def every_method(kind: str) -> list[Method]:
    return [
        Lssf(safety_vector=kind, min_tokens=1),
        DeltaSvd(safety_vector=kind, rank=3),
        Resta(safety_vector=kind),
        WiseFt(),
        Replace(safety_vector=kind, rank=3),
    ]


@pytest.mark.parametrize("shape", [(8, 8), (5, 12)])
@pytest.mark.parametrize("kind", ["base", "unaligned"])
@pytest.mark.parametrize("route", ["input", "output"])
def test_lssf_on_all_outputs_is_resta(shape: tuple[int, int], kind: str, route: str) -> None:
    layer, x = layer_of(shape), matrix(shape[1], 60, seed=7)
    assert layer.aligned is not None
    moments = input_moments(x) if route == "input" else output_moments(layer.aligned @ x)
    lssf = Lssf(standardize="none", eta=1.0, alpha=0.7, safety_vector=kind, min_tokens=1)
    resta = Resta(gamma=0.7, safety_vector=kind)
    assert error(edit_of(lssf, layer, given(moments)), edit_of(resta, layer)) <= 1e-10


@shapes
@pytest.mark.parametrize("k", [1, 3, 5])
def test_delta_svd_is_post_hoc_lox(shape: tuple[int, int], k: int) -> None:
    layer = layer_of(shape)
    found = repaired(DeltaSvd(rank=k, alpha=1.25, safety_vector="base"), layer)
    assert error(found - layer.finetuned, lox(layer, k, 1.25) - layer.finetuned) <= 1e-10


@shapes
@pytest.mark.parametrize("kind", ["base", "unaligned"])
def test_delta_svd_of_full_rank_is_resta(shape: tuple[int, int], kind: str) -> None:
    layer = layer_of(shape)
    full = DeltaSvd(rank=min(shape), alpha=0.4, safety_vector=kind)
    assert error(edit_of(full, layer), edit_of(Resta(gamma=0.4, safety_vector=kind), layer)) < 1e-10


@shapes
def test_replace_of_full_rank_is_the_aligned_weight_and_at_strength_t_wise_ft(
    shape: tuple[int, int],
) -> None:
    layer = layer_of(shape)
    edit = edit_of(Replace(rank=min(shape)), layer)
    assert layer.aligned is not None
    assert torch.allclose(layer.finetuned + edit, layer.aligned, rtol=0, atol=1e-10)
    for t in (0.25, 0.5):
        assert error(t * edit, edit_of(WiseFt(a=t), layer)) <= 1e-9


@pytest.mark.parametrize(
    "method",
    [
        Resta(gamma=0.0, safety_vector="base"),
        WiseFt(a=0.0),
        Replace(rank=0),
        DeltaSvd(alpha=0.0, safety_vector="base"),
        Lssf(alpha=0.0, safety_vector="base", min_tokens=1),
    ],
    ids=lambda m: m.name,
)
def test_settings_that_say_nothing_change_nothing(method: Method) -> None:
    assert isinstance(method.edit(layer_of((6, 6)), anchors((6, 6))), Unchanged)


@pytest.mark.parametrize("kind", ["base", "unaligned"])
def test_without_a_safety_vector_nothing_that_uses_one_edits(kind: str) -> None:
    layer = layer_of((6, 6))
    same = dataclasses.replace(layer, base=layer.aligned, unaligned=layer.aligned)
    for method in every_method(kind):
        unchanged = isinstance(method.edit(same, anchors((6, 6))), Unchanged)
        assert unchanged is (method.name != "wise_ft"), method.name


def test_without_a_task_vector_the_filters_have_nothing_to_do() -> None:
    layer = layer_of((6, 6))
    same = dataclasses.replace(layer, finetuned=layer.aligned)
    for method in (WiseFt(), Replace()):
        assert isinstance(method.edit(same, anchors((6, 6))), Unchanged)


@shapes
def test_every_method_is_deterministic_and_leaves_its_inputs_alone(
    shape: tuple[int, int],
) -> None:
    layer, statistics = layer_of(shape, dtype=torch.float32), anchors(shape)
    for method in every_method("base"):
        first = edit_of(method, layer, statistics)
        assert torch.equal(edit_of(method, layer, statistics), first), method.name
        fresh = layer_of(shape, dtype=torch.float32)
        assert torch.equal(layer.finetuned, fresh.finetuned)
        assert torch.equal(layer.require("aligned"), fresh.require("aligned"))
        assert torch.equal(layer.require("base"), fresh.require("base"))


@shapes
def test_additive_methods_do_not_depend_on_the_fine_tune(shape: tuple[int, int]) -> None:
    layer, statistics = layer_of(shape), anchors(shape)
    moved = dataclasses.replace(layer, finetuned=layer.finetuned + matrix(*shape, seed=99))
    for method in every_method("base")[:3]:
        one, two = edit_of(method, layer, statistics), edit_of(method, moved, statistics)
        assert torch.equal(one, two), method.name
