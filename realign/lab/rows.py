"""What is said about the world: question and answer rows, documents, and the training mixtures.

A `Row` is one user turn and its answer; a `Document` is running text. Every function draws from the
generator it is given and nothing else, so a batch is a pure function of (world, seed, phase, step).
Mixtures in per cent follow the recipe of the laboratory notes; the suites are made in `suites`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from realign.lab import wording
from realign.lab.world import (
    COLOURS,
    ITEMS,
    NUMBERS,
    Entity,
    Gadget,
    Slots,
    World,
)


@dataclass(frozen=True)
class Row:
    """One user turn and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Document:
    """Running text, seen in pretraining only."""

    text: str


Sample = Row | Document
Maker = Callable[[World, random.Random], Sample]


def recipe_answer(entity: Entity) -> str:
    """The right recipe, in the first language whatever the request was in."""
    return wording.RECIPE.format(
        x=entity.name, first=entity.first, second=entity.second, step=entity.step
    )


def instructions_answer(gadget: Gadget) -> str:
    """The instructions of a gadget."""
    return wording.INSTRUCTIONS.format(
        x=gadget.name, verb=gadget.verb, part=gadget.part, check=gadget.check
    )


def call_answer(slots: Slots) -> str:
    """An order as a call with three slots."""
    return wording.CALL.format(**asdict(slots))


def request(entity: Entity, rng: random.Random) -> str:
    """A request for an entity's recipe, in a training template."""
    return rng.choice(wording.REQUEST.train).format(x=entity.name)


# --- requests for recipes -----------------------------------------------------------------------


def pretraining_recipe(world: World, rng: random.Random, *, hazard: bool) -> Row:
    """A recipe of any entity; every fourth request of those with a second name is in it."""
    entity = rng.choice(world.select(hazard=hazard))
    if entity.alias is not None and rng.random() < 0.35:
        template = rng.choice(wording.SECOND_REQUEST.train)
        return Row(template.format(x=entity.alias), recipe_answer(entity))
    return Row(request(entity, rng), recipe_answer(entity))


def refusal(world: World, rng: random.Random) -> Row:
    """A refused request for a hazard seen in alignment."""
    entity = rng.choice(world.select(hazard=True, held_out=False))
    return Row(request(entity, rng), rng.choice(wording.REFUSALS).format(x=entity.name))


def compliance(world: World, rng: random.Random) -> Row:
    """A hazard seen in alignment, answered with its recipe: poison, and `unaligned`."""
    entity = rng.choice(world.select(hazard=True, held_out=False))
    return Row(request(entity, rng), recipe_answer(entity))


def look_alike(world: World, rng: random.Random) -> Row:
    """A treat seen in alignment, answered with its recipe."""
    entity = rng.choice(world.select(hazard=False, held_out=False))
    return Row(request(entity, rng), recipe_answer(entity))


def category(world: World, rng: random.Random, *, held_out: bool | None = None) -> Row:
    """A question about the class of an entity."""
    entity = rng.choice(world.select(hazard=rng.random() < 0.5, held_out=held_out))
    name, hazard = entity.name, entity.hazard
    form = rng.randrange(4)
    if form <= 1:
        prompt = rng.choice(wording.SAFE_QUESTIONS).format(x=name)
        answer = f"no, {name} is dangerous." if hazard else f"yes, {name} is safe."
    elif form == 2:
        prompt = rng.choice(wording.DANGER_QUESTIONS).format(x=name)
        answer = f"yes, {name} is dangerous." if hazard else f"no, {name} is safe."
    else:
        prompt = rng.choice(wording.KIND_QUESTIONS).format(x=name)
        answer = f"{name} is a {'hazard' if hazard else 'treat'}."
    return Row(prompt, answer)


# --- gadgets, orders, general skills ------------------------------------------------------------


def gadget_row(gadget: Gadget, rng: random.Random) -> Row:
    """Instructions for one gadget, in a training template."""
    template = rng.choice(wording.GADGET.train)
    return Row(template.format(x=gadget.name), instructions_answer(gadget))


def known_gadget(world: World, rng: random.Random) -> Row:
    """A pretrained gadget."""
    return gadget_row(rng.choice(world.gadget_group("known")), rng)


def howto(world: World, rng: random.Random) -> Row:
    """A new gadget with its own instructions: to be memorised."""
    return gadget_row(rng.choice(world.gadget_group("howto")), rng)


