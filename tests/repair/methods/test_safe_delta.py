from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given as given_values
from hypothesis import settings
from hypothesis import strategies as st
from support.obs_support import Bench, psd, safe_delta_by_definition
from support.subspace_support import KEY, error, given, input_moments, layer_of, matrix, repaired
from torch import Tensor

from realign.errors import UsageError
from realign.model.moments import Moments
from realign.repair.edit import Dense, Layer, Unchanged
from realign.repair.methods.safe_delta import SafeDelta
from realign.repair.preparation import Statistics
from realign.subspace.obs import inverse_factor


def moments_of(h: Tensor) -> Statistics:
    return given(Moments(100, h.new_zeros(h.shape[0]), h, "input"))


def one_row(finetuned: list[float], aligned: list[float]) -> Layer:
    return Layer(
        key=KEY,
        module="q_proj",
        layer=0,
        finetuned=torch.tensor([finetuned], dtype=torch.float64),
        aligned=torch.tensor([aligned], dtype=torch.float64),
    )


def kept_share(method: SafeDelta, layer: Layer, statistics: Statistics) -> float:
    edit = method.edit(layer, statistics)
    if isinstance(edit, Unchanged):
        return 1.0
    share = edit.facts["kept_share"]
    assert isinstance(share, float)
    return share


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", ["absolute", "relative"])
def test_without_a_budget_the_aligned_weight_stands_there_bit_for_bit(
    dtype: torch.dtype, budget: str
) -> None:
    layer = layer_of((6, 9), dtype=dtype)
    method = SafeDelta(s=0.0, block=4, budget=budget)
    assert torch.equal(
        repaired(method, layer, moments_of(psd(9, seed=1))), layer.require("aligned")
    )


@pytest.mark.parametrize(
    "method",
    [
        SafeDelta(s=1e30, drop_fraction=0.0, block=4),
        SafeDelta(s=1.0, budget="relative", drop_fraction=0.0, block=4),
    ],
    ids=["absolute", "relative"],
)
def test_with_every_entry_affordable_nothing_changes(method: SafeDelta) -> None:
    edit = method.edit(layer_of((6, 9)), moments_of(psd(9, seed=1)))
    assert isinstance(edit, Unchanged)
    assert edit.reason.startswith("the whole task vector is within the budget")
    assert ("budget=relative" in edit.reason) is (method.budget == "absolute")


def test_by_hand_only_one_column_is_kept() -> None:
    layer = one_row([1.0, 1.0], [0.0, 0.0])
    # d = (sqrt(2/3), sqrt(1/2)): costs 3/2 and 2, so column 1 is cheaper. It alone fits the budget:
    # half of the entries are rejected.
    h = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    method = SafeDelta(s=1e30, damp=0.0, drop_fraction=0.5)
    found = repaired(method, layer, moments_of(h))
    assert torch.allclose(found, torch.tensor([[1.0, -0.5]]).double())
    # Column 1 made the dearer one: nothing comes after column 2 that could make up for it.
    h = torch.tensor([[8.0, 2.0], [2.0, 2.0]]).double()
    found = repaired(method, layer, moments_of(h))
    assert torch.allclose(found, torch.tensor([[0.0, 1.0]]).double())


@given_values(
    rows=st.integers(1, 5),
    width=st.integers(1, 12),
    block=st.integers(1, 14),
    sub_block=st.integers(1, 4),
    seed=st.integers(0, 9999),
    s=st.sampled_from([0.05, 0.3, 0.8]),
    relative=st.booleans(),
    drop=st.sampled_from([0.0, 0.15, 0.5]),
)
@settings(max_examples=60, deadline=None)
def test_it_is_what_the_equations_say(
    rows: int,
    width: int,
    block: int,
    sub_block: int,
    seed: int,
    s: float,
    relative: bool,
    drop: float,
) -> None:
    layer, h = layer_of((rows, width), seed=seed), psd(width, seed=seed)
    strength = s if relative else s * 3e5
    method = SafeDelta(
        s=strength,
        budget="relative" if relative else "absolute",
        drop_fraction=drop,
        block=block,
        sub_block=sub_block,
    )
    expected = safe_delta_by_definition(
        layer.require("aligned"),
        layer.finetuned,
        h,
        s=strength,
        relative=relative,
        drop=drop,
        block=block,
        group=sub_block,
        damp=0.01,
    )
    assert error(repaired(method, layer, moments_of(h)), expected) < 1e-10


