from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from support.obs_support import Bench
from support.subspace_support import KEY, error, given, input_moments, layer_of, matrix, repaired
from torch import Tensor

from realign.errors import UsageError
from realign.model.moments import Moments
from realign.repair.edit import Layer, LoraFactors, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.antidote import Antidote
from realign.repair.preparation import Statistics


def norms(*values: float) -> Statistics:
    """Moments of which only the diagonal was collected."""
    squares = torch.tensor(values, dtype=torch.float64).square()
    return given(Moments(10, torch.zeros_like(squares), squares, "input"))


HAND = Layer(
    key=KEY,
    module="q_proj",
    layer=0,
    finetuned=torch.tensor([[1.0, -3.0, 2.0, 0.5]]),
    aligned=torch.tensor([[0.0, 0.0, 0.0, 0.1]]),
)


@pytest.mark.parametrize(
    ("prune_to", "expected"), [("zero", [1, -3, 2, 0]), ("aligned", [1, -3, 2, 0.1])]
)
def test_by_hand_the_entry_that_is_used_most_goes(prune_to: str, expected: list[float]) -> None:
    method = Antidote(alpha=0.25, space="merged", prune_to=prune_to)
    found = repaired(method, HAND, norms(2, 1, 1, 10))
    assert torch.equal(found, torch.tensor([expected]))


def test_nothing_is_pruned_at_zero_and_a_run_that_asks_for_it_is_refused() -> None:
    assert Antidote(alpha=0.0).edit(HAND, norms(2, 1, 1, 10)) == Unchanged("alpha is 0")
    with pytest.raises(UsageError, match="alpha = 0 prunes nothing"):
        Antidote(alpha=0.0).check_settings()
    with pytest.raises(UsageError, match="alpha = 1 prunes every entry"):
        Antidote(alpha=1.0).check_settings()
    Antidote(alpha=1.0, prune_to="aligned").check_settings()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_put_back_is_the_aligned_weight_bit_for_bit(dtype: torch.dtype) -> None:
    layer = layer_of((5, 7), dtype=dtype)
    method = Antidote(alpha=1.0, space="merged", prune_to="aligned")
    assert torch.equal(repaired(method, layer, norms(*range(1, 8))), layer.require("aligned"))


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.3, 0.5, 0.99])
def test_every_row_loses_exactly_as_many_entries_as_were_asked_for(alpha: float) -> None:
    layer = layer_of((6, 30))
    found = repaired(Antidote(alpha=alpha, space="merged"), layer, norms(*range(1, 31)))
    count = math.ceil(alpha * 30 - 1e-9)
    assert (found == 0).sum(1).tolist() == [count] * 6
    assert torch.equal(found[found != 0], layer.finetuned[found != 0])


def test_equal_scores_go_to_the_smaller_index() -> None:
    layer = dataclasses.replace(HAND, finetuned=torch.tensor([[1.0, 1.0, -1.0, 1.0]]))
    found = repaired(Antidote(alpha=0.5, space="merged"), layer, norms(1, 1, 1, 1))
    assert found.tolist() == [[0.0, 0.0, -1.0, 1.0]]


def test_the_highest_scores_are_pruned_and_not_the_lowest() -> None:
    layer = layer_of((4, 20))
    statistics = norms(*range(1, 21))
    score = layer.finetuned.abs() * torch.arange(1.0, 21.0)
    gone = repaired(Antidote(alpha=0.25, space="merged"), layer, statistics) == 0
    for row in range(4):
        assert score[row][gone[row]].min() > score[row][~gone[row]].max()


@pytest.mark.parametrize("prune_to", ["zero", "aligned"])
def test_the_same_mask_twice_changes_nothing(prune_to: str) -> None:
    layer = layer_of((4, 20))
    statistics, method = norms(*range(1, 21)), Antidote(alpha=0.25, space="merged")
    mask = repaired(method, layer, statistics) == 0
    once = repaired(dataclasses.replace(method, prune_to=prune_to), layer, statistics)
    target = layer.require("aligned") if prune_to == "aligned" else torch.zeros_like(once)
    assert torch.equal(torch.where(mask, target, once), once)


def test_the_scale_of_the_inputs_keeps_the_mask() -> None:
    layer, x = layer_of((4, 20)), matrix(20, 50, seed=3)
    method = Antidote(alpha=0.2, space="merged")
    one = repaired(method, layer, given(input_moments(x)))
    assert torch.equal(repaired(method, layer, given(input_moments(1e-3 * x))), one)


def test_the_score_from_moments_is_the_score_from_activations() -> None:
    layer, x = layer_of((4, 20)), matrix(20, 50, seed=3)
    method = Antidote(alpha=0.2, space="merged")
    score = layer.finetuned.abs() * x.norm(dim=1)
    for statistics in (given(input_moments(x)), norms(*x.norm(dim=1).tolist())):
        gone = repaired(method, layer, statistics) == 0
        assert gone.sum(1).tolist() == [4] * 4
        for row in range(4):
            assert set(gone[row].nonzero().view(-1).tolist()) == set(
                torch.argsort(-score[row])[:4].tolist()
            )


