from __future__ import annotations

import dataclasses

import pytest
import torch
from support.obs_support import Bench
from support.subspace_support import KEY, error, given, input_moments, layer_of, matrix, repaired
from torch import Tensor

from realign.errors import MismatchError, UsageError
from realign.model.moments import Moments
from realign.repair.edit import Layer, LoraFactors, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.nlsr import Nlsr
from realign.repair.methods.regions import region_of
from realign.repair.preparation import Statistics


def region_by_definition(weight: Tensor, x: Tensor, q: float) -> Tensor:
    """Top directions by a full SVD of W X; the region by sorting (value, column, row)."""
    z = weight.double() @ x
    u, sigma, _ = torch.linalg.svd(z, full_matrices=False)
    r = min(int(q * min(weight.shape) + 1e-9), int((sigma > 1e-9 * sigma[0]).sum()))
    w_hat = (u[:, :r] @ u[:, :r].T @ weight.double()).abs()
    rows, width = weight.shape
    count = weight.numel() - -int(-(q * weight.numel() - 1e-9) // 1)
    places = [(-float(w_hat[i, j]), j, i) for j in range(width) for i in range(rows)]
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for _, j, i in sorted(places)[:count]:
        mask[i, j] = True
    return mask


def with_reference(layer: Layer, *, seed: int = 50) -> Layer:
    shape = (layer.finetuned.shape[0], layer.finetuned.shape[1])
    moved = layer.require("aligned") + matrix(*shape, seed=seed, scale=0.1).to(layer.finetuned)
    return dataclasses.replace(layer, reference=moved)


SCORES = {"m1": {"cosine": 0.9}, "m2": {"cosine": 0.1}, "m3": {"cosine": 0.5}}


# ---- selection ---------------------------------------------------------------------------------


def test_by_hand_the_least_similar_modules_are_chosen() -> None:
    assert Nlsr(fraction=0.5).select(SCORES) == {"m2", "m3"}
    assert Nlsr(fraction=0.1).select(SCORES) == {"m2"}
    assert Nlsr(fraction=0.0).select(SCORES) == frozenset()
    assert Nlsr(fraction=1.0).select(SCORES) == set(SCORES)


def test_by_hand_probabilities_rise_as_similarity_falls() -> None:
    # The public code's ranking is inverted: it gives .7, .3, .5.
    cosines = {key: each["cosine"] for key, each in SCORES.items()}
    found = Nlsr(selection="bernoulli").probabilities(cosines)
    assert found == pytest.approx({"m1": 0.3, "m2": 0.7, "m3": 0.5})
    assert Nlsr(spread=0.2, fraction=0.1).probabilities({"only": 0.4}) == {"only": 0.1}
    assert Nlsr(fraction=0.9).probabilities(cosines) == pytest.approx(
        {"m1": 0.7, "m2": 1.0, "m3": 0.9}
    )


def test_equal_similarities_go_by_name() -> None:
    same = {key: {"cosine": 0.5} for key in ("b", "c", "a", "d")}
    assert Nlsr(fraction=0.5).select(same) == {"a", "b"}


def test_draws_belong_to_the_module_and_not_to_its_place() -> None:
    layers = [dataclasses.replace(with_reference(layer_of((6, 8))), key=f"m{i}") for i in range(9)]
    moments = {layer.key: input_moments(matrix(8, 40, seed=1)) for layer in layers}
    method = Nlsr(selection="bernoulli", reference="reference", space="merged")

    def draws(order: list[Layer], seed: int = 0) -> dict[str, float]:
        statistics = method.prepare(Bench(moments, layers=order, seed=seed))
        return {key: each["draw"] for key, each in statistics.scores.items()}

    there, back = draws(layers), draws(layers[::-1])
    assert there == back
    assert len(set(there.values())) == 9
    assert draws(layers, seed=1) != there
    scores = method.prepare(Bench(moments, layers=layers)).scores
    chances = method.probabilities({key: each["cosine"] for key, each in scores.items()})
    assert method.select(scores) == {key for key in scores if there[key] < chances[key]}


# ---- regions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (8, 8)])
@pytest.mark.parametrize("q", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("tokens", [3, 60])
def test_the_region_is_what_the_definition_says(
    shape: tuple[int, int], q: float, tokens: int
) -> None:
    weight, x = matrix(*shape, seed=1), matrix(shape[1], tokens, seed=2)
    found = region_of(weight, input_moments(x), q, overwrite=False)
    assert found is not None
    assert torch.equal(found, region_by_definition(weight, x, q))


@pytest.mark.parametrize(("q", "size"), [(0.0, 35), (0.8, 7), (0.5, 17), (0.99, 0), (1.0, 0)])
def test_a_region_has_exactly_its_size(q: float, size: int) -> None:
    weight = torch.ones(5, 7).double()  # every entry of W_hat is equal
    mask = region_of(weight, input_moments(matrix(7, 30, seed=1)), q, overwrite=False)
    assert mask is not None
    assert int(mask.sum()) == size


def test_a_weight_without_outputs_has_no_region_not_a_random_one() -> None:
    weight = torch.ones(2, 4).double()
    nothing = region_of(0 * weight, input_moments(matrix(4, 30, seed=1)), 0.6, overwrite=False)
    assert nothing is None


# ---- transplanting -----------------------------------------------------------------------------


def test_outside_the_region_the_fine_tune_stays_bit_for_bit_inside_is_the_reference() -> None:
    layer, x = with_reference(layer_of((8, 10), dtype=torch.float32)), matrix(10, 60, seed=3)
    method = Nlsr(b=0.0, reference="reference", space="merged")
    found = repaired(method, layer, given(input_moments(x)))
    assert layer.reference is not None
    mask = region_by_definition(layer.reference, x, 0.8)
    assert int(mask.sum()) == 16
    assert torch.equal(found[~mask], layer.finetuned[~mask])
    assert torch.equal(found[mask], layer.reference[mask])


def test_it_repairs_once_and_for_all() -> None:
    layer, statistics = (
        with_reference(layer_of((8, 10))),
        given(input_moments(matrix(10, 60, seed=3))),
    )
    method = Nlsr(reference="reference", space="merged")
    once = dataclasses.replace(layer, finetuned=repaired(method, layer, statistics))
    again = method.edit(once, statistics)
    assert again == Unchanged("what it would write is what stands there")


def test_everything_of_every_module_is_the_reference() -> None:
    layer, statistics = (
        with_reference(layer_of((8, 10))),
        given(input_moments(matrix(10, 60, seed=3))),
    )
    for b in (0.0, 0.9):
        method = Nlsr(q=0.0, b=b, fraction=1.0, reference="reference", space="merged")
        aligned, strong = layer.require("aligned"), layer.require("reference")
        expected = strong + b * (strong - aligned)
        assert error(repaired(method, layer, statistics), expected) < 1e-15
    back = Nlsr(q=0.0, fraction=1.0, reference="aligned", space="merged")
    assert torch.equal(repaired(back, layer, statistics), layer.require("aligned"))


def test_without_a_reference_the_aligned_model_is_extrapolated_away_from_the_unaligned() -> None:
    layer, statistics = layer_of((8, 10)), given(input_moments(matrix(10, 60, seed=3)))
    method = Nlsr(q=0.0, b=0.9, reference="unaligned", space="merged")
    aligned, unaligned = layer.require("aligned"), layer.require("unaligned")
    assert error(repaired(method, layer, statistics), aligned + 0.9 * (aligned - unaligned)) < 1e-15


def test_in_mixed_dtypes_nothing_outside_the_region_is_rounded() -> None:
    layer = with_reference(layer_of((8, 10), dtype=torch.float32))
    assert layer.reference is not None
    assert layer.aligned is not None
    layer = dataclasses.replace(
        layer,
        reference=layer.reference.bfloat16(),
        aligned=layer.aligned.bfloat16(),
    )
    method = Nlsr(b=0.0, reference="reference", space="merged")
    found = repaired(method, layer, given(input_moments(matrix(10, 60, seed=3))))
    kept = found == layer.finetuned
    assert int(kept.sum()) == 64
    assert torch.equal(found[~kept], layer.require("reference").float()[~kept])


def test_a_module_that_was_not_chosen_says_how_similar_it_is() -> None:
    layer = with_reference(layer_of((8, 10)))
    moments = given(input_moments(matrix(10, 60, seed=3)))
    statistics = dataclasses.replace(
        moments, scores={KEY: {"cosine": 0.25, "draw": 0.0}}, selection=frozenset()
    )
    edit = Nlsr(reference="reference", space="merged").edit(layer, statistics)
    assert edit == Unchanged("not among the least similar modules: cosine 0.250")
    none = Nlsr(fraction=0.0, reference="reference", space="merged").edit(layer, moments)
    assert none == Unchanged("fraction is 0")


# ---- scores ------------------------------------------------------------------------------------


def test_the_score_is_the_cosine_of_both_changes_inside_the_region() -> None:
    layer, x = with_reference(layer_of((8, 10))), matrix(10, 60, seed=3)
    method = Nlsr(b=0.9, reference="reference", space="merged")
    reference = method.reference_weight(layer)
    mask = region_by_definition(reference, x, 0.8)
    one = (layer.finetuned - layer.require("aligned"))[mask]
    two = (reference - layer.require("aligned"))[mask]
    expected = float(one @ two / (one.norm() * two.norm()))
    assert method.score(layer, given(input_moments(x))) == pytest.approx(expected, rel=1e-12)


def test_a_reference_that_is_the_aligned_weight_is_compared_by_the_weights_themselves() -> None:
    layer, statistics = layer_of((8, 10)), given(input_moments(matrix(10, 60, seed=3)))
    method = Nlsr(reference="aligned", space="merged")
    aligned = layer.require("aligned")
    scores = [
        method.score(
            dataclasses.replace(layer, finetuned=aligned + far * layer.task_vector()), statistics
        )
        for far in (0.1, 1.0, 5.0)
    ]
    assert all(isinstance(each, float) for each in scores)
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]


def test_modules_that_nothing_touched_are_not_counted() -> None:
    touched = with_reference(layer_of((8, 10)))
    same = dataclasses.replace(touched, key="same", finetuned=touched.aligned)
    unmoved = dataclasses.replace(touched, key="unmoved", reference=touched.aligned)
    cold = dataclasses.replace(touched, key="cold")
    lost = dataclasses.replace(touched, key="lost")
    x = input_moments(matrix(10, 60, seed=3))
    none = Moments(0, torch.zeros(10).double(), torch.zeros(10, 10).double(), "input")
    bench = Bench(
        {KEY: x, "same": x, "unmoved": x, "cold": none},
        layers=[touched, same, unmoved, cold, lost],
    )
    method = Nlsr(reference="reference", space="merged")
    statistics = method.prepare(bench)
    assert set(statistics.scores) == {KEY}
    reasons = [method.edit(each, statistics) for each in (same, unmoved, cold, lost)]
    assert [each.reason for each in reasons if isinstance(each, Unchanged)] == [
        "task vector is zero",
        "the reference does not differ from the aligned model here",
        "no token reached it",
        "no activation statistics",
    ]


# ---- adapters ----------------------------------------------------------------------------------


def adapters(rank: int = 3) -> Layer:
    layer = layer_of((16, 20))
    own = LoraFactors(matrix(3, 20, seed=1), matrix(16, 3, seed=2), 2.0)
    strong = LoraFactors(matrix(rank, 20, seed=3), matrix(16, rank, seed=4), 0.5)
    return dataclasses.replace(
        layer,
        finetuned=layer.require("aligned") + own.product(),
        reference=layer.require("aligned") + strong.product(),
        lora=own,
        reference_lora=strong,
    )


def test_a_reference_adapter_is_amplified_on_its_product() -> None:
    layer, statistics = adapters(), given(input_moments(matrix(20, 60, seed=3)))
    method = Nlsr(q=0.0, b=0.9, fraction=1.0, reference="reference", space="adapter")
    edit = method.edit(layer, statistics)
    assert isinstance(edit, LowRank)
    assert layer.lora is not None
    assert layer.reference_lora is not None
    change = layer.lora.product().double() + edit.dense()
    assert error(change, 1.9 * layer.reference_lora.product().double()) < 1e-6
    merged = dataclasses.replace(method, space="merged")
    by_weights = repaired(merged, layer, statistics) - layer.require("aligned")
    assert error(change, by_weights) < 1e-6


def test_masks_lie_on_both_factors_and_their_values_come_from_the_reference() -> None:
    layer, x = adapters(), matrix(20, 60, seed=3)
    method = Nlsr(b=0.9, reference="reference", space="adapter")
    edit = method.edit(layer, given(input_moments(x)))
    assert isinstance(edit, LowRank)
    own, strong = layer.lora, layer.reference_lora
    assert own is not None
    assert strong is not None
    up_e, down_e = 1.9 * 0.5 / 2.0 * strong.up, strong.down
    in_down = region_by_definition(down_e, x, 0.8)
    in_up = region_by_definition(up_e, down_e @ x, 0.8)
    down = torch.where(in_down, down_e, own.down)
    up = torch.where(in_up, up_e, own.up)
    expected = 2.0 * (up @ down - own.up @ own.down)
    assert edit.rank == 6
    assert error(edit.dense(), expected) < 1e-12
    one, two = (in_up * own.up) @ (in_down * own.down), (in_up * up_e) @ (in_down * down_e)
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    assert method.score(layer, given(input_moments(x))) == pytest.approx(cosine, rel=1e-10)


def test_adapters_of_different_ranks_do_not_correspond() -> None:
    method = Nlsr(reference="reference", space="adapter")
    with pytest.raises(MismatchError, match=r"rank 3, the reference's 2"):
        method.edit(adapters(rank=2), given(input_moments(matrix(20, 60, seed=3))))


# ---- what is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "chosen"),
    [
        ({"reference", "unaligned", "aligned"}, "reference"),
        ({"unaligned", "aligned"}, "unaligned"),
        ({"aligned"}, "aligned"),
    ],
)
def test_the_reference_is_the_best_that_was_given(roles: set[str], chosen: str) -> None:
    settled = Nlsr().settled(Given(frozenset(roles)))
    assert settled.method.settings()["reference"] == chosen
    assert settled.method.required_roles() == {"aligned", chosen}
    assert bool(settled.note) is (chosen != "reference")


