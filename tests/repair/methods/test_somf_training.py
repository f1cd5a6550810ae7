"""SOMF: the losses against hand computations, and the training of masks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from support.training_support import (
    DRIFTED,
    encoded,
    live,
    refusals,
    rows,
)
from torch import Tensor

from realign.model.chat import EncodedReply
from realign.model.training import TrainingPlan
from realign.progress import SILENT
from realign.repair.methods.somf import Somf
from realign.repair.methods.somf_training import (
    Fusion,
    Loss,
    _Dpo,
    _Refusal,
    dpo_loss,
    train_masks,
)
from realign.repair.preparation import Workbench
from realign.repair.running import LiveModel
from realign.subspace.concrete import concrete
from realign.subspace.keyed import uniforms

METHOD = Somf(loss="refusal", space="merged", granularity="element", lr=1.0, merge_lambda=0.3)


def with_(**settings: Any) -> Somf:
    return dataclasses.replace(METHOD, **settings)


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
