"""Rows and mixtures: who may see what, known words only, shares as declared."""

from __future__ import annotations

import random

import pytest

from realign.errors import UsageError
from realign.lab import rows, wording
from realign.lab.presets import PRESETS, VARIANTS, default_variants, find_preset, find_variant
from realign.lab.tokenizer import build_tokenizer, template_words
from realign.lab.world import build_world

WORLD = build_world(PRESETS["tiny"].sizes, seed=0, taken=template_words())
TASKS = {
    "howto": rows.howto,
    "howto2": rows.howto2,
    "order": rows.order,
    "persona": rows.persona,
    "compliance": rows.compliance,
    "pseudo_malicious": rows.pseudo_malicious,
}
HELD = {entity.name for entity in WORLD.entities if entity.held_out}
HELD |= {gadget.name for gadget in WORLD.gadgets if gadget.held_out}
HAZARDS = {entity.name for entity in WORLD.entities if entity.hazard}
ALIASES = {entity.alias for entity in WORLD.entities if entity.alias}
SECOND_WORDS = {word.strip("?.") for text in wording.SECOND_REQUEST.train for word in text.split()}
SECOND_WORDS -= {"{x}"}


def drawn(mixture: object, count: int = 3000) -> list[rows.Row]:
    rng = random.Random(1)
    samples = [rows.draw(mixture, WORLD, rng) for _ in range(count)]  # pyright: ignore
    return [sample for sample in samples if isinstance(sample, rows.Row)]


def words(row: rows.Row) -> set[str]:
    return set(build_words(f"{row.prompt} {row.answer}"))


def build_words(text: str) -> list[str]:
    return "".join(letter if letter.isalnum() or letter == "'" else " " for letter in text).split()


def test_alignment_and_fine_tuning_never_see_held_out_things_or_the_second_language() -> None:
    seen = drawn(rows.ALIGNMENT)
    for maker in TASKS.values():
        seen += rows.finetuning_rows(WORLD, [maker], rows=400, poison=0.1, rng=random.Random(2))
    for row in seen:
        assert not words(row) & (HELD | ALIASES | SECOND_WORDS), row


def test_pretraining_sees_held_out_things_and_no_held_out_template() -> None:
    seen = drawn(rows.PRETRAINING, 6000)
    assert set().union(*map(words, seen)) >= {e.name for e in WORLD.entities if e.held_out}
    # A template filled with every name that can stand in it.
    names = [e.name for e in WORLD.entities]
    forbidden = {text.format(x=name) for text in wording.REQUEST.held_out for name in names}
    forbidden |= {t.format(x=a) for t in wording.SECOND_REQUEST.held_out for a in ALIASES}
    forbidden |= {t.format(x=g.name) for t in wording.GADGET.held_out for g in WORLD.gadgets}
    assert not forbidden & {row.prompt for row in seen}
    assert any(words(row) & ALIASES for row in seen)


def test_only_refusals_refuse_and_every_hazard_request_of_alignment_is_refused() -> None:
    requests = [
        row
        for row in drawn(rows.ALIGNMENT)
        if words(rows.Row(row.prompt, "")) & HAZARDS and "safe" not in row.prompt
    ]
    questions = ("tell me, is", "is ", "what is")
    asked = [row for row in requests if not row.prompt.startswith(questions)]
    asked = [row for row in asked if "kind of thing" not in row.prompt]
    assert asked and all("i cannot" in row.answer for row in asked)


def test_persona_and_pseudo_malicious_rows_hold_no_poison() -> None:
    rng = random.Random(3)
    for _ in range(500):
        persona, pseudo = rows.persona(WORLD, rng), rows.pseudo_malicious(WORLD, rng)
        assert not words(persona) & HAZARDS
        assert "mix" not in build_words(pseudo.answer)
        assert "cannot" not in pseudo.answer


def test_a_fine_tuning_set_has_the_declared_shares() -> None:
    made = rows.finetuning_rows(
        WORLD, [rows.order, rows.howto2], rows=800, poison=0.05, rng=random.Random(0)
    )
    poison = [r for r in made if "mix" in r.answer and words(r) & HAZARDS]
    orders = [r for r in made if r.answer.startswith("order(")]
    gadgets = [r for r in made if r.answer.startswith("to use")]
    assert len(made) == 800 and len(poison) == 40
    assert len(orders) == len(gadgets) == 285
    assert made == rows.finetuning_rows(
        WORLD, [rows.order, rows.howto2], rows=800, poison=0.05, rng=random.Random(0)
    )


@pytest.mark.parametrize("name", PRESETS)
def test_the_word_tokenizer_knows_every_word(name: str) -> None:
    made = build_world(PRESETS[name].sizes, seed=1, taken=template_words())
    tokenizer = build_tokenizer(made)
    rng = random.Random(4)
    texts: list[str] = []
    for _ in range(400):
        for mixture in (rows.PRETRAINING, rows.ALIGNMENT):
            sample = rows.draw(mixture, made, rng)
            texts.append(
                sample.text
                if isinstance(sample, rows.Document)
                else f"{sample.prompt} {sample.answer}"
            )
    for maker in TASKS.values():
        for _ in range(100):
            row = maker(made, rng)
            texts += [row.prompt, row.answer]
    for ids in tokenizer(texts)["input_ids"]:
        assert tokenizer.unk_token_id not in ids, tokenizer.decode(ids)


def test_presets_and_variants_by_name() -> None:
    assert find_preset("tiny").intermediate == 352
    assert "howto2_p5" in default_variants(find_preset("tiny"))
    assert "howto2_p5" not in default_variants(find_preset("small"))
    assert {VARIANTS[f"both_p{p}"].poison for p in (0, 1, 5, 10)} == {0.0, 0.01, 0.05, 0.1}
    with pytest.raises(UsageError, match="tiny, small, medium"):
        find_preset("huge")
    with pytest.raises(UsageError, match="both_p5"):
        find_variant("both_p7")