def test_what_was_asked_for_and_not_given_is_named() -> None:
    with pytest.raises(UsageError, match="needs the reference model") as caught:
        Nlsr(reference="reference").settled(Given(frozenset({"aligned"})))
    assert "--reference" in caught.value.hint
    both = Given(frozenset({"aligned", "reference"}), adapter=True, reference_adapter=True)
    assert Nlsr().settled(both).method.settings()["space"] == "adapter"
    one = dataclasses.replace(both, reference_adapter=False)
    assert Nlsr().settled(one).method.settings()["space"] == "merged"
    with pytest.raises(UsageError, match="both LoRA adapters"):
        Nlsr(space="adapter").settled(one)


def test_settings_that_repair_nothing_are_refused() -> None:
    for settings in ({"fraction": 0.0}, {"q": 1.0}):
        with pytest.raises(UsageError, match="would change nothing"):
            Nlsr(**settings).check_settings()
    Nlsr().check_settings()


@pytest.mark.parametrize(
    ("reference", "role"),
    [("reference", "reference"), ("unaligned", "aligned"), ("aligned", "aligned")],
)
def test_the_model_that_runs_is_the_reference_where_there_is_one(reference: str, role: str) -> None:
    bench = Bench({})
    Nlsr(reference=reference, space="merged", samples=3).prepare(bench)
    assert bench.asked == [("input_moments", role, "safe", "response", False, 3)]


def test_b_of_zero_takes_the_strong_model_as_it_is() -> None:
    layer = with_reference(layer_of((4, 5)))
    assert Nlsr(b=0.0, reference="reference").reference_weight(layer) is layer.reference
    unextrapolated = Nlsr(b=0.0, reference="unaligned")
    assert unextrapolated.reference_weight(layer) is layer.aligned
    assert unextrapolated.required_roles() == {"aligned"}


def test_moments_that_may_be_overwritten_give_the_same() -> None:
    layer, x = with_reference(layer_of((8, 10))), matrix(10, 60, seed=3)
    method = Nlsr(reference="reference", space="merged")
    kept = repaired(method, layer, given(input_moments(x)))
    spent = Statistics({KEY: input_moments(x)}, disposable=True)
    assert torch.equal(repaired(method, layer, spent), kept)
