"""LSSF against a dense reference, its hand examples and its invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st
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
from realign.repair.edit import Dense, LowRank
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.scatter import output_spectrum
from realign.repair.preparation import Statistics
from realign.subspace.entropy import total_entropy

Z = torch.tensor([[1, -1, 1, -1], [2, -2, 2, -2], [1, 1, -1, -1]], dtype=torch.float64)
DELTA = torch.tensor([[2, 0], [0, 2], [1, 1]], dtype=torch.float64)


def method(**settings: object) -> Lssf:
    plain = Lssf(safety_vector="unaligned", min_tokens=1)
    return Lssf(**{**plain.settings(), **settings})


def moments_of(z: Tensor, standardize: str) -> Moments:
    return token_moments(z) if standardize == "token" else output_moments(z)


@pytest.mark.parametrize(
    ("standardize", "eta", "alpha1", "energies", "share", "r", "expected"),
    [
        ("neuron", 0.8, 1, (2, 1, 0), 0.424673, 2, [[1, 1], [1, 1], [1, 1]]),
        ("neuron", 0.8, 2, (2, 1, 0), 0.424673, 2, [[4, 4], [4, 4], [1, 1]]),
        ("neuron", 0.4, 2, (2, 1, 0), 0.424673, 1, [[4, 4], [4, 4], [0, 0]]),
        ("none", 0.8, 1, (20, 4, 0), 0.337212, 2, [[0.4, 0.8], [0.8, 1.6], [1, 1]]),
        ("none", 0.8, 2, (20, 4, 0), 0.337212, 2, [[1.6, 3.2], [3.2, 6.4], [1, 1]]),
        ("token", 0.8, 1, (10.535574, 1.464426, 0), 0.308028, 2, [[1, -1], [-1, 1], [0, 0]]),
    ],
)
def test_hand_example(
    standardize: str,
    eta: float,
    alpha1: float,
    energies: tuple[float, ...],
    share: float,
    r: int,
    expected: list[list[float]],
) -> None:
    moments = moments_of(Z, standardize)
    found = output_spectrum(moments, torch.zeros(3, 2), standardize).energies
    assert found.tolist() == pytest.approx(energies, abs=1e-6)
    p1 = float(found[0] / found.sum())
    assert -p1 * torch.tensor(p1, dtype=torch.float64).log() / total_entropy(
        found
    ) == pytest.approx(share, abs=1e-6)
    lssf = method(standardize=standardize, eta=eta, alpha1=float(alpha1))
    edit = lssf.edit(with_safety(DELTA), given(moments))
    assert isinstance(edit, LowRank | Dense)
    assert edit.facts["rank"] == r
    assert torch.allclose(full(edit), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize(
    ("eta", "r", "expected"),
    [(0.75, 2, [[4, 8], [3, 4], [0, 0]]), (0.8, 3, [[4, 8], [6.75, 9], [5, 6]])],
)
def test_hand_example_of_a_given_scatter(eta: float, r: int, expected: list[list[float]]) -> None:
    c = torch.diag(torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))
    moments = Moments(4, torch.zeros(3, dtype=torch.float64), c, "output")
    delta = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.float64)
    lssf = method(standardize="none", eta=eta, alpha1=2.0)
    edit = lssf.edit(with_safety(delta), given(moments))
    assert isinstance(edit, LowRank | Dense)
    assert edit.facts["rank"] == r
    assert torch.allclose(full(edit), torch.tensor(expected, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
@pytest.mark.parametrize("standardize", ["neuron", "none", "token"])
@pytest.mark.parametrize("tokens", [5, 200])
def test_equals_the_dense_reference(shape: tuple[int, int], standardize: str, tokens: int) -> None:
    layer = layer_of(shape, seed=3)
    assert layer.aligned is not None
    x = matrix(shape[1], tokens, seed=4) * torch.linspace(0.2, 3, shape[1])[:, None] + 0.7
    z = layer.aligned @ x
    delta = layer.safety_vector("unaligned")
    for eta, alpha1, alpha in [(0.5, 1.0, 1.0), (0.85, 2.5, 0.7), (0.95, 1.5, 2.0)]:
        lssf = method(standardize=standardize, eta=eta, alpha1=alpha1, alpha=alpha)
        r, _, expected = dense_lssf(
            z, delta, standardize=standardize, eta=eta, alpha1=alpha1, alpha=alpha
        )
        routes = [moments_of(z, standardize)]
        if standardize != "token":
            routes.append(input_moments(x))
        for moments in routes:
            edit = lssf.edit(layer, given(moments))
            assert isinstance(edit, LowRank | Dense)
            assert edit.facts["rank"] == r, moments.kind
            assert error(full(edit), expected) <= 1e-10, (moments.kind, eta)


@pytest.mark.parametrize("shape", [(12, 12), (8, 20), (20, 8)])
def test_float32_and_bf16_weights_stay_within_tolerance(shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer_of(shape, seed=5, dtype=dtype)
        assert layer.aligned is not None
        assert layer.unaligned is not None
        x = matrix(shape[1], 100, seed=6)
        z = layer.aligned.double() @ x
        delta = layer.aligned.double() - layer.unaligned.double()
        settings = {"standardize": "neuron", "eta": 0.85, "alpha1": 2.0, "alpha": 1.0}
        _, _, expected = dense_lssf(z, delta, **settings)  # type: ignore[arg-type]
        edit = method(**settings).edit(layer, given(input_moments(x)))
        assert full(edit).dtype == torch.float32
        assert error(full(edit), expected) <= 1e-4


def test_p_prime_has_the_squared_weights_as_eigenvalues() -> None:
    z = matrix(7, 50, seed=7)
    identity = torch.eye(7, dtype=torch.float64)
    plain = edit_of(method(eta=0.6), with_safety(identity), given(output_moments(z)))
    assert torch.allclose(plain @ plain, plain, atol=1e-12)
    lssf = method(eta=0.6, alpha1=2.0)
    edit = lssf.edit(with_safety(identity), given(output_moments(z)))
    assert isinstance(edit, Dense)
    r = int(edit.facts["rank"] or 0)
    sigma = output_spectrum(output_moments(z), identity, "neuron").energies[:r].sqrt()
    weights = 1 + (sigma - sigma[-1]) / (sigma[0] - sigma[-1])
    values = torch.linalg.eigvalsh(full(edit)).flip(0)
    assert torch.allclose(values[:r], weights.square(), atol=1e-10)
    assert torch.allclose(values[r:], torch.zeros(7 - r, dtype=torch.float64), atol=1e-10)


def test_tall_layer_at_full_entropy_projects_on_the_columns_of_the_weight() -> None:
    layer = layer_of((9, 4), seed=8)
    assert layer.aligned is not None
    x = matrix(4, 60, seed=9)
    found = edit_of(method(standardize="none", eta=1.0), layer, given(input_moments(x)))
    q, _ = torch.linalg.qr(layer.aligned)
    assert error(found, q @ q.T @ layer.safety_vector("unaligned")) <= 1e-10


def test_base_and_unaligned_vectors_are_different_edits() -> None:
    layer = layer_of((6, 6), seed=10)
    x = given(input_moments(matrix(6, 40, seed=11)))
    for kind in ("base", "unaligned"):
        lssf = method(standardize="none", eta=1.0, safety_vector=kind)
        assert error(edit_of(lssf, layer, x), layer.safety_vector(kind)) <= 1e-10


@settings(max_examples=25, deadline=None)
@given_by(st.integers(0, 1000), st.sampled_from(["neuron", "none", "token"]), st.integers(-10, 10))
def test_order_of_tokens_and_scale_of_outputs_do_not_matter(
    seed: int, standardize: str, exponent: int
) -> None:
    z = matrix(5, 30, seed=seed) * torch.tensor([3, 2, 1, 0.5, 0.2])[:, None] + 1
    layer, lssf = with_safety(matrix(5, 4, seed=seed + 1)), method(standardize=standardize)
    expected = edit_of(lssf, layer, given(moments_of(z, standardize)))
    shuffled = z[:, torch.randperm(30, generator=torch.Generator().manual_seed(seed))]
    scaled = given(moments_of(shuffled * 2.0**exponent, standardize))
    assert error(edit_of(lssf, layer, scaled), expected) <= 1e-9


@settings(max_examples=25, deadline=None)
@given_by(st.integers(0, 1000))
def test_neuron_standardisation_ignores_scale_and_shift_of_every_output(seed: int) -> None:
    z, layer = matrix(5, 30, seed=seed), with_safety(matrix(5, 4, seed=seed + 1))
    expected = edit_of(method(), layer, given(output_moments(z)))
    scale = matrix(5, 1, seed=seed + 2).abs() + 0.1
    moved = scale * z + 3 * matrix(5, 1, seed=seed + 3)
    assert error(edit_of(method(), layer, given(output_moments(moved))), expected) <= 1e-9


@settings(max_examples=25, deadline=None)
@given_by(st.integers(0, 1000), st.sampled_from(["neuron", "none", "token"]))
def test_permuting_neurons_permutes_the_edit(seed: int, standardize: str) -> None:
    z, delta = matrix(6, 30, seed=seed), matrix(6, 4, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    lssf = method(standardize=standardize, alpha1=2.0)
    one = edit_of(lssf, with_safety(delta), given(moments_of(z, standardize)))
    two = edit_of(lssf, with_safety(delta[order]), given(moments_of(z[order], standardize)))
    assert error(two, one[order]) <= 1e-9


def test_batches_merge_to_the_same_edit_and_two_runs_to_the_same_bytes() -> None:
    z, layer = matrix(6, 40, seed=12), with_safety(matrix(6, 4, seed=13))
    whole = edit_of(method(), layer, given(output_moments(z)))
    split = output_moments(z[:, :7]).merge(output_moments(z[:, 7:]))
    assert error(edit_of(method(), layer, given(split)), whole) <= 1e-10
    assert torch.equal(edit_of(method(), layer, given(output_moments(z))), whole)


def test_rank_rules_and_the_upper_limit() -> None:
    z = torch.linalg.qr(matrix(6, 6, seed=14))[0] * torch.tensor([6.0, 5, 4, 3, 2, 1])
    layer = with_safety(matrix(6, 4, seed=15))

    def rank(**settings: object) -> object:
        edit = method(standardize="none", **settings).edit(layer, given(output_moments(z)))
        assert isinstance(edit, LowRank | Dense)
        return edit.facts["rank"]

    assert rank(rank_rule=2) == 2
    assert rank(rank_rule=50) == 6
    assert rank(rank_rule="energy", eta=0.5) == 2  # 36 + 25 of 91
    entropy = rank(eta=0.9)
    assert isinstance(entropy, int)
    assert entropy > 3
    assert rank(eta=0.9, max_rank=3) == 3


def test_facts_of_the_report() -> None:
    layer = layer_of((8, 6), seed=16)
    assert layer.aligned is not None
    x = matrix(6, 4, seed=17)
    edit = method(eta=0.7).edit(layer, given(input_moments(x)))
    assert isinstance(edit, LowRank | Dense)
    z = layer.aligned @ x
    r, p, expected = dense_lssf(
        z,
        layer.safety_vector("unaligned"),
        standardize="neuron",
        eta=0.7,
        alpha1=1.0,
        alpha=1.0,
    )
    delta, task = layer.safety_vector("unaligned"), layer.task_vector()
    assert edit.facts["rank"] == r
    assert edit.facts["available_rank"] == 3  # four tokens, less one for centring
    assert edit.facts["tokens"] == 4
    assert edit.facts["tokens_per_output"] == 0.5
    assert edit.facts["projected_safety"] == pytest.approx(float(expected.norm() / delta.norm()))
    assert edit.facts["projected_task"] == pytest.approx(float((p @ task).norm() / task.norm()))
    assert edit.facts["degenerate_cut"] is False


def test_degenerate_cut_is_recorded() -> None:
    c = torch.diag(torch.tensor([4.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    moments = Moments(9, torch.zeros(4, dtype=torch.float64), c, "output")
    edit = method(standardize="none", rank_rule=2).edit(
        with_safety(matrix(4, 9, seed=1)), given(moments)
    )
    assert isinstance(edit, LowRank)
    assert edit.facts["degenerate_cut"] is True


def test_low_rank_while_it_is_smaller_then_dense() -> None:
    z, delta = matrix(20, 100, seed=18), matrix(20, 20, seed=19)
    for rank, kind in [(9, LowRank), (10, Dense)]:  # 9 * 40 < 400 = 10 * 40
        edit = method(rank_rule=rank).edit(with_safety(delta), given(output_moments(z)))
        assert type(edit) is kind
        assert int(torch.linalg.matrix_rank(full(edit))) == rank


def test_prepare_asks_for_what_its_options_say() -> None:
    class Bench:
        asked: tuple[str, str, str] | None = None

        def moments(self, *, role: str, standardize: str, tokens: str) -> Statistics:
            self.asked = (role, standardize, tokens)
            return given(output_moments(Z))

    bench = Bench()
    statistics = method(standardize="token", tokens="all").prepare(bench)
    assert bench.asked == ("aligned", "token", "all")
    assert statistics.moments(KEY) is not None
