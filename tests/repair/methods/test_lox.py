"""LoX: hand example, both modes, its two ratios, and what public code gets wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.subspace_support import (
    dense_svd_edit,
    edit_of,
    error,
    layer_of,
    matrix,
    repaired,
    with_safety,
)
from torch import Tensor

from realign.errors import UsageError
from realign.repair.edit import Dense, Layer, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.lox import Lox
from realign.repair.methods.resta import Resta
from realign.repair.preparation import NO_STATISTICS
from realign.repair.registry import build_method

SHAPES = [(9, 9), (6, 14), (14, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


def facts_of(method: Lox, layer: Layer) -> dict[str, float]:
    edit = method.edit(layer, NO_STATISTICS)
    assert isinstance(edit, LowRank | Dense)
    return {name: float(v) for name, v in edit.facts.items() if isinstance(v, int | float)}


def shares(layer: Layer, k: int) -> tuple[float, float]:
    """R_align and R_ft by a full SVD and a projector that is formed."""
    assert layer.aligned is not None
    assert layer.base is not None
    delta, whole = layer.aligned - layer.base, layer.finetuned - layer.base
    u, _, _ = torch.linalg.svd(delta, full_matrices=False)
    p = u[:, :k] @ u[:, :k].T
    return (
        float((p @ delta).norm() / delta.norm()),
        float((p @ whole).norm() / whole.norm()),
    )


def test_hand_example() -> None:
    layer = with_safety(diagonal(3, 2, 1))
    method = Lox(k=2, alpha=0.5)
    assert torch.allclose(edit_of(method, layer), diagonal(1.5, 1, 0), atol=1e-12)
    assert facts_of(method, layer)["r_align"] == pytest.approx(math.sqrt(13 / 14))
    assert math.sqrt(13 / 14) == pytest.approx(0.963624, abs=5e-7)


@shapes
@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_the_shares_equal_their_definition(shape: tuple[int, int], k: int, svd: str) -> None:
    layer = layer_of(shape, seed=2)
    found = facts_of(Lox(k=k, svd=svd), layer)
    r_align, r_ft = shares(layer, k)
    assert found["r_align"] == pytest.approx(r_align, rel=1e-8)
    assert found["r_ft"] == pytest.approx(r_ft, rel=1e-8)


@shapes
def test_without_a_fine_tune_both_shares_are_the_same(shape: tuple[int, int]) -> None:
    layer = layer_of(shape)
    assert layer.aligned is not None
    found = facts_of(Lox(k=3), dataclasses.replace(layer, finetuned=layer.aligned))
    assert found["r_ft"] == pytest.approx(found["r_align"], rel=1e-12)


def test_a_fine_tune_that_loses_the_directions_lowers_the_ratio() -> None:
    """What the paper calls lost safety: the fine-tune undoes the leading direction."""
    layer = with_safety(diagonal(3, 2, 1))
    worn = dataclasses.replace(layer, finetuned=-diagonal(2.5, 0, 0))
    found = facts_of(Lox(k=1), worn)
    assert found["r_ft"] / found["r_align"] < 0.5


@shapes
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 1e-4)]
)
def test_equals_the_dense_truncation(
    shape: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    """In 16 bits, too: a difference taken there would be off by percents."""
    layer = layer_of(shape, seed=1, dtype=dtype)
    delta = layer.require("aligned").double() - layer.require("base").double()
    for k in (1, 4):
        found = edit_of(Lox(k=k, alpha=1.25), layer)
        assert error(found, 1.25 * dense_svd_edit(delta, k)) <= bound


@shapes
@pytest.mark.parametrize("k", [6, 50, None])
def test_at_full_rank_it_is_resta(shape: tuple[int, int], k: int | None) -> None:
    layer = layer_of(shape)
    if k == 6 and min(shape) > 6:
        k = min(shape)
    found = edit_of(Lox(k=k, alpha=0.7), layer)
    assert error(found, edit_of(Resta(gamma=0.7, safety_vector="base"), layer)) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_the_rank_is_at_most_k(k: int, seed: int) -> None:
    layer = layer_of((7, 11), seed=seed)
    found = edit_of(Lox(k=k), layer)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-9)) <= k


def test_the_rank_is_capped_by_that_of_the_vector() -> None:
    layer = with_safety(matrix(12, 2, seed=1) @ matrix(2, 30, seed=2))
    for svd in ("exact", "randomised"):
        edit = Lox(k=6, svd=svd).edit(layer, NO_STATISTICS)
        assert isinstance(edit, LowRank)
        assert edit.rank == 2


@shapes
def test_random_projections_give_the_same_edit_where_there_is_a_gap(
    shape: tuple[int, int],
) -> None:
    strong = matrix(shape[0], 3, seed=5) @ matrix(3, shape[1], seed=6)
    layer = with_safety(strong + 0.02 * matrix(*shape, seed=7))
    exact, random = (edit_of(Lox(k=3, svd=svd), layer) for svd in ("exact", "randomised"))
    assert error(random, exact) <= 1e-4


@pytest.mark.parametrize("alpha", ["auto", 0.5])
@shapes
def test_hardening_is_post_hoc_on_the_aligned_model_itself(
    shape: tuple[int, int], alpha: float | str
) -> None:
    layer = layer_of(shape)
    assert layer.aligned is not None
    same = dataclasses.replace(layer, finetuned=layer.aligned)
    subject = dataclasses.replace(same, aligned=None)  # what the engine gives when hardening
    hard = Lox(mode="harden", alpha=alpha)
    post = Lox(alpha=1.25 if alpha == "auto" else alpha)
    assert torch.equal(repaired(hard, subject), repaired(post, same))
    assert facts_of(hard, subject) == facts_of(post, same)


def test_what_each_mode_needs_and_how_far_it_goes() -> None:
    for mode, alpha, roles in (
        ("posthoc", 1.0, {"aligned", "base"}),
        ("harden", 1.25, {"base"}),
    ):
        settled = Lox(mode=mode).settled(Given(frozenset({"aligned", "base"})))
        assert settled.method.settings()["alpha"] == alpha
        assert settled.method.required_roles() == roles
        assert settled.note == ""
    assert (
        "deviation" in Lox(safety_vector="unaligned").settled(Given(frozenset({"unaligned"}))).note
    )
    with pytest.raises(UsageError, match="base"):
        Lox().settled(Given(frozenset({"aligned", "unaligned"})))


def test_twice_adds_twice() -> None:
    layer = layer_of((6, 8))
    once = repaired(Lox(k=2), layer)
    twice = repaired(Lox(k=2), dataclasses.replace(layer, finetuned=once))
    assert error(twice - layer.finetuned, 2 * (once - layer.finetuned)) <= 1e-12


def test_a_k_of_zero_is_refused_and_not_taken_for_full_rank() -> None:
    with pytest.raises(UsageError, match=r"k = 0 .* lox"):
        Lox(k=0)
    method = build_method("lox", ["k=none"])
    assert isinstance(method, Lox)
    assert method.k is None


def test_nothing_to_add() -> None:
    layer = layer_of((5, 5))
    assert Lox(alpha=0.0).edit(layer, NO_STATISTICS) == Unchanged("alpha is 0")
    same = dataclasses.replace(layer, base=layer.aligned)
    for method in (Lox(), Lox(svd="randomised"), Lox(k=None)):
        assert method.edit(same, NO_STATISTICS) == Unchanged("safety vector is zero")


def test_several_matrices_at_once_are_edited_as_one_by_one() -> None:
    layers = [layer_of((6, 9), seed=seed) for seed in range(3)]
    layers.append(dataclasses.replace(layers[0], base=layers[0].aligned))
    for method in (Lox(k=2), Lox(k=2, svd="randomised"), Lox(k=None), Lox(mode="harden", k=2)):
        together = method.edit_batch(layers, NO_STATISTICS)
        for layer, edit in zip(layers, together, strict=True):
            alone = method.edit(layer, NO_STATISTICS)
            if isinstance(alone, Unchanged):
                assert edit == alone
            else:
                assert isinstance(edit, LowRank | Dense)
                assert torch.equal(edit.dense(), alone.dense())
