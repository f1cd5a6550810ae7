from __future__ import annotations

import dataclasses

import pytest
import torch
from support.obs_support import Bench, psd, sweep_by_definition
from support.subspace_support import KEY, error, given, layer_of, matrix, repaired
from torch import Tensor

from realign.errors import UsageError
from realign.model.moments import Moments
from realign.repair.edit import Layer, Unchanged
from realign.repair.method import Given
from realign.repair.methods.irr import Irr
from realign.repair.preparation import Statistics


def statistics_of(h: Tensor | None, fisher: Tensor | None = None) -> Statistics:
    base = Statistics() if h is None else given(Moments(50, h[0], h, "input"))
    tables = {} if fisher is None else {"fisher": {KEY: fisher}}
    return dataclasses.replace(base, tables=tables)


def row(task: list[float], safety: list[float]) -> Layer:
    """Wa = 0, so that Wf is D and W' is D'; Wu = -v."""
    d, v = (torch.tensor([each], dtype=torch.float64) for each in (task, safety))
    zero = torch.zeros_like(d)
    return Layer(
        key=KEY, module="q_proj", layer=0, finetuned=d, aligned=zero, unaligned=-v, base=-v
    )


def irr(**changes: object) -> Irr:
    settings: dict[str, object] = {"safety_vector": "unaligned"}
    return Irr(**(settings | changes))  # type: ignore[arg-type]


D, V = [1.0, -1.0, 2.0], [1.0, 1.0, -1.0]
F = torch.tensor([[0.1, 0.5, 0.9]])


@pytest.mark.parametrize(("keep", "expected"), [(0.0, [1, 0, 0]), (0.5, [1, -1, 0])])
def test_by_hand_conflicts_of_highest_fisher_go(keep: float, expected: list[float]) -> None:
    method = irr(keep_fraction=keep, recalibrate=False)
    found = repaired(method, row(D, V), statistics_of(None, F))
    assert torch.equal(found, torch.tensor([expected]).double())


def test_by_hand_the_second_column_makes_up_for_the_first() -> None:
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    found = repaired(irr(damp=0.0), row([1.0, 1.0], [-1.0, 1.0]), statistics_of(h))
    assert torch.allclose(found, torch.tensor([[0.0, 1.5]]).double(), rtol=0, atol=1e-14)
    assert float(found[0, 0]) == 0.0


def test_inputs_that_do_not_go_together_need_no_recalibration() -> None:
    layer, h = layer_of((5, 8)), 3.7 * torch.eye(8).double()
    with_h = repaired(irr(), layer, statistics_of(h))
    assert torch.equal(with_h, repaired(irr(recalibrate=False), layer, statistics_of(None)))


def test_without_conflicts_or_a_safety_vector_the_fine_tune_stays() -> None:
    statistics = statistics_of(psd(3, seed=1))
    agreeing = irr().edit(row(D, D), statistics)
    assert agreeing == Unchanged("the fine-tune goes against the safety vector nowhere")
    none = irr().edit(row(D, [0.0, 0.0, 0.0]), statistics)
    assert none == Unchanged("safety vector is zero")
    same = irr().edit(row([0.0, 0.0, 0.0], V), statistics)
    assert same == Unchanged("task vector is zero")


def test_a_zero_of_the_safety_vector_is_no_conflict() -> None:
    # In the public code sign 0 differs from every other sign: all of D would go.
    found = repaired(irr(recalibrate=False), row(D, [0.0, 0.0, -1.0]))
    assert torch.equal(found, torch.tensor([[1.0, -1.0, 0.0]]).double())
    agreeing = repaired(irr(recalibrate=False), row([1.0, 0.0, 2.0], [-1.0, 5.0, 1.0]))
    assert torch.equal(agreeing, torch.tensor([[0.0, 0.0, 2.0]]).double())


def test_entries_too_small_to_multiply_conflict_all_the_same() -> None:
    found = repaired(irr(recalibrate=False), row([1e-200, 1.0], [-1e-200, 1.0]))
    assert torch.equal(found, torch.tensor([[0.0, 1.0]]).double())


def test_keeping_every_conflict_changes_nothing_and_a_run_that_asks_for_it_is_refused() -> None:
    method = irr(keep_fraction=1.0)
    assert isinstance(method.edit(row(D, V), statistics_of(psd(3, seed=1), F)), Unchanged)
    with pytest.raises(UsageError, match="keep_fraction = 1 keeps every conflict"):
        method.check_settings()
    irr().check_settings()


def test_removed_entries_hold_the_aligned_weight_bit_for_bit() -> None:
    layer, h = layer_of((6, 9), dtype=torch.float32), psd(9, seed=2)
    found, aligned = repaired(irr(), layer, statistics_of(h)), layer.require("aligned")
    task, safety = layer.finetuned - aligned, aligned - layer.require("unaligned")
    conflicts = task * safety < 0
    assert conflicts.any()
    assert torch.equal(found[conflicts], aligned[conflicts])
    assert not torch.equal(found[~conflicts], layer.finetuned[~conflicts])


