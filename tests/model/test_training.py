"""The training loop: exact resuming, frozen tensors, masked loss, schedule, bad input."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from support.model_support import llama

from realign.errors import NonFiniteError, OutputError, UsageError
from realign.model.training import (
    IGNORED,
    Batch,
    Example,
    TrainingPlan,
    collate,
    deterministic,
    masked_loss,
    train,
)

PLAN = TrainingPlan(steps=12, learning_rate=1e-2, weight_decay=0.1)


def batch_at(step: int) -> Batch:
    """Random examples of different lengths, a pure function of the step."""
    generator = torch.Generator().manual_seed(step)
    examples = [
        Example(tuple(torch.randint(1, 40, (length,), generator=generator).tolist()), 2)
        for length in (5, 9, 7)
    ]
    return collate(examples, pad_id=0)


def state_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path, stop_at: int) -> None:
    whole, broken = llama(), llama()
    file = tmp_path / "state.pt"
    with deterministic():
        train(whole, batch_at, PLAN)
        with pytest.raises(KeyboardInterrupt):
            train(broken, batch_at, PLAN, state_file=file, stop_at=stop_at)
        fresh = llama(seed=7)  # every trained tensor comes from the state
        result = train(fresh, batch_at, PLAN, state_file=file)
    assert result.resumed_at == stop_at and len(result.losses) == PLAN.steps - stop_at
    assert state_bytes(fresh) == state_bytes(whole)


def test_states_are_kept_while_training(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"

    def failing(step: int) -> Batch:
        if step == 7:
            raise RuntimeError("power cut")
        return batch_at(step)

    broken, whole = llama(), llama()
    with deterministic():
        with pytest.raises(RuntimeError, match="power cut"):
            train(broken, failing, PLAN, state_file=file, save_every=3)
        assert train(broken, batch_at, PLAN, state_file=file).resumed_at == 6
        train(whole, batch_at, PLAN)
    assert state_bytes(broken) == state_bytes(whole)
    assert not list(tmp_path.glob("*.partial"))


def test_frozen_tensors_stay_and_the_others_move() -> None:
    model = llama()
    before = state_bytes(model)
    train(model, batch_at, PLAN, trainable=lambda name: "embed" not in name and "head" not in name)
    after = state_bytes(model)
    moved = {name for name in before if before[name] != after[name]}
    frozen = {name for name in before if "embed" in name or "head" in name}
    assert frozen and not moved & frozen
    assert moved == set(before) - frozen


def test_training_lowers_the_loss() -> None:
    def same(_: int) -> Batch:
        return batch_at(0)

    losses = train(llama(), same, TrainingPlan(steps=40, learning_rate=1e-2)).losses
    assert losses[-1] < 0.3 * losses[0]


def test_loss_counts_answers_only() -> None:
    batch = collate([Example((5, 6, 7, 8), 2), Example((9, 3), 1)], pad_id=0)
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 8], [IGNORED, 3, IGNORED, IGNORED]]
    logits = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    logp = logits.double().log_softmax(-1)
    expected = -(logp[0, 1, 7] + logp[0, 2, 8] + logp[1, 0, 3]) / 3
    assert float(masked_loss(logits, batch.labels)) == pytest.approx(float(expected), abs=1e-6)
    # What is predicted at prompt and padding positions does not matter.
    logits[0, 0] += 5 * torch.randn(12)
    logits[1, 1:] = 0
    assert float(masked_loss(logits, batch.labels)) == pytest.approx(float(expected), abs=1e-6)


def test_right_padding_changes_no_real_position() -> None:
    model = llama()
    short, long = Example(tuple(range(1, 6))), Example(tuple(range(1, 10)))
    both = collate([short, long], pad_id=0)
    alone = collate([short], pad_id=0)
    with torch.no_grad():
        padded = model(input_ids=both.input_ids).logits[0, :5]
        single = model(input_ids=alone.input_ids).logits[0]
    assert torch.allclose(padded, single, atol=1e-5)


def test_schedule_rises_then_falls_to_its_floor() -> None:
    plan = TrainingPlan(steps=100, learning_rate=2.0)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.4) and rates[4] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))
    middle = 5 + 94 // 2
    assert rates[middle] == pytest.approx(2.0 * (0.05 + 0.95 * 0.5), rel=1e-6)


def test_deterministic_restores_the_callers_settings() -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with deterministic(threads=1):
        assert torch.get_num_threads() == 1 and torch.are_deterministic_algorithms_enabled()
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize(
    "plan",
    [
        TrainingPlan(steps=0, learning_rate=1.0),
        TrainingPlan(steps=3, learning_rate=0.0),
        TrainingPlan(steps=3, learning_rate=math.nan),
        TrainingPlan(steps=3, learning_rate=1.0, warmup=1.5),
    ],
)
def test_a_plan_out_of_range_is_refused(plan: TrainingPlan) -> None:
    with pytest.raises(UsageError):
        train(llama(), batch_at, plan)


def test_nothing_trainable_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing to train"):
        train(llama(), batch_at, PLAN, trainable=lambda _: False)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(NonFiniteError, match="step 0"):
        train(model, batch_at, PLAN)


def test_a_foreign_or_broken_state_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        train(llama(), batch_at, PLAN, state_file=file, stop_at=2)
    other = TrainingPlan(steps=13, learning_rate=1e-2)
    with pytest.raises(OutputError, match="another training run"):
        train(llama(), batch_at, other, state_file=file)
    file.write_bytes(b"half a st")
    with pytest.raises(OutputError, match="not a training state"):
        train(llama(), batch_at, PLAN, state_file=file)
