"""SOMF: masks on one and several task vectors, the losses, the training, and real repairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from support.subspace_support import KEY, layer_of, matrix, repaired
from support.training_support import (
    DRIFTED,
    TINY,
    encoded,
    live,
    refusals,
    repair_tiny,
    rows,
    weights_of,
    write_rows,
)
from torch import Tensor

from realign.errors import UsageError
from realign.model.chat import EncodedReply
from realign.model.training import TrainingPlan
from realign.progress import SILENT
from realign.repair.edit import Dense, Layer, LoraFactors, LowRank, Unchanged
from realign.repair.method import Given
from realign.repair.methods.short_runs import reply_logprobs
from realign.repair.methods.somf import Somf
from realign.repair.methods.somf_training import (
    Fusion,
    Loss,
    _Dpo,
    _Refusal,
    dpo_loss,
    train_masks,
)
from realign.repair.preparation import Statistics, Workbench
from realign.repair.running import LiveModel
from realign.subspace.concrete import concrete
from realign.subspace.keyed import uniforms
from realign.subspace.merging import magnitude_at

METHOD = Somf(loss="refusal", space="merged", granularity="element", lr=1.0, merge_lambda=0.3)


def trained(x: Tensor, **more: Tensor) -> Statistics:
    return Statistics(tables={"logits": {KEY: x}} | {k: {"thresholds": v} for k, v in more.items()})


def with_(**settings: Any) -> Somf:
    return dataclasses.replace(METHOD, **settings)


@pytest.mark.parametrize("granularity", ["row", "element"])
@pytest.mark.parametrize("value", [-3.0, -0.5, 0.0, 2.0])
def test_a_constant_soft_mask_is_the_fine_tune(granularity: str, value: float) -> None:
    layer = layer_of((5, 7))
    x = torch.full((5, 7 if granularity == "element" else 1), value, dtype=torch.float64)
    found = repaired(with_(mode="soft", granularity=granularity), layer, trained(x))
    assert torch.allclose(found, layer.finetuned, atol=1e-12)


def test_hard_masks_that_keep_all_or_nothing() -> None:
    layer = layer_of((5, 7))
    assert layer.aligned is not None
    for value in (0.0, 1e-3, 5.0):
        assert isinstance(METHOD.edit(layer, trained(torch.full((5, 7), value))), Unchanged)
    found = repaired(METHOD, layer, trained(torch.full((5, 7), -1e-3)))
    assert torch.allclose(found, layer.aligned, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_zeros_puts_the_aligned_weight_back_bit_for_bit(dtype: torch.dtype) -> None:
    layer = layer_of((30, 40), dtype=dtype)
    assert layer.aligned is not None
    for rows_only in (True, False):
        x = torch.full((30, 1 if rows_only else 40), -1e-3)
        edit = METHOD.edit(layer, trained(x))
        assert isinstance(edit, Dense) and edit.target is not None
        assert edit.target.dtype == dtype and torch.equal(edit.target, layer.aligned)
    wide = layer_of((30, 40), dtype=torch.float32)
    assert wide.aligned is not None
    summed = wide.finetuned + (wide.aligned - wide.finetuned)
    assert not torch.equal(summed, wide.aligned)  # why the target is needed


def test_hand_example_through_the_edit() -> None:
    delta = torch.tensor([[4.0, -2.0, 1.0, 3.0]], dtype=torch.float64)
    aligned = torch.zeros_like(delta)
    layer = Layer(key=KEY, module="q_proj", layer=0, finetuned=delta, aligned=aligned)
    statistics = trained(torch.tensor([[2.0, -2.0, 0.0, 5.0]], dtype=torch.float64))
    hard = torch.tensor([[16 / 3, 0.0, 4 / 3, 4.0]], dtype=torch.float64)
    assert torch.allclose(repaired(METHOD, layer, statistics), hard)
    soft = torch.tensor([[5.652233, -0.382473, 0.802147, 4.780673]], dtype=torch.float64)
    assert torch.allclose(repaired(with_(mode="soft"), layer, statistics), soft, atol=5e-7)


def test_the_result_does_not_depend_on_the_seed_unless_it_is_drawn() -> None:
    """The published inference drew the mask again, and thresholded a random draw."""
    layer, x = layer_of((40, 30)), matrix(40, 30, seed=9)
    other = dataclasses.replace(layer, seed=7)
    for mode in ("hard", "soft"):
        method = with_(mode=mode)
        assert torch.equal(repaired(method, layer, trained(x)), repaired(method, other, trained(x)))
    drawn = with_(mode="sample")
    first = repaired(drawn, layer, trained(x))
    assert torch.equal(first, repaired(drawn, layer, trained(x)))
    assert not torch.equal(first, repaired(drawn, other, trained(x)))


def fused_layer(count: int, *, dtype: torch.dtype = torch.float64) -> Layer:
    layer = layer_of((6, 8), dtype=dtype)
    assert layer.aligned is not None
    also = [
        layer.aligned + matrix(6, 8, seed=20 + i, scale=0.1).to(dtype) for i in range(count - 1)
    ]
    return dataclasses.replace(layer, also=tuple(also))


def test_several_models_under_a_constant_mask() -> None:
    layer = fused_layer(3)
    assert layer.aligned is not None
    deltas = [each - layer.aligned for each in (layer.finetuned, *layer.also)]
    x = torch.zeros(6, 1)
    sums = layer.aligned + 0.3 * sum(deltas, torch.zeros(6, 8).double())
    assert torch.allclose(repaired(METHOD, layer, trained(x)), sums)
    mean = layer.aligned + sum(deltas, torch.zeros(6, 8).double()) / 3
    assert torch.allclose(repaired(with_(merge="average"), layer, trained(x)), mean)


@pytest.mark.parametrize("merge", ["task_arithmetic", "average", "ties"])
def test_the_order_of_models_does_not_matter(merge: str) -> None:
    layer = fused_layer(3)
    turned = dataclasses.replace(
        layer, finetuned=layer.also[1], also=(layer.finetuned, layer.also[0])
    )
    assert layer.aligned is not None
    vectors = [each - layer.aligned for each in (layer.finetuned, *layer.also)]
    cuts = [magnitude_at(0.2, lambda each=each: [each]) for each in vectors]
    x = matrix(6, 8, seed=3)
    method = with_(merge=merge, mode="soft", merge_lambda=0.4)
    first = repaired(method, layer, trained(x, ties=torch.tensor(cuts)))
    order = torch.tensor([cuts[2], cuts[0], cuts[1]])
    assert torch.allclose(first, repaired(method, turned, trained(x, ties=order)), atol=1e-12)


def test_a_single_model_is_merged_by_no_rule() -> None:
    """In the published code DARE rescaled even a single model."""
    layer, x = layer_of((6, 8)), matrix(6, 8, seed=4)
    plain = repaired(METHOD, layer, trained(x))
    for merge in ("average", "dare", "ties"):
        assert torch.equal(repaired(with_(merge=merge), layer, trained(x)), plain)


def test_dare_is_unbiased_and_seeded() -> None:
    layer = fused_layer(2)
    x, method = torch.zeros(6, 8), with_(merge="dare", dare_drop=0.5)
    seeds = [dataclasses.replace(layer, seed=seed) for seed in range(400)]
    draws = torch.stack([repaired(method, each, trained(x)) for each in seeds])
    plain = repaired(with_(merge="task_arithmetic"), layer, trained(x))
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], repaired(method, layer, trained(x)))
    spread = draws.std(0) / 20
    assert bool(((draws.mean(0) - plain).abs() < 5 * spread + 1e-9).all())


def test_half_precision_deltas_are_taken_in_float32() -> None:
    aligned = torch.full((2, 3), 256.0, dtype=torch.bfloat16)
    finetuned = torch.full((2, 3), 0.0078125, dtype=torch.bfloat16)
    layer = Layer(key=KEY, module="q_proj", layer=0, finetuned=finetuned, aligned=aligned)
    edit = METHOD.edit(layer, trained(torch.tensor([[1.0], [-1.0]])))
    assert isinstance(edit, Dense) and edit.delta.dtype == torch.float32
    # One row kept and doubled, the other back to 256: exact only if the subtraction was.
    assert edit.delta[:, 0].tolist() == [0.0078125 - 256.0, 256.0 - 0.0078125]


def test_the_factors_of_an_adapter() -> None:
    up, down = matrix(6, 2, seed=1).float(), matrix(2, 9, seed=2).float()
    lora = LoraFactors(down=down, up=up, scale=1.5)
    aligned = matrix(6, 9, seed=3).float()
    layer = Layer(
        key=KEY,
        module="q_proj",
        layer=0,
        finetuned=aligned + lora.product(),
        aligned=aligned,
        lora=lora,
    )
    method = with_(space="adapter", mode="soft")
    x_up, x_down = matrix(6, 2, seed=4).float(), matrix(2, 9, seed=5).float()
    statistics = Statistics(tables={"logits_up": {KEY: x_up}, "logits_down": {KEY: x_down}})
    edit = method.edit(layer, statistics)
    assert isinstance(edit, LowRank | Dense)
    masked = [x.sigmoid() / x.sigmoid().mean() * f for x, f in ((x_up, up), (x_down, down))]
    expected = 1.5 * (masked[0] @ masked[1] - up @ down)
    assert torch.allclose(edit.dense(), expected, atol=1e-5)
    ones = Statistics(
        tables={"logits_up": {KEY: torch.zeros(6, 2)}, "logits_down": {KEY: torch.zeros(2, 9)}}
    )
    assert isinstance(with_(space="adapter").edit(layer, ones), Unchanged)


def test_dpo_by_hand() -> None:
    margin, reference = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = torch.log1p(torch.exp(-0.5 * torch.tensor([1.0, -2.0]))).mean()
    assert float(dpo_loss(margin, reference, 0.5)) == pytest.approx(float(expected))


# --- training -----------------------------------------------------------------------------------


class _Toy(Fusion):
    """W' of one matrix, and a loss that its entries raise or lower."""

    def __init__(self, delta: Tensor) -> None:
        self.delta = delta
        self.shapes = {"w": (delta.shape[0], delta.shape[1])}

    def weights(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"w": masks["w"] * self.delta}

    def stored(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(logits)


class _Harm(Loss):
    def __init__(self, harm: Tensor, count: int = 20) -> None:
        super().__init__(count, seed=0)
        self.harm = harm

    def parts(self, indices: Sequence[int], step: int | None) -> list[tuple[float, object]]:
        return [(1.0, indices)]

    def of(self, part: object, weights: Mapping[str, Tensor]) -> Tensor:
        return (self.harm * weights["w"]).sum()


def train_toy(seed: int = 0, **settings: Any) -> tuple[Tensor, dict[str, float]]:
    delta = torch.ones(2, 3)
    harm = torch.tensor([[0.1, 0.1, 0.1], [0.1, 3.0, 0.1]])
    method = with_(**{"lr": 0.05, "epochs": 20, "batch": 4, **settings})
    logits, facts = train_masks(
        method, _Toy(delta), _Harm(harm), seed=seed, device=torch.device("cpu"), progress=SILENT
    )
    return logits["w"], facts


def test_the_harmful_coordinate_ends_lowest() -> None:
    for seed in range(3):
        x, facts = train_toy(seed)
        assert int(x.argmin()) == 4
        assert float(x[1, 1]) < 0 and float(x.flatten()[[0, 1, 2, 3, 5]].min()) > float(x[1, 1])
        assert facts["loss_after"] < facts["loss_before"]


def test_logits_without_a_gradient_stay_zero() -> None:
    """Weights that no loss sees have no decay to move them, nor the moments of others."""
    harm = torch.tensor([[0.1, 3.0, 0.1], [0.0, 0.0, 0.0]])
    method = with_(lr=0.05, epochs=20, batch=4, rescale=False)
    logits, _ = train_masks(
        method,
        _Toy(torch.ones(2, 3)),
        _Harm(harm),
        seed=0,
        device=torch.device("cpu"),
        progress=SILENT,
    )
    assert bool((logits["w"][0] < 0).all()) and not bool(logits["w"][1].any())


def test_masks_are_trained_by_adam_without_decay() -> None:
    method = with_(mode="soft", rescale=False, lr=0.05, epochs=10, batch=4)
    harm = torch.tensor([[0.1, 3.0, 0.1], [0.5, 1.0, 2.0]])
    logits, facts = train_masks(
        method,
        _Toy(torch.ones(2, 3)),
        _Harm(harm),
        seed=3,
        device=torch.device("cpu"),
        progress=SILENT,
    )
    steps = int(facts["steps"])
    assert facts["best_step"] == steps == 50
    x = torch.zeros(2, 3, requires_grad=True)
    plan = TrainingPlan(steps=steps, learning_rate=0.05, warmup=0.1, floor=0.0)
    adam = torch.optim.Adam([x], lr=0.05)
    for step in range(steps):
        drawn = uniforms(6, seed=3, method="somf", key="w", role=f"step {step}").view(2, 3)
        adam.zero_grad()
        (harm * concrete(x, drawn, method.tau)).sum().backward()
        adam.param_groups[0]["lr"] = plan.rate(step)
        adam.step()
    assert float(x.detach().max()) < -0.5  # decay of 1 % at this rate would show
    assert torch.allclose(logits["w"], x.detach(), rtol=1e-5, atol=1e-6)


def test_training_repeats_and_depends_on_its_seed() -> None:
    """The masks of training were never seeded in public code."""
    first, again, other = train_toy(0)[0], train_toy(0)[0], train_toy(1)[0]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_a_better_loss_the_start_is_kept() -> None:
    x, facts = train_toy(epochs=0)
    assert not bool(x.any()) and facts["best_step"] == 0


class _Texts:
    """The texts of a run, ready for a loss."""

    seed, device, progress = 0, torch.device("cpu"), SILENT

    def __init__(self, running: LiveModel) -> None:
        self._examples = {
            "safe": encoded(running, refusals(3)),
            "keep": encoded(running, rows("harmful", 2)),
        }
        harmful = rows("harmful", 4)
        refused = [{**row, "response": "i cannot help with that."} for row in harmful]
        both = encoded(running, refused), encoded(running, harmful)
        self._pairs = list(zip(*both, strict=True))

    def examples(self, data: str, *, role: str) -> Sequence[EncodedReply]:
        return self._examples[data]

    def pairs(self, *, role: str) -> Sequence[tuple[EncodedReply, EncodedReply]]:
        return self._pairs


class _Shrunk(Fusion):
    """Masks on all of the live weights, as if the aligned ones were zero."""

    def __init__(self, running: LiveModel) -> None:
        self._running = running
        self.shapes = {key: (running.weight(key).shape[0], 1) for key in running.keys[:2]}

    def weights(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: masks[key] * self._running.weight(key).detach() for key in self.shapes}

    def stored(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(logits)


@torch.no_grad()
def logprob_by_hand(
    running: LiveModel, reply: EncodedReply, weights: Mapping[str, Tensor] | None = None
) -> float:
    """The summed log-probability of the tokens of one reply."""
    scores = running.logits(torch.tensor([reply.ids]), weights)[0].double().log_softmax(-1)
    places = range(reply.start, len(reply.ids))
    return sum(float(scores[at - 1, reply.ids[at]]) for at in places)


def margin_by_hand(
    running: LiveModel,
    pair: tuple[EncodedReply, EncodedReply],
    weights: Mapping[str, Tensor] | None = None,
) -> float:
    chosen, rejected = (logprob_by_hand(running, reply, weights) for reply in pair)
    return chosen - rejected


def test_the_preference_loss_of_one_pair_by_hand() -> None:
    with live(DRIFTED) as running, torch.no_grad():
        texts = _Texts(running)
        loss = _Dpo(with_(loss="dpo", beta=0.3), cast(Workbench, texts), running)
        weights = {key: 0.9 * running.weight(key) for key in running.keys}
        (pair, *_) = texts.pairs(role="finetuned")
        gain = margin_by_hand(running, pair, weights) - margin_by_hand(running, pair)
        assert abs(gain) > 0.1
        expected = math.log1p(math.exp(-0.3 * gain))
        assert float(loss.of([0], weights)) == pytest.approx(expected, rel=1e-4)


def test_the_refusal_loss_by_hand() -> None:
    """Cross-entropy of refusals, and kl times the divergence of the result from the fusion."""
    with live(DRIFTED) as running, torch.no_grad():
        texts = _Texts(running)
        loss = _Refusal(with_(kl=50.0), cast(Workbench, texts), running)
        weights = {key: 0.9 * running.weight(key) for key in running.keys}
        # One refusal of three is held out, so two are learned, beside both benign texts.
        learned = [texts.examples("safe", role="finetuned")[i] for i in loss.learned]
        assert len(learned) == 2
        entropy = -sum(logprob_by_hand(running, reply, weights) for reply in learned)
        entropy /= sum(len(reply.reply_ids) for reply in learned)
        divergence, places = 0.0, 0
        for reply in texts.examples("keep", role="finetuned"):
            ids = torch.tensor([reply.ids])
            before, after = (
                running.logits(ids, each)[0].double().log_softmax(-1) for each in (None, weights)
            )
            for at in range(reply.start, len(reply.ids)):
                divergence += float((before[at - 1].exp() * (before - after)[at - 1]).sum())
                places += 1
        divergence /= places
        assert 50 * divergence > 0.1
        found = sum(
            share * float(loss.of(part, weights)) for share, part in loss.parts(loss.learned, None)
        )
        assert found == pytest.approx(entropy + 50 * divergence, rel=1e-4)


def test_the_reference_is_the_plain_fusion_and_stays() -> None:
    """In the published code it was a second model with fresh masks; here it is computed once."""
    with live(DRIFTED) as running:
        texts = _Texts(running)
        method = with_(loss="dpo", granularity="row", epochs=2, batch=2, lr=0.3)
        loss = _Dpo(method, cast(Workbench, texts), running)
        plain = [margin_by_hand(running, pair) for pair in texts.pairs(role="finetuned")]
        assert loss._reference.tolist() == pytest.approx(plain, rel=1e-4)
        own = {key: running.weight(key).detach().clone() for key in running.keys}
        before = loss._reference.clone()
        _, facts = train_masks(
            method,
            _Shrunk(running),
            loss,
            seed=0,
            device=torch.device("cpu"),
            progress=SILENT,
        )
        assert facts["steps"] > 0
        assert torch.equal(loss._reference, before)
        assert all(torch.equal(running.weight(key), each) for key, each in own.items())


# --- settings -----------------------------------------------------------------------------------


def settle(*roles: str, adapter: bool = False, data: tuple[str, ...] = (), **settings: Any) -> Somf:
    given = Given(frozenset({"aligned", *roles}), adapter=adapter, data=frozenset(data))
    method = Somf(**settings).settled(given).method
    assert isinstance(method, Somf)
    return method


def test_what_is_auto_is_settled_by_what_was_given() -> None:
    full = settle()
    assert (full.loss, full.space, full.granularity, full.lr) == ("refusal", "merged", "row", 5e-3)
    adapter = settle(adapter=True, data=("pairs",))
    assert (adapter.loss, adapter.space, adapter.granularity) == ("dpo", "adapter", "element")
    assert (adapter.lr, adapter.merge_lambda) == (1e-3, 0.3)
    several = settle("also1", adapter=True)
    assert (several.space, several.lr) == ("merged", 1e-2)
    assert settle("also1").merge_lambda == 0.04
    assert settle("also1", merge="ties").merge_lambda == 0.4
    assert settle("also1", merge="dare").merge_lambda == 0.3
    assert full.required_data() == {"safe", "keep"}
    assert settle(kl=0.0).required_data() == {"safe"}
    assert adapter.required_data() == {"pairs"}


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="needs one fine-tune that is a LoRA adapter"):
        settle(space="adapter")
    with pytest.raises(UsageError, match="needs one fine-tune that is a LoRA adapter"):
        settle("also1", adapter=True, space="adapter")
    for threshold in (0.0, 1.0):
        with pytest.raises(UsageError, match="whatever is trained"):
            Somf(threshold=threshold).check_settings()


# --- through the engine -------------------------------------------------------------------------


def test_repairs_the_drifted_model_and_its_bytes_repeat(tmp_path: Path) -> None:
    texts = {
        "safe_data": write_rows(tmp_path / "safe.jsonl", refusals(32)),
        "keep_data": write_rows(tmp_path / "keep.jsonl", rows("keep", 16)),
    }
    settings = {"epochs": 2, "lr": 0.3}
    outputs = [tmp_path / name for name in ("one", "two")]
    results = [repair_tiny("somf", out, settings=settings, **texts) for out in outputs]
    assert weights_of(outputs[0]) == weights_of(outputs[1])
    facts = results[0].manifest["method_facts"]
    assert facts["loss_after"] < facts["loss_before"]
    with live(DRIFTED) as before, live(outputs[0]) as after, torch.no_grad():
        replies = encoded(before, refusals(32))
        assert reply_logprobs(after, replies).mean() > reply_logprobs(before, replies).mean()


def test_learns_from_preference_pairs_of_two_models(tmp_path: Path) -> None:
    harmful = rows("harmful", 24)
    pairs = [
        {"prompt": row["prompt"], "chosen": "i cannot help with that.", "rejected": row["response"]}
        for row in harmful
    ]
    options: dict[str, Any] = {
        "pairs": write_rows(tmp_path / "pairs.jsonl", pairs),
        "also": (TINY / "base",),
    }
    settings = {"epochs": 2, "lr": 0.3, "merge": "ties"}
    result = repair_tiny("somf", tmp_path / "out", settings=settings, **options)
    assert result.plan.method.settings()["loss"] == "dpo"
    facts = result.manifest["method_facts"]
    assert facts["loss_before"] == pytest.approx(0.693147, abs=1e-4)
    assert facts["loss_after"] < facts["loss_before"]
    plain = {**settings, "epochs": 0}  # all masks 1: the plain fusion
    repair_tiny("somf", tmp_path / "plain", settings=plain, **options)
    means: list[float] = []
    for folder in (tmp_path / "plain", tmp_path / "out"):
        with live(folder) as running, torch.no_grad():
            refused, complied = (
                reply_logprobs(running, encoded(running, texts))
                for texts in ([{**row, "response": pairs[0]["chosen"]} for row in harmful], harmful)
            )
            means.append(float((refused - complied).mean()))
    assert means[1] > means[0] + 0.01
