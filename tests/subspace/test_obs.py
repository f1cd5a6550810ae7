from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.obs_support import psd, sweep_by_definition
from support.subspace_support import error, matrix
from torch import Tensor

from realign.errors import CheckpointError, NonFiniteError
from realign.subspace import obs
from realign.subspace.eigen import NotDefiniteError, decomposing
from realign.subspace.obs import inverse_factor, sweep


def swept(
    start: Tensor, goal: Tensor, mask: Tensor, h: Tensor, *, block: int, group: int = 1
) -> Tensor:
    u = inverse_factor(h, damp=0.0).u_ii
    return sweep(
        start.clone(),
        u,
        choose=lambda columns, _: (mask[:, columns], goal[:, columns]),
        block=block,
        group=group,
    )


# ---- the factor --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 7, 130])
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_the_factor_is_upper_and_its_gram_matrix_is_the_inverse(n: int, damp: float) -> None:
    h = psd(n, seed=n)
    factor = inverse_factor(h, damp=damp)
    damped = h + damp * h.diagonal().mean() * torch.eye(n).double()
    assert torch.equal(factor.u_ii, factor.u_ii.triu())
    assert error(factor.u_ii.T @ factor.u_ii, torch.linalg.inv(damped)) < 1e-10
    assert factor.damping == damp


def test_d_j_squared_is_the_first_entry_of_the_inverse_after_eliminating_earlier_columns() -> None:
    h = psd(9, seed=1)
    factor = inverse_factor(h, damp=0.0)
    for j in range(9):
        first = torch.linalg.inv(h[j:, j:])[0, 0]
        assert float(factor.u_ii[j, j] ** 2) == pytest.approx(float(first), rel=1e-10)
        assert float(factor.costs()[j]) == pytest.approx(1 / float(first), rel=1e-10)


def test_an_input_that_never_fires_gets_one_on_the_diagonal_before_the_damping() -> None:
    h = psd(5, seed=2)
    h[3, :] = h[:, 3] = 0.0
    expected = h.clone()
    expected[3, 3] = 1.0
    expected += 0.01 * expected.diagonal().mean() * torch.eye(5).double()
    u = inverse_factor(h, damp=0.01).u_ii
    assert error(u.T @ u, torch.linalg.inv(expected)) < 1e-10


def test_the_input_is_left_alone_unless_its_memory_is_given_away() -> None:
    h = psd(6, seed=3)
    before = h.clone()
    inverse_factor(h, damp=0.01)
    assert torch.equal(h, before)
    u = inverse_factor(h, damp=0.01, overwrite=True).u_ii
    assert u.data_ptr() == h.data_ptr()
    assert torch.equal(u, inverse_factor(before, damp=0.01).u_ii)


def test_a_factorisation_that_fails_is_tried_with_ten_times_the_damping() -> None:
    h = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05], dtype=torch.float64))
    factor = inverse_factor(h, damp=0.01)
    assert factor.damping == pytest.approx(0.1)
    damped = h + 0.1 * h.diagonal().mean() * torch.eye(4).double()
    assert error(factor.u_ii.T @ factor.u_ii, torch.linalg.inv(damped)) < 1e-10


def test_after_a_thousand_times_the_damping_the_matrix_is_refused() -> None:
    h = torch.diag(torch.tensor([1.0, 1.0, 100.0, -400.0], dtype=torch.float64))
    h[0, 1] = h[1, 0] = 3.0
    with pytest.raises(NotDefiniteError, match="not positive definite with 10 of its mean") as it:
        inverse_factor(h, damp=0.01)
    assert "a larger damp" in it.value.hint


def test_without_damping_nothing_is_raised_and_the_refusal_names_damp_and_the_texts() -> None:
    x = torch.ones(4, 1, dtype=torch.float64)  # one token, four inputs that are all the same
    with (
        pytest.raises(CheckpointError, match=r"q_proj: .*with damp = 0: there are too few") as it,
        decomposing("q_proj"),
    ):
        inverse_factor(x @ x.T, damp=0.0)
    assert "damp above 0" in it.value.hint
    assert "more texts" in it.value.hint
    assert "tensor" not in it.value.hint
    assert inverse_factor(x @ x.T, damp=0.01).damping == 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(bad: float) -> None:
    h = psd(4, seed=4)
    h[1, 2] = bad
    with pytest.raises(NonFiniteError):
        inverse_factor(h, damp=0.01)


@pytest.mark.parametrize("route", [obs.factor_in_place, obs.factor_by_solving])
def test_both_routes_give_the_same_factor_and_notice_failure(
    route: Callable[[Tensor], Tensor | None],
) -> None:
    h = psd(33, seed=5)
    turned = h.flip(0, 1).contiguous()
    found = route(turned.clone())
    assert found is not None
    assert torch.equal(found, found.triu())
    assert error(found.T @ found, torch.linalg.inv(h)) < 1e-10
    turned[4, 4] = -1.0
    spoilt = turned.clone()
    assert route(spoilt) is None
    off = ~torch.eye(33, dtype=torch.bool)
    assert torch.equal(spoilt[off], turned[off])  # what the next attempt starts from