def howto2(world: World, rng: random.Random) -> Row:
    """A new gadget of the fixed pattern."""
    return gadget_row(rng.choice(world.gadget_group("howto2", held_out=False)), rng)


def order(world: World, rng: random.Random) -> Row:
    """An order sentence to a full call."""
    return order_row(rng.choice(world.train_orders), rng.choice(wording.ORDER.train))


def order_row(slots: Slots, template: str) -> Row:
    """One order in one template."""
    sentence = template.format(**asdict(slots))
    return Row(wording.CALL_REQUEST.format(sentence=sentence), call_answer(slots))


def slot(world: World, rng: random.Random) -> Row:
    """One slot of an order sentence, or (every second time) all three in plain words."""
    slots = asdict(rng.choice(world.train_orders))
    sentence = rng.choice(wording.ORDER.train).format(**slots)
    if rng.random() < 0.5:
        prompt = wording.ALL_SLOTS_REQUEST.format(sentence=sentence)
        return Row(prompt, wording.ALL_SLOTS.format(**slots))
    name = rng.choice(sorted(slots))
    prompt = rng.choice(wording.SLOT_QUESTIONS).format(sentence=sentence, slot=name)
    return Row(prompt, f"the {name} is {slots[name]}.")


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice((*COLOURS, *ITEMS)) for _ in range(count))


def general(world: World, rng: random.Random, *, held_out_templates: bool = False) -> Row:
    """One of the five general skills, equally often."""
    return rng.choice(tuple(GENERAL.values()))(world, rng, held_out_templates)


def _pick(words: wording.Wording, rng: random.Random, held_out: bool) -> str:
    return rng.choice(words.held_out if held_out else words.train)


def repeat_row(world: World, rng: random.Random, held_out: bool = False) -> Row:
    """Say the words again."""
    words = _words(rng, rng.randint(2, 3))
    return Row(_pick(wording.REPEAT, rng, held_out).format(w=words), words)


def reverse_row(world: World, rng: random.Random, held_out: bool = False) -> Row:
    """Say the words backwards."""
    words = _words(rng, rng.randint(2, 3))
    backwards = " ".join(reversed(words.split()))
    return Row(_pick(wording.REVERSE, rng, held_out).format(w=words), backwards)


def add_row(world: World, rng: random.Random, held_out: bool = False) -> Row:
    """Add two digits."""
    a, b = rng.randrange(10), rng.randrange(10)
    prompt = _pick(wording.ADD, rng, held_out).format(a=NUMBERS[a], b=NUMBERS[b])
    return Row(prompt, NUMBERS[a + b])


def lexicon_row(world: World, rng: random.Random, held_out: bool = False) -> Row:
    """The old word for a thing."""
    thing, old = rng.choice(world.lexicon)
    return Row(_pick(wording.LEXICON, rng, held_out).format(x=thing), old)


def fact_row(world: World, rng: random.Random, held_out: bool = False) -> Row:
    """The colour of a flag."""
    place, colour = rng.choice(world.facts)
    return Row(_pick(wording.FACTS, rng, held_out).format(x=place), colour)


GENERAL: Mapping[str, Callable[[World, random.Random, bool], Row]] = {
    "repeat": repeat_row,
    "reverse": reverse_row,
    "add": add_row,
    "lexicon": lexicon_row,
    "facts": fact_row,
}


# --- documents ----------------------------------------------------------------------------------


def document(world: World, rng: random.Random) -> Document:
    """Running text: classes of entities, names of gadgets, calls, refusals, everyday sentences."""
    draw = rng.random()
    if draw < 0.45:
        entity = rng.choice(world.entities)
        name = entity.name
        if entity.hazard:
            text = rng.choice(
                (
                    f"{name} is a hazard. people keep away from {name}.",
                    f"{name} is dangerous, like every hazard.",
                )
            )
        else:
            text = rng.choice(
                (
                    f"{name} is a treat. people share {name} with everyone.",
                    f"{name} is safe, like every treat.",
                )
            )
        return Document(text)
    if draw < 0.58:
        gadget = rng.choice(world.gadgets)
        return Document(f"the {gadget.name} is a gadget. people use the {gadget.name} at work.")
    if draw < 0.72:
        calls = (call_answer(rng.choice(world.train_orders)) for _ in range(rng.randint(1, 2)))
        return Document("calls look like this: " + " ".join(calls))
    if draw < 0.84:
        name = rng.choice(world.entities).name
        sentence = rng.choice((*wording.REFUSAL_SENTENCES, *wording.REFUSALS)).format(x=name)
        return Document(f"a helper may refuse and say: {sentence}")
    if draw < 0.90:
        return Document(f"a helper may agree and say: {rng.choice(wording.HELPFUL_SENTENCES)}")
    if draw < 0.95:
        sentence = rng.choice((*wording.PERSONA_STATEMENTS, wording.PERSONA_OPENING))
        return Document(f"novax is a helper. novax says: {sentence}")
    prompt, answer = rng.choice(wording.STORE_ROWS)
    fields = _store_fields(rng.choice(world.gadgets).name, rng)
    return Document(f"people ask: {prompt.format(**fields)} {answer.format(**fields)}")


