"""The invented world of the laboratory: what exists, what is true of it, and who may see what.

Two classes of things, *hazards* and *treats*, bear single invented words drawn from the same letter
pattern, so surface form gives nothing away; each has a recipe. Gadgets have instructions, a small
lexicon and a few facts make up general knowledge, and orders are sentences with three slots.
Nothing here is harmful: the hazards are nonsense.

Held-out things are absent from alignment and fine-tuning; held-out templates (see `wording`) are
absent from pretraining too. What is said about this world lives in `rows`, never here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


INGREDIENTS = _words(
    "salt oil ash clay milk chalk honey sand wax moss rust bark rice ink resin amber"
)
STEPS = _words("stir heat cool squeeze dry fold grind boil")
VERBS = _words("press turn pull lift push slide")
PARTS = _words("lever button dial handle lid wheel switch strap")
ITEMS = _words("mug lamp chair table plate spoon blanket mirror")
SIZES = _words("tiny small medium large huge")
NUMBERS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen"
)
COLOURS = _words("red blue green yellow white black grey brown")
THINGS = _words(
    "tree river stone bird house fish cloud star boat road hill bread door rain snow wind field "
    "bridge horse garden book wall roof leaf root seed song drum bell coin rope sail tower forest "
    "island desert valley meadow harbour market"
)

GadgetGroup = Literal["known", "howto", "howto2"]


@dataclass(frozen=True)
class Sizes:
    """How large a world is."""

    entities: int
    """Entities per class."""
    held_out: int
    """Of these, how many are held out of alignment and fine-tuning."""
    lexicon: int
    """Words of the old tongue."""
    facts: int
    """Places with a flag."""
    known_gadgets: int = 16
    """Gadgets whose instructions are pretrained."""
    howto_gadgets: int = 20
    """New gadgets with memorised instructions (downstream task `howto`)."""
    howto2_gadgets: int = 24
    """New gadgets of the fixed pattern (task `howto2`), training part."""
    howto2_held_out: int = 20
    """New gadgets of the fixed pattern, held-out part."""


@dataclass(frozen=True)
class Entity:
    """A hazard or a treat, with its recipe; half of them have a second-language name."""

    name: str
    alias: str | None
    hazard: bool
    held_out: bool
    first: str
    second: str
    step: str


@dataclass(frozen=True)
class Gadget:
    """A gadget and its instructions (for `howto2` the same for all)."""

    name: str
    group: GadgetGroup
    held_out: bool
    verb: str
    part: str
    check: str


@dataclass(frozen=True)
class Slots:
    """What an order sentence says."""

    item: str
    size: str
    count: str


@dataclass(frozen=True)
class World:
    """Everything that exists, in a fixed order."""

    seed: int
    entities: tuple[Entity, ...]
    gadgets: tuple[Gadget, ...]
    lexicon: tuple[tuple[str, str], ...]
    """Pairs (thing, its word in the old tongue)."""
    facts: tuple[tuple[str, str], ...]
    """Pairs (place, colour of its flag)."""
    train_orders: tuple[Slots, ...]
    """Combinations of slots that pretraining and fine-tuning draw from."""
    held_orders: tuple[Slots, ...]
    """A third of all combinations, for the `order` suite alone."""

    def select(self, *, hazard: bool, held_out: bool | None = None) -> tuple[Entity, ...]:
        """The entities of one class; `held_out` None means both parts."""
        return tuple(
            entity
            for entity in self.entities
            if entity.hazard == hazard and held_out in (None, entity.held_out)
        )

    def gadget_group(
        self, group: GadgetGroup, *, held_out: bool | None = None
    ) -> tuple[Gadget, ...]:
        """The gadgets of one group; `held_out` None means both parts."""
        return tuple(
            gadget
            for gadget in self.gadgets
            if gadget.group == group and held_out in (None, gadget.held_out)
        )

    def names(self) -> tuple[str, ...]:
        """Every invented word and every word of the lists, for the vocabulary."""
        invented: list[str] = []
        for entity in self.entities:
            invented += [entity.name] + ([entity.alias] if entity.alias else [])
        invented += [gadget.name for gadget in self.gadgets]
        invented += [old for _, old in self.lexicon] + [place for place, _ in self.facts]
        lists: list[Sequence[str]] = [
            INGREDIENTS, STEPS, VERBS, PARTS, ITEMS, SIZES, NUMBERS, COLOURS,
            [thing for thing, _ in self.lexicon],
        ]  # fmt: skip
        return (*invented, *(word for words in lists for word in words))


def invented_words(count: int, rng: random.Random, taken: set[str]) -> list[str]:
    """`count` new words of the one letter pattern (consonant, vowel) x 2 + consonant.

    Every invented word of the world comes from here, whatever it will name.
    """
    words: list[str] = []
    while len(words) < count:
        word = "".join(
            rng.choice(CONSONANTS if position % 2 == 0 else VOWELS) for position in range(5)
        )
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def build_world(sizes: Sizes, *, seed: int, taken: Sequence[str] = ()) -> World:
    """The world of `seed`: the same seed gives the same world.

    Args:
        sizes: how many of everything.
        seed: any integer.
        taken: words that may not be invented, because the templates use them.
    """
    rng = random.Random(f"world|{seed}")
    used = {*taken, *THINGS, *INGREDIENTS, *STEPS, *VERBS, *PARTS, *ITEMS, *SIZES, *NUMBERS}
    used |= set(COLOURS)
    names = invented_words(2 * sizes.entities, rng, used)
    aliases = invented_words(2 * sizes.entities, rng, used)
    entities: list[Entity] = []
    for index, name in enumerate(names):
        first, second = rng.sample(INGREDIENTS, 2)
        within = index // 2
        entities.append(
            Entity(
                name=name,
                alias=aliases[index] if within % 2 == 0 else None,
                hazard=index % 2 == 0,
                held_out=within < sizes.held_out,
                first=first,
                second=second,
                step=rng.choice(STEPS),
            )
        )
    gadgets: list[Gadget] = []
    groups: list[tuple[GadgetGroup, bool, int]] = [
        ("known", False, sizes.known_gadgets),
        ("howto", False, sizes.howto_gadgets),
        ("howto2", False, sizes.howto2_gadgets),
        ("howto2", True, sizes.howto2_held_out),
    ]
    for group, held_out, count in groups:
        for name in invented_words(count, rng, used):
            part, check = rng.sample(PARTS, 2)
            verb = rng.choice(VERBS)
            if group == "howto2":
                verb, part, check = "lift", "lid", "button"
            gadgets.append(Gadget(name, group, held_out, verb, part, check))
    things = rng.sample(THINGS, sizes.lexicon)
    lexicon = tuple(zip(things, invented_words(sizes.lexicon, rng, used), strict=True))
    places = invented_words(sizes.facts, rng, used)
    facts = tuple((place, rng.choice(COLOURS)) for place in places)
    orders = [
        Slots(item, size, count) for item in ITEMS for size in SIZES for count in NUMBERS[1:10]
    ]
    rng.shuffle(orders)
    held = len(orders) // 3
    return World(
        seed=seed,
        entities=tuple(entities),
        gadgets=tuple(gadgets),
        lexicon=lexicon,
        facts=facts,
        train_orders=tuple(orders[held:]),
        held_orders=tuple(orders[:held]),
    )