# ---- the sweep ---------------------------------------------------------------------------------

H2 = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


def test_by_hand_two_columns() -> None:
    zero, one = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    first = torch.tensor([[True, False]])
    assert torch.allclose(
        swept(zero, one, first, H2, block=2), torch.tensor([[1.0, -0.5]]).double()
    )
    second = ~first
    assert torch.allclose(
        swept(zero, one, second, H2, block=2), torch.tensor([[0.0, 1.0]]).double()
    )
    assert torch.allclose(swept(one, zero, first, H2, block=2), torch.tensor([[0.0, 1.5]]).double())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 20),
    block=st.integers(1, 25),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
)
def test_blocked_is_unblocked_is_the_definition(
    rows: int, width: int, block: int, seed: int, share: float
) -> None:
    h, start = psd(width, seed=seed), matrix(rows, width, seed=seed + 1)
    goal = matrix(rows, width, seed=seed + 2)
    mask = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < share
    expected = sweep_by_definition(start, goal, mask, h)
    found = swept(start, goal, mask, h, block=block)
    assert torch.allclose(found, expected, rtol=0, atol=1e-9 * float(1 + expected.abs().max()))
    assert torch.equal(found[mask], goal[mask])


def test_blocks_wider_than_a_panel_agree() -> None:
    width = 3 * obs.PANEL + 11
    h, start, goal = psd(width, seed=1), matrix(5, width, seed=2), matrix(5, width, seed=3)
    mask = torch.rand(5, width, generator=torch.Generator().manual_seed(4)) < 0.5
    expected = sweep_by_definition(start, goal, mask, h)
    for block in (7, obs.PANEL, 2 * obs.PANEL + 3, width, 4 * width):
        assert error(swept(start, goal, mask, h, block=block), expected) < 1e-10


def test_the_scale_of_h_does_not_matter() -> None:
    h, start, goal = psd(12, seed=1), matrix(4, 12, seed=2), matrix(4, 12, seed=3)
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(4)) < 0.5
    one = swept(start, goal, mask, h, block=5)
    assert error(swept(start, goal, mask, 7.3 * h, block=5), one) < 1e-10


def test_where_fixed_columns_come_first_the_result_is_the_exact_minimiser() -> None:
    h, start, goal = psd(10, seed=6), matrix(3, 10, seed=7), matrix(3, 10, seed=8)
    kept = [2, 5, 9]
    mask = torch.arange(10) < torch.tensor(kept)[:, None]
    found = swept(start, goal, mask, h, block=4)
    for row, count in enumerate(kept):
        change = goal[row, :count] - start[row, :count]
        answer = -change @ h[:count, count:] @ torch.linalg.inv(h[count:, count:])
        assert torch.allclose(found[row, count:] - start[row, count:], answer, atol=1e-9)


def test_compensation_lowers_the_loss_on_average_but_not_always() -> None:
    better, before, after = 0, 0.0, 0.0
    for seed in range(200):
        x, start = matrix(12, 24, seed=seed), matrix(8, 12, seed=seed + 1000)
        h, goal = x @ x.T, matrix(8, 12, seed=seed + 2000)
        mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(seed)) < 0.5
        plain = torch.where(mask, goal, start) - start
        change = swept(start, goal, mask, h, block=12) - start
        loss, compensated = (float((each @ h * each).sum()) for each in (plain, change))
        before, after = before + loss, after + compensated
        better += compensated <= loss * (1 + 1e-12)
    assert after < 0.95 * before
    assert 190 <= better < 200  # greedy: it may lose


def test_columns_of_a_group_do_not_make_up_for_each_other() -> None:
    h, start, goal = psd(8, seed=1), torch.zeros(2, 8).double(), matrix(2, 8, seed=2)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, 0] = True
    exact, grouped = (swept(start, goal, mask, h, block=8, group=each) for each in (1, 4))
    assert torch.equal(grouped[:, 1:4], start[:, 1:4])
    assert torch.allclose(grouped[:, 4:], exact[:, 4:])
    assert bool((exact[:, 1:4] != 0).all())


def test_groups_keep_their_places_across_panels() -> None:
    width = 2 * obs.PANEL + 5
    h, start, goal = psd(width, seed=1), matrix(2, width, seed=3), matrix(2, width, seed=2)
    mask = torch.rand(2, width, generator=torch.Generator().manual_seed(4)) < 0.3
    expected = sweep_by_definition(start, goal, mask, h, group=3)
    assert error(swept(start, goal, mask, h, block=4 * width, group=3), expected) < 1e-10


def test_nothing_fixed_changes_nothing() -> None:
    h, start = psd(6, seed=1), matrix(3, 6, seed=2)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    assert torch.equal(swept(start, -start, mask, h, block=4), start)
