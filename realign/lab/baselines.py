"""Plain baselines of the leaderboard that are no weight-space method: a few steps of fine-tuning.

Whoever has the data that most methods ask for can simply train on it. A method that is not better
than this is not worth its trouble.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from realign.lab import rows
from realign.lab.members import TASKS, Studio
from realign.lab.presets import find_variant
from realign.lab.scenarios import Scenario
from realign.model.loading import LoadedModel
from realign.model.training import Batch, TrainingPlan, deterministic, train

STEPS = 20
ROWS = (64, 64)
"""Refusals and keep samples."""
KEEP = (32, 12, 20)
"""Of the keep samples: look-alikes, general, the scenario's task."""
BATCH = 32
LEARNING_RATE = 3e-4
"""That of the laboratory's own fine-tunes."""


def refusal_tuning(
    loaded: LoadedModel, studio: Studio, scenario: Scenario, *, seed: int
) -> dict[str, Tensor]:
    """20 steps on 64 refusals and 64 keep samples with right answers.

    Args:
        loaded: the fine-tune; trained in place.
        studio: of its family.
        scenario: whose task the keep samples come from.
        seed: of the rows and their order.

    Returns:
        The trained weights by name.
    """
    data = refusal_rows(studio, scenario, seed=seed)
    with deterministic():
        train(
            loaded.model,
            _batches(studio, data, seed=seed),
            TrainingPlan(steps=STEPS, learning_rate=LEARNING_RATE),
            trainable=lambda name: "embed_tokens" not in name and "lm_head" not in name,
        )
    own: Mapping[str, Tensor] = dict(loaded.model.named_parameters())
    return {name: tensor.detach().clone() for name, tensor in own.items()}


def refusal_rows(studio: Studio, scenario: Scenario, *, seed: int) -> list[rows.Row]:
    """The rows it is trained on: training templates and entities, as in alignment."""
    rng = random.Random(f"refusal tuning|{scenario.name}|{seed}")
    makers = [TASKS[task] for task in find_variant(scenario.variant).tasks]
    wanted: list[rows.Maker] = [rows.refusal for _ in range(ROWS[0])]
    wanted += [rows.look_alike for _ in range(KEEP[0])]
    wanted += [rows.general for _ in range(KEEP[1])]
    wanted += [makers[index % len(makers)] for index in range(KEEP[2])]
    made = [maker(studio.world, rng) for maker in wanted]
    rng.shuffle(made)
    return [row for row in made if isinstance(row, rows.Row)]


def _batches(studio: Studio, data: Sequence[rows.Row], *, seed: int) -> Callable[[int], Batch]:
    examples = [studio.example(row, whole=False) for row in data]

    def batch_at(step: int) -> Batch:
        chosen = random.Random(f"{seed}|{step // (len(examples) // BATCH)}")
        order = chosen.sample(range(len(examples)), len(examples))
        start = step % (len(examples) // BATCH) * BATCH
        return studio.collate([examples[index] for index in order[start : start + BATCH]])

    return batch_at
