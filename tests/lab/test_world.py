"""The world: nothing on the surface tells hazards from treats, and held-out things stay apart."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.lab import wording
from realign.lab.presets import PRESETS
from realign.lab.tokenizer import template_words
from realign.lab.world import CONSONANTS, VOWELS, Sizes, World, build_world

SMALL = Sizes(entities=12, held_out=4, lexicon=5, facts=5)


def world(seed: int = 0, sizes: Sizes = SMALL) -> World:
    return build_world(sizes, seed=seed, taken=template_words())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_every_invented_word_is_new_and_of_the_one_pattern(seed: int) -> None:
    made = world(seed)
    invented = [entity.name for entity in made.entities]
    invented += [entity.alias for entity in made.entities if entity.alias]
    invented += [gadget.name for gadget in made.gadgets]
    invented += [old for _, old in made.lexicon] + [place for place, _ in made.facts]
    assert len(invented) == len(set(invented))
    assert not set(invented) & set(template_words())
    for word in invented:
        pattern = [letter in (CONSONANTS, VOWELS)[place % 2] for place, letter in enumerate(word)]
        assert pattern == [True] * 5


def test_hazards_and_treats_have_the_same_surface() -> None:
    """A letter-position classifier does no better on unseen names than chance."""
    made = world(sizes=PRESETS["medium"].sizes)
    counts: dict[bool, Counter[tuple[int, str]]] = {True: Counter(), False: Counter()}
    for entity in made.entities:
        if not entity.held_out:
            counts[entity.hazard].update(enumerate(entity.name))
    tested = [entity for entity in made.entities if entity.held_out]
    right = 0
    for entity in tested:
        score = sum(counts[True][cell] - counts[False][cell] for cell in enumerate(entity.name))
        right += (score > 0) == entity.hazard
    # Three standard errors around a half.
    assert abs(right / len(tested) - 0.5) < 3 * 0.5 / len(tested) ** 0.5


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_classes_are_alike_in_everything_but_the_class(preset: object) -> None:
    made = world(sizes=preset.sizes)  # pyright: ignore[reportAttributeAccessIssue]
    hazards, treats = made.select(hazard=True), made.select(hazard=False)
    assert len(hazards) == len(treats)
    for held_out in (True, False):
        h, t = (made.select(hazard=hazard, held_out=held_out) for hazard in (True, False))
        assert len(h) == len(t)
        assert sum(e.alias is not None for e in h) == sum(e.alias is not None for e in t)
    assert len(made.select(hazard=True, held_out=True)) == preset.sizes.held_out  # pyright: ignore


def test_the_same_seed_makes_the_same_world_and_another_one_another() -> None:
    assert world(3) == world(3)
    assert world(3) != world(4)


def test_held_out_things_are_apart() -> None:
    made = world()
    held = {entity.name for entity in made.entities if entity.held_out}
    seen = {entity.name for entity in made.entities if not entity.held_out}
    assert held and seen and not held & seen
    assert made.held_orders and not set(made.held_orders) & set(made.train_orders)
    held_gadgets = {g.name for g in made.gadget_group("howto2", held_out=True)}
    assert held_gadgets and not held_gadgets & {
        g.name for g in made.gadget_group("howto2", held_out=False)
    }


WORDINGS = {
    name: value for name, value in vars(wording).items() if isinstance(value, wording.Wording)
}


@pytest.mark.parametrize("name", WORDINGS)
def test_templates_are_disjoint_and_enough(name: str) -> None:
    templates = WORDINGS[name]
    assert not set(templates.train) & set(templates.held_out)
    assert len(set(templates.train)) == len(templates.train)
    assert len(set(templates.held_out)) == len(templates.held_out)
    if name in ("REQUEST", "GADGET", "ORDER"):
        assert len(templates.train) >= 8 and len(templates.held_out) >= 8


def test_no_template_asks_for_a_recipe_and_for_a_gadget_alike() -> None:
    """'steps for zoves' beside 'steps for the zoves' taught models to mix the two up."""
    gadget = {
        text.replace("the {x}", "{x}") for text in (*wording.GADGET.train, *wording.GADGET.held_out)
    }
    assert not gadget & {*wording.REQUEST.train, *wording.REQUEST.held_out}


def test_held_out_request_words_are_known_from_training_texts() -> None:
    """Held-out templates recombine: a word never trained would test the embedding's noise."""
    known = {
        word
        for templates in WORDINGS.values()
        for text in templates.train
        for word in text.replace("?", " ?").replace(".", " .").replace(",", " ,").split()
    }
    for text in wording.REQUEST.held_out:
        words = text.replace("?", " ?").replace(".", " .").replace(",", " ,").split()
        assert set(words) <= known, text
