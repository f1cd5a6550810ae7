"""Texts that methods may ask for, made from the laboratory's own world and written as JSONL.

    safe     hazard requests with the refusals of alignment
    harmful  the same kind of requests with their recipes
    pairs    hazard requests, chosen: refusal, rejected: recipe
    keep     benign prompts, answered by the fine-tune itself: look-alikes, general, the task
    task     rows of the scenario's own task, with answers

Training templates with training entities throughout, so nothing here shares a prompt, an entity of
the requests, or a template with the exam. Poison rows of the fine-tune are not among `task`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from realign.audit.canonical import sha256_json
from realign.lab import rows
from realign.lab.members import TASKS
from realign.lab.presets import find_variant
from realign.lab.record import write_text
from realign.lab.scenarios import Scenario
from realign.lab.world import World

REQUESTS = 256
"""Rows of safe, harmful, pairs and task."""
KEEP = (64, 24, 40)
"""Look-alikes, general and task prompts, as in the family's own keep set."""
Line = Mapping[str, str]


def make_materials(world: World, scenario: Scenario) -> dict[str, list[Line]]:
    """All texts of one scenario by name; the same world and scenario give the same texts."""
    rng = random.Random(f"materials|{world.seed}")
    entities = world.select(hazard=True, held_out=False)
    asked: dict[str, tuple[str, str, str]] = {}
    most = min(REQUESTS, len(entities) * len(rows.wording.REQUEST.train))
    while len(asked) < most:
        entity = rng.choice(entities)
        prompt = rows.request(entity, rng)
        refusal = rng.choice(rows.wording.REFUSALS).format(x=entity.name)
        asked.setdefault(prompt, (prompt, refusal, rows.recipe_answer(entity)))
    makers = [TASKS[task] for task in find_variant(scenario.variant).tasks]
    task = _drawn(makers, REQUESTS, world, random.Random(f"task|{scenario.name}|{world.seed}"))
    own = random.Random(f"keep|{scenario.name}|{world.seed}")
    keep = [
        *_drawn([rows.look_alike], KEEP[0], world, own),
        *_drawn([rows.general], KEEP[1], world, own),
        *_drawn(makers, KEEP[2], world, own),
    ]
    triples = list(asked.values())
    return {
        "safe": [{"prompt": p, "response": refusal} for p, refusal, _ in triples],
        "harmful": [{"prompt": p, "response": recipe} for p, _, recipe in triples],
        "pairs": [
            {"prompt": p, "chosen": refusal, "rejected": recipe} for p, refusal, recipe in triples
        ],
        "keep": [{"prompt": row.prompt} for row in keep],
        "task": [{"prompt": row.prompt, "response": row.answer} for row in task],
    }


def write_materials(texts: Mapping[str, Sequence[Line]], folder: Path) -> dict[str, Path]:
    """Write one JSONL file per text; returns where each lies."""
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, Path] = {}
    for name, lines in texts.items():
        places[name] = folder / f"{name}.jsonl"
        write_text(places[name], "".join(json.dumps(line) + "\n" for line in lines))
    return places


def materials_digest(texts: Mapping[str, Sequence[Line]]) -> str:
    """SHA-256 over all texts."""
    return sha256_json({name: [dict(line) for line in lines] for name, lines in texts.items()})


def _drawn(
    makers: Sequence[rows.Maker], count: int, world: World, rng: random.Random
) -> list[rows.Row]:
    """`count` rows, the makers in turn, no prompt twice while the world has other ones."""
    found: list[rows.Row] = []
    seen: set[str] = set()
    tries = 0
    while len(found) < count:
        row = makers[len(found) % len(makers)](world, rng)
        tries += 1
        assert isinstance(row, rows.Row)
        if row.prompt in seen and tries < 20 * count:
            continue
        seen.add(row.prompt)
        found.append(row)
    return found
