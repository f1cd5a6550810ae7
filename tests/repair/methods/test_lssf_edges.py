"""Every edge case of LSSF: what it does where the formulas are silent."""

from __future__ import annotations

import pytest
import torch
from support.subspace_support import (
    KEY,
    dense_lssf,
    edit_of,
    error,
    full,
    given,
    input_moments,
    layer_of,
    matrix,
    output_moments,
    token_moments,
    with_safety,
)
from torch import Tensor

from realign.model.moments import Moments
from realign.repair.edit import Dense, LowRank, Unchanged
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.scatter import output_spectrum
from realign.repair.preparation import NO_STATISTICS, Statistics


def method(**settings: object) -> Lssf:
    plain = Lssf(safety_vector="unaligned", min_tokens=1)
    return Lssf(**{**plain.settings(), **settings})


def diagonal(*energies: float) -> Moments:
    n = len(energies)
    c = torch.diag(torch.tensor(energies, dtype=torch.float64))
    return Moments(100, torch.zeros(n, dtype=torch.float64), c, "output")


def rank_of(edit: object) -> object:
    assert isinstance(edit, LowRank | Dense), edit
    return edit.facts["rank"]


EYE = torch.eye(3, dtype=torch.float64)


def test_rank_one_carries_alpha1_squared() -> None:
    lssf = method(standardize="none", rank_rule=1, alpha1=3.0)
    edit = lssf.edit(with_safety(EYE), given(diagonal(9, 4, 1)))
    assert rank_of(edit) == 1
    assert torch.allclose(full(edit), torch.diag(torch.tensor([9.0, 0, 0])).double(), atol=1e-12)


def test_flat_spectrum_gives_no_direction_preference() -> None:
    lssf = method(standardize="none", eta=1.0, alpha1=3.0)
    edit = lssf.edit(with_safety(EYE), given(diagonal(4, 4, 4)))
    assert rank_of(edit) == 3
    assert torch.allclose(full(edit), EYE, atol=1e-12)


def test_all_energy_in_one_direction_is_rank_one() -> None:
    edit = method(standardize="none").edit(with_safety(EYE), given(diagonal(4, 0, 0)))
    assert rank_of(edit) == 1
    assert isinstance(edit, LowRank | Dense)
    assert edit.facts["entropy"] == 0


@pytest.mark.parametrize("standardize", ["neuron", "none"])
def test_no_variance_or_no_tokens(standardize: str) -> None:
    lssf, layer = method(standardize=standardize), with_safety(EYE)
    reason = Unchanged("no activation variance")
    assert lssf.edit(layer, given(diagonal(0, 0, 0))) == reason
    empty = Moments(0, torch.zeros(3).double(), torch.zeros(3, 3).double(), "output")
    assert lssf.edit(layer, given(empty)) == reason
    assert lssf.edit(layer, given(input_moments(torch.zeros(3, 5).double()))) == reason


def test_constant_outputs_have_no_variance_after_centring() -> None:
    constant = torch.full((3, 7), 300.0, dtype=torch.float64)
    assert method().edit(with_safety(EYE), given(output_moments(constant))) == Unchanged(
        "no activation variance"
    )


@pytest.mark.parametrize("kind", ["unaligned", "base"])
def test_zero_safety_vector(kind: str) -> None:
    lssf = method(safety_vector=kind)
    edit = lssf.edit(with_safety(torch.zeros(3, 3).double()), given(diagonal(3, 2, 1)))
    assert edit == Unchanged("safety vector is zero")


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_eta_one_keeps_whatever_has_energy(kept: int) -> None:
    energies = [3.0, 2.0, 1.0][:kept] + [0.0] * (3 - kept)
    edit = method(standardize="none", eta=1.0).edit(with_safety(EYE), given(diagonal(*energies)))
    assert rank_of(edit) == kept


def test_eta_zero_keeps_one_direction() -> None:
    edit = method(standardize="none", eta=0.0).edit(with_safety(EYE), given(diagonal(3, 2, 1)))
    assert rank_of(edit) == 1


def test_rank_is_limited_by_tokens_less_one_for_centring() -> None:
    z = matrix(8, 4, seed=1)
    layer = with_safety(matrix(8, 8, seed=2))
    assert rank_of(method(eta=1.0).edit(layer, given(output_moments(z)))) == 3
    uncentred = method(standardize="none", eta=1.0)
    assert rank_of(uncentred.edit(layer, given(output_moments(z)))) == 4
    token = method(standardize="token", eta=1.0)
    assert rank_of(token.edit(layer, given(token_moments(matrix(8, 50, seed=3))))) == 7


def test_token_standardisation_cannot_reach_the_all_ones_direction() -> None:
    z = matrix(6, 80, seed=4) + 2
    lssf = method(standardize="token", eta=1.0)
    p = edit_of(lssf, with_safety(torch.eye(6).double()), given(token_moments(z)))
    assert float((p @ torch.ones(6).double()).norm()) < 1e-10


def test_dead_neurons_have_no_part_in_the_basis() -> None:
    z = matrix(4, 60, seed=5)
    z[2] *= 1e-9
    p = edit_of(method(eta=1.0), with_safety(torch.eye(4).double()), given(output_moments(z)))
    assert float(p[2].norm()) < 1e-12
    assert float(p[:, 2].norm()) < 1e-12
    z[2] *= 1e4  # 1e-5 of the liveliest: alive
    p = edit_of(method(eta=1.0), with_safety(torch.eye(4).double()), given(output_moments(z)))
    assert torch.allclose(p, torch.eye(4).double(), atol=1e-9)