def test_rows_without_a_conflict_are_the_fine_tune_bit_for_bit() -> None:
    layer, h = layer_of((4, 6)), psd(6, seed=3)
    task = layer.task_vector()
    unaligned = layer.require("aligned") - layer.safety_vector("unaligned")
    unaligned[1] = (layer.require("aligned") - task)[1]
    layer = dataclasses.replace(layer, unaligned=unaligned)
    assert torch.equal(repaired(irr(), layer, statistics_of(h))[1], layer.finetuned[1])


@pytest.mark.parametrize("block", [1, 3, 8, 100])
def test_the_width_of_a_block_does_not_matter_nor_are_signs_taken_again(block: int) -> None:
    layer, h = layer_of((7, 20)), psd(20, seed=4)
    task, safety = layer.task_vector(), layer.safety_vector("unaligned")
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(20).double()
    conflicts = task * safety < 0
    expected = sweep_by_definition(task, torch.zeros_like(task), conflicts, damped)
    assert (expected[~conflicts] * safety[~conflicts] < 0).any()  # what a new look would remove
    found = repaired(irr(block=block), layer, statistics_of(h))
    assert error(found - layer.require("aligned"), expected) < 1e-9


def test_equal_fisher_values_go_by_column_then_row() -> None:
    layer = layer_of((3, 4))
    zero, ones = torch.zeros(3, 4).double(), torch.ones(3, 4).double()
    layer = dataclasses.replace(layer, aligned=zero, finetuned=ones, unaligned=ones)
    found = repaired(irr(keep_fraction=5 / 12, recalibrate=False), layer, statistics_of(None, ones))
    assert found.T.flatten().tolist() == [1.0] * 5 + [0.0] * 7


def test_recalibration_lowers_what_the_task_notices() -> None:
    layer, h = layer_of((8, 16)), psd(16, seed=6)
    plain = repaired(irr(recalibrate=False), layer) - layer.finetuned
    better = repaired(irr(), layer, statistics_of(h)) - layer.finetuned
    assert float((better @ h * better).sum()) < float((plain @ h * plain).sum())


def test_base_stands_for_the_unaligned_model_where_only_that_is_given() -> None:
    layer = layer_of((4, 5))
    with_base = repaired(irr(safety_vector="base", recalibrate=False), layer)
    swapped = dataclasses.replace(layer, unaligned=layer.base)
    assert torch.equal(with_base, repaired(irr(recalibrate=False), swapped))
    settled = Irr().settled(Given(frozenset({"aligned", "base"})))
    assert "deviation" in settled.note
    assert settled.method.required_roles() == {"aligned", "base"}


def test_an_adapter_is_repaired_in_q_and_v_unless_told_otherwise() -> None:
    adapter, full = Given(frozenset(), adapter=True), Given(frozenset())
    assert irr().target_modules(adapter) == {"q_proj", "v_proj"}
    assert irr().target_modules(full) is None
    assert irr(targets="all").target_modules(adapter) is None
    assert irr(targets="qv").target_modules(full) == {"q_proj", "v_proj"}


def test_only_what_decides_something_is_asked_for() -> None:
    assert irr().required_data() == {"task"}
    assert irr(keep_fraction=0.5).required_data() == {"task", "safe"}
    assert irr(keep_fraction=0.5, recalibrate=False).required_data() == {"safe"}
    assert not irr(recalibrate=False).prepares()
    assert irr().prepares()


def test_it_asks_for_squared_gradients_of_the_aligned_and_moments_of_the_fine_tune() -> None:
    moments = Moments(9, torch.zeros(3).double(), psd(3, seed=1), "input")
    bench = Bench({KEY: moments}, tables={KEY: F})
    statistics = irr(keep_fraction=0.5, nsamples=7, fisher_samples=11).prepare(bench)
    assert bench.asked == [
        ("input_moments", "finetuned", "task", "all", False, 7),
        ("gradients", "aligned", "safe", "fisher", 11),
    ]
    assert statistics.moments(KEY) is moments
    assert statistics.tensor("fisher", KEY) is F
    bench.asked.clear()
    irr().prepare(bench)
    assert [each[0] for each in bench.asked] == ["input_moments"]


def test_without_statistics_the_reason_is_given() -> None:
    assert irr().edit(row(D, V), Statistics()) == Unchanged("no activation statistics")
    half = irr(keep_fraction=0.5, recalibrate=False)
    assert half.edit(row(D, V), Statistics()) == Unchanged("no gradients of refusals")


def test_facts_say_how_much_conflicted_and_went() -> None:
    layer = layer_of((20, 30))
    edit = irr(keep_fraction=0.5, recalibrate=False).edit(
        layer, statistics_of(None, matrix(20, 30, seed=8).square())
    )
    assert not isinstance(edit, Unchanged)
    conflicts = edit.facts["conflict_share"]
    removed = edit.facts["removed_share"]
    assert isinstance(conflicts, float)
    assert isinstance(removed, float)
    assert 0.4 < conflicts < 0.6
    assert removed == pytest.approx(conflicts / 2, abs=1 / 600)