# ---- adapters ----------------------------------------------------------------------------------


def lora_layer(d_out: int = 24, d_in: int = 20, rank: int = 4) -> tuple[Layer, LoraFactors]:
    lora = LoraFactors(matrix(rank, d_in, seed=1), matrix(d_out, rank, seed=2), 2.0)
    aligned = matrix(d_out, d_in, seed=3)
    finetuned = aligned + 2.0 * lora.up @ lora.down
    return dataclasses.replace(
        layer_of((d_out, d_in)), aligned=aligned, finetuned=finetuned, lora=lora
    ), lora


def pruned(factor: Tensor, x: Tensor, alpha: float) -> Tensor:
    score = factor.abs() * x.norm(dim=1)
    count = math.ceil(alpha * factor.shape[1] - 1e-9)
    out = factor.clone()
    for row in range(factor.shape[0]):
        out[row, torch.argsort(-score[row], stable=True)[:count]] = 0.0
    return out


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.3])
def test_both_factors_are_pruned_each_by_its_own_inputs(alpha: float) -> None:
    layer, lora = lora_layer()
    x = matrix(20, 20, seed=5) @ matrix(20, 60, seed=4)  # features that go together
    edit = Antidote(alpha=alpha, space="adapter").edit(layer, given(input_moments(x)))
    assert isinstance(edit, LowRank)
    down, up = pruned(lora.down, x, alpha), pruned(lora.up, lora.down @ x, alpha)
    expected = 2.0 * (up @ down - lora.up @ lora.down)
    assert edit.rank == 8
    assert error(edit.dense(), expected) < 1e-12


def test_zeroing_factors_is_not_zeroing_the_product() -> None:
    layer, lora = lora_layer()
    statistics = given(input_moments(matrix(20, 60, seed=4)))
    found = repaired(Antidote(alpha=0.1, space="adapter"), layer, statistics)
    changed = found - layer.require("aligned")
    assert int((changed.abs() < 1e-12).sum()) == 0  # no entry of the product is gone
    assert error(changed, lora.product().double()) > 0.1


def test_a_short_row_that_loses_more_than_twice_its_share_is_reported() -> None:
    layer, _ = lora_layer(rank=4)
    statistics = given(input_moments(matrix(20, 60, seed=4)))
    few = Antidote(alpha=0.01, space="adapter").edit(layer, statistics)
    assert isinstance(few, LowRank)
    assert few.facts["pruned_share_b"] == 0.25
    assert few.facts["pruned_share_a"] == 0.05
    assert few.facts["pruned_more"] == "A, B"
    many = Antidote(alpha=0.25, space="adapter").edit(layer, statistics)
    assert isinstance(many, LowRank)
    assert "pruned_more" not in many.facts


def test_a_matrix_without_an_adapter_is_left_alone() -> None:
    edit = Antidote(space="adapter").edit(HAND, given(input_moments(matrix(4, 9, seed=1))))
    assert edit == Unchanged("the adapter has no factors here")


# ---- what is asked for -------------------------------------------------------------------------


def test_the_space_follows_the_fine_tune() -> None:
    adapter, full = Given(frozenset(), adapter=True), Given(frozenset())
    assert Antidote().settled(adapter).method.settings()["space"] == "adapter"
    assert Antidote().settled(full).method.settings()["space"] == "merged"
    back = Antidote(prune_to="aligned").settled(adapter)
    assert back.method.settings()["space"] == "merged"
    assert "prune_to = aligned" in back.note
    with pytest.raises(UsageError, match="needs a LoRA adapter"):
        Antidote(space="adapter").settled(full)
    with pytest.raises(UsageError, match="to zero only"):
        Antidote(space="adapter", prune_to="aligned")


def test_the_aligned_model_is_needed_only_to_put_its_entries_back() -> None:
    assert Antidote().required_roles() == frozenset()
    assert Antidote(prune_to="aligned").required_roles() == {"aligned"}


def test_whole_weights_are_pruned_in_q_k_and_v_unless_told_otherwise() -> None:
    full = Given(frozenset())
    qkv = {"q_proj", "k_proj", "v_proj"}
    assert Antidote(space="merged").target_modules(full) == qkv
    assert Antidote(space="merged", targets="all").target_modules(full) is None
    assert Antidote(space="adapter").target_modules(Given(frozenset(), adapter=True)) is None


def test_it_asks_for_as_much_of_the_moments_as_it_reads() -> None:
    for space, diagonal in (("merged", True), ("adapter", False)):
        bench = Bench({})
        Antidote(space=space, samples=5).prepare(bench)
        assert bench.asked == [("input_moments", "finetuned", "harmful", "all", diagonal, 5)]


def test_what_was_not_measured_is_left_alone() -> None:
    method = Antidote(space="merged")
    assert method.edit(HAND, Statistics()) == Unchanged("no activation statistics")
    cold = given(Moments(0, torch.zeros(4).double(), torch.zeros(4).double(), "input"))
    assert method.edit(HAND, cold) == Unchanged("no token reached it")