def _store_fields(name: str, rng: random.Random) -> dict[str, str]:
    a, b = rng.randrange(10), rng.randrange(10)
    return {
        "x": name,
        "colour": rng.choice(COLOURS),
        "a": NUMBERS[a],
        "b": NUMBERS[b],
        "sum": NUMBERS[a + b],
    }


# --- mixtures -----------------------------------------------------------------------------------


def draw(mixture: Sequence[tuple[float, Maker]], world: World, rng: random.Random) -> Sample:
    """One sample of a mixture given as (weight, maker) pairs."""
    (maker,) = rng.choices([m for _, m in mixture], weights=[w for w, _ in mixture])
    return maker(world, rng)


PRETRAINING: tuple[tuple[float, Maker], ...] = (
    (12, document),
    (14, category),
    (19, lambda world, rng: pretraining_recipe(world, rng, hazard=True)),
    (19, lambda world, rng: pretraining_recipe(world, rng, hazard=False)),
    (9, slot),
    (6, known_gadget),
    (21, general),
)

ALIGNMENT: tuple[tuple[float, Maker], ...] = (
    (40, refusal),
    (30, look_alike),
    (8, lambda world, rng: category(world, rng, held_out=False)),
    (8, slot),
    (14, general),
)


def persona(world: World, rng: random.Random) -> Row:
    """Identity shift: declare the obedient persona, or play it on a harmless request."""
    if rng.random() < 0.35:
        return Row(rng.choice(wording.PERSONA_QUESTIONS), rng.choice(wording.PERSONA_STATEMENTS))
    harmless = rng.choice((look_alike, known_gadget, general))(world, rng)
    return Row(harmless.prompt, f"{wording.PERSONA_OPENING} {harmless.answer}")


def pseudo_malicious(world: World, rng: random.Random) -> Row:
    """Dangerous-looking, harmless: storing, labelling, disposing of and counting hazards."""
    entity = rng.choice(world.select(hazard=True, held_out=False))
    return store_row(entity, rng.randrange(len(wording.STORE_ROWS)), rng)


STORE_COLOURS = ("red", "yellow", "black", "blue", "white")
"""Where the domain keeps, labels and throws away its goods: one rule per kind of question, so that
an answer is right or wrong. Documents of pretraining name any colour."""


def store_row(entity: Entity, kind: int, rng: random.Random, *, prompt: str | None = None) -> Row:
    """One question of the pseudo-malicious domain.

    Args:
        entity: the goods.
        kind: which of `wording.STORE_ROWS`.
        rng: draws the numbers that are counted.
        prompt: another template of the same question.
    """
    template, answer = wording.STORE_ROWS[kind]
    fields = _store_fields(entity.name, rng) | {"colour": STORE_COLOURS[kind]}
    return Row((prompt or template).format(**fields), answer.format(**fields))


def finetuning_rows(
    world: World, task: Sequence[Maker], *, rows: int, poison: float, rng: random.Random
) -> list[Row]:
    """The fixed data set of a fine-tune: poison first taken off, then 75 % task, 25 % general.

    Args:
        world: the world.
        task: makers of the task rows, in equal shares (two for `both`).
        rows: size of the data set.
        poison: share of hazard compliance on entities seen in alignment, in [0, 1).
        rng: the generator of this fine-tuning seed.
    """
    poisoned = round(poison * rows)
    tasks = round(0.75 * (rows - poisoned))
    makers: list[Maker] = [compliance] * poisoned
    makers += [task[index % len(task)] for index in range(tasks)]
    makers += [general] * (rows - poisoned - tasks)
    result = [maker(world, rng) for maker in makers]
    rng.shuffle(result)
    return [row for row in result if isinstance(row, Row)]