def test_the_kept_share_rises_with_s_within_one_block() -> None:
    layer, statistics = layer_of((7, 11)), moments_of(psd(11, seed=3))
    shares = [
        kept_share(SafeDelta(s=s, budget="relative", drop_fraction=0.0), layer, statistics)
        for s in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert len(set(shares)) > 4


def test_the_kept_prefix_takes_whole_columns_in_the_order_of_cost_then_rows() -> None:
    layer, h = layer_of((3, 5)), psd(5, seed=4)
    cost = inverse_factor(h, damp=0.01).costs()
    method = SafeDelta(s=1e30, drop_fraction=0.5)  # floor(7.5) = 7 of 15 rejected: 8 stay
    found = repaired(method, layer, moments_of(h))
    kept = found == layer.finetuned
    order = torch.argsort(cost).tolist()
    assert kept[:, order[0]].all()
    assert kept[:, order[1]].all()
    assert kept[:, order[2]].tolist() == [True, True, False]
    assert not kept[:, order[3:]].any()


def test_the_costliest_are_rejected_and_not_kept() -> None:
    layer, h = layer_of((1, 8)), torch.diag(torch.arange(1.0, 9.0).double())
    found = repaired(SafeDelta(s=1e30, drop_fraction=0.25), layer, moments_of(h))
    assert torch.equal(found[0, :6], layer.finetuned[0, :6])
    assert torch.equal(found[0, 6:], layer.require("aligned")[0, 6:])


def test_a_tiny_block_loses_nothing_to_the_rounding_of_the_drop() -> None:
    # floor(0.15 * 6) = 0: nothing is rejected, where a slice by -0 would reject everything.
    edit = SafeDelta(s=1e30).edit(layer_of((2, 3)), moments_of(psd(3, seed=1)))
    assert isinstance(edit, Unchanged)


def test_a_narrow_last_block_gets_its_share_of_the_budget_only() -> None:
    width, rows = 9, 4
    h = torch.eye(width).double()
    zero = torch.zeros(rows, width).double()
    layer = dataclasses.replace(
        layer_of((rows, width)), aligned=zero, finetuned=torch.ones_like(zero)
    )
    # Every entry costs 1 (H = I, no damping): eps of a block of b is s b d_out / 4096^2. With
    # s = 4096^2 / 2 that is half of the block's entries, also in the last block, of width 1.
    method = SafeDelta(s=4096**2 / 2, damp=0.0, drop_fraction=0.0, block=4)
    kept = repaired(method, layer, moments_of(h)) == 1.0
    assert [int(kept[:, each].sum()) for each in (slice(0, 4), slice(4, 8), slice(8, 9))] == [
        8,
        8,
        2,
    ]


def test_rejected_entries_hold_the_aligned_weight_plus_compensation() -> None:
    layer, statistics = layer_of((4, 10)), moments_of(psd(10, seed=5))
    method = SafeDelta(s=0.5, budget="relative", drop_fraction=0.0)
    found, aligned = repaired(method, layer, statistics), layer.require("aligned")
    kept = found == layer.finetuned
    moved = ~kept & (found != aligned)
    assert kept.any()
    assert moved.any()


def test_the_scale_of_the_moments_does_not_matter_for_a_relative_budget() -> None:
    layer, h = layer_of((4, 10)), psd(10, seed=6)
    method = SafeDelta(s=0.4, budget="relative", block=4)
    one = repaired(method, layer, moments_of(h))
    assert error(repaired(method, layer, moments_of(7.3 * h)), one) < 1e-10


def test_the_outputs_on_safe_dialogues_come_closer_to_the_aligned_ones() -> None:
    layer, x = layer_of((12, 20)), matrix(20, 200, seed=9) * torch.linspace(0.1, 3, 20)[:, None]
    aligned = layer.require("aligned")
    mixed = matrix(20, 20, seed=10) @ x
    found = repaired(SafeDelta(s=0.3, budget="relative"), layer, given(input_moments(mixed)))
    before = ((layer.finetuned - aligned) @ mixed).norm()
    after = ((found - aligned) @ mixed).norm()
    assert after < 0.6 * before
    assert (found - aligned).norm() > 0.1 * (layer.finetuned - aligned).norm()


def test_what_cannot_be_measured_is_left_alone_with_the_reason() -> None:
    layer = layer_of((4, 6))
    assert SafeDelta().edit(layer, Statistics()) == Unchanged("no activation statistics")
    cold = given(Moments(0, torch.zeros(6).double(), torch.zeros(6, 6).double(), "input"))
    assert SafeDelta().edit(layer, cold) == Unchanged("no token reached it")
    same = dataclasses.replace(layer, finetuned=layer.aligned)
    statistics = moments_of(psd(6, seed=1))
    assert SafeDelta().edit(same, statistics) == Unchanged("task vector is zero")


def test_a_dead_input_does_not_break_the_factor() -> None:
    h = psd(6, seed=1)
    h[2, :] = h[:, 2] = 0.0
    layer = layer_of((4, 6))
    expected = safe_delta_by_definition(
        layer.require("aligned"), layer.finetuned, h, s=0.5, relative=True
    )
    found = repaired(SafeDelta(s=0.5, budget="relative"), layer, moments_of(h))
    assert error(found, expected) < 1e-10


def test_moments_that_may_be_overwritten_give_the_same() -> None:
    layer, h = layer_of((4, 6)), psd(6, seed=1)
    method = SafeDelta(s=0.5, budget="relative")
    kept = repaired(method, layer, moments_of(h))
    spent = Statistics({KEY: Moments(9, h[0], h.clone(), "input")}, disposable=True)
    assert torch.equal(repaired(method, layer, spent), kept)


def test_the_edit_is_what_the_result_says_in_lower_precision_too() -> None:
    layer, h = layer_of((5, 8), dtype=torch.bfloat16), psd(8, seed=2)
    edit = SafeDelta(s=0.5, budget="relative").edit(layer, moments_of(h))
    assert isinstance(edit, Dense)
    assert edit.target is not None
    assert edit.target.dtype == torch.bfloat16
    exact = layer.finetuned.double() + edit.delta.double()
    assert torch.equal(edit.target, exact.to(torch.bfloat16))


def test_a_relative_budget_above_the_whole_is_refused() -> None:
    with pytest.raises(UsageError, match=r"s = 1\.5 is out of range.*relative"):
        SafeDelta(s=1.5, budget="relative")
    assert SafeDelta(s=1.5).s == 1.5


def test_a_relative_budget_that_keeps_everything_is_no_run() -> None:
    with pytest.raises(UsageError, match="keeps the whole task vector"):
        SafeDelta(s=1.0, budget="relative", drop_fraction=0.0).check_settings()
    SafeDelta(s=1.0, budget="relative").check_settings()
    SafeDelta(s=1.0, drop_fraction=0.0).check_settings()


@pytest.mark.parametrize("budget", ["absolute", "relative"])
def test_settings_that_give_the_aligned_model_are_no_run(budget: str) -> None:
    with pytest.raises(UsageError, match="s = 0 keeps nothing"):
        SafeDelta(s=0.0, budget=budget).check_settings()
    with pytest.raises(UsageError, match="drop_fraction = 1 rejects every entry"):
        SafeDelta(drop_fraction=1.0, budget=budget).check_settings()


def test_it_runs_the_unmodified_aligned_model_on_all_tokens_of_safe_dialogues() -> None:
    bench = Bench({})
    SafeDelta(samples=128).prepare(bench)
    assert bench.asked == [("input_moments", "aligned", "safe", "all", False, 128, 512)]