def test_constant_neurons_beside_live_ones_are_dead_and_not_unit_noise() -> None:
    """The rounding left of mean^2 - mean^2 must not be scaled up to variance 1."""
    z = matrix(40, 61, seed=6)
    z[4:] = 3e4 * matrix(36, 1, seed=7).expand(36, 61)
    p = edit_of(method(eta=1.0), with_safety(torch.eye(40).double()), given(output_moments(z)))
    live = torch.diag((torch.arange(40) < 4).double())
    assert torch.allclose(p, live, atol=1e-9)


def test_tall_basis_stays_orthonormal_far_down_the_spectrum() -> None:
    u, _ = torch.linalg.qr(matrix(30, 6, seed=8))
    v, _ = torch.linalg.qr(matrix(6, 6, seed=9))
    weight = (u * torch.logspace(0, -5.5, 6, dtype=torch.float64)) @ v.T
    moments = input_moments(matrix(6, 80, seed=10))
    found = output_spectrum(moments, weight, "none").basis(6)
    assert torch.allclose(found.T @ found, torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_large_means_do_not_hide_the_spread() -> None:
    """Variance 0.25 around a mean of 300, which float32 sums would get wrong."""
    z = 0.5 * matrix(6, 400, seed=7)
    layer = with_safety(matrix(6, 6, seed=8))
    near = edit_of(method(), layer, given(output_moments(z)))
    far = edit_of(method(), layer, given(output_moments(z + 300)))
    assert error(far, near) < 1e-7


def test_too_few_tokens_and_missing_statistics() -> None:
    layer, z = with_safety(EYE), matrix(3, 255, seed=9)
    lssf = method(min_tokens=256)
    assert lssf.edit(layer, given(output_moments(z))) == Unchanged("too few tokens")
    enough = torch.cat([z, z[:, :1]], dim=1)
    assert rank_of(lssf.edit(layer, given(output_moments(enough)))) != 0
    assert lssf.edit(layer, NO_STATISTICS) == Unchanged("no activation statistics")


def test_alpha_zero_is_no_edit() -> None:
    edit = method(alpha=0.0).edit(with_safety(EYE), given(diagonal(3, 2, 1)))
    assert edit == Unchanged("alpha is 0")


def test_fine_tune_equal_to_aligned_is_still_edited() -> None:
    edit = method().edit(with_safety(EYE, torch.zeros(3, 3).double()), given(diagonal(3, 2, 1)))
    assert isinstance(edit, LowRank | Dense)
    assert edit.facts["projected_task"] is None


@pytest.mark.parametrize("standardize", ["neuron", "none"])
@pytest.mark.parametrize("tokens", [3, 6, 100])
def test_tall_layers_use_the_input_side_with_the_same_result(standardize: str, tokens: int) -> None:
    layer = layer_of((30, 6), seed=10)
    assert layer.aligned is not None
    x: Tensor = matrix(6, tokens, seed=11) + 2
    for settings in ({"eta": 0.85, "alpha1": 2.0}, {"eta": 1.0}):
        lssf = method(standardize=standardize, **settings)
        left = lssf.edit(layer, given(output_moments(layer.aligned @ x)))
        right = lssf.edit(layer, given(input_moments(x)))
        assert rank_of(left) == rank_of(right)
        assert error(full(right), full(left)) <= 1e-9


def test_inputs_are_left_as_they_were() -> None:
    layer, moments = layer_of((6, 4), seed=12), input_moments(matrix(4, 30, seed=13))
    before = [t.clone() for t in (layer.finetuned, layer.aligned, layer.unaligned, moments.s2)]  # type: ignore[union-attr]
    edit_of(method(), layer, given(moments))
    after = (layer.finetuned, layer.aligned, layer.unaligned, moments.s2)
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("standardize", ["neuron", "token", "none"])
@pytest.mark.parametrize("tokens", [5, 40])
def test_moments_may_be_given_away_and_are_kept_otherwise(standardize: str, tokens: int) -> None:
    layer = layer_of((20, 9), seed=30)
    assert layer.aligned is not None
    x: Tensor = matrix(9, tokens, seed=31) + 1
    if standardize == "token":
        kinds = [token_moments(layer.aligned @ x)]
    else:
        kinds = [output_moments(layer.aligned @ x), input_moments(x)]
    for moments in kinds:
        before = moments.s2.clone()
        lssf = method(standardize=standardize)
        kept = edit_of(lssf, layer, given(moments))
        assert torch.equal(moments.s2, before)
        gone = edit_of(lssf, layer, Statistics({KEY: moments}, disposable=True))
        assert torch.equal(kept, gone)


def test_few_tokens_are_decomposed_on_their_own_side_with_the_same_result() -> None:
    layer = layer_of((40, 50), seed=32)
    assert layer.aligned is not None
    z = layer.aligned @ (matrix(50, 12, seed=33) + 1)
    found = output_spectrum(output_moments(z), layer.aligned, "neuron")
    assert found.energies.numel() == 11  # tokens, less one for the mean
    rank, p, edit = dense_lssf(
        z, layer.safety_vector("unaligned"), standardize="neuron", eta=0.85, alpha1=1.0, alpha=1.0
    )
    basis = found.basis(rank)
    assert torch.allclose(basis @ basis.T, p, atol=1e-10)
    assert error(edit_of(method(), layer, given(output_moments(z))), edit) < 1e-10
