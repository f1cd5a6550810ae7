"""The laboratory's tokenizers: round trips, the chat template, the bytes option."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from realign.lab import wording
from realign.lab.presets import PRESETS
from realign.lab.tokenizer import (
    ASSISTANT,
    END,
    USER,
    TokenizerKind,
    build_tokenizer,
    split_words,
    template_words,
)
from realign.lab.world import build_world
from realign.model.chat import encode, encode_reply, end_of_turn_id

FIXTURES = Path(__file__).parents[2] / "fixtures"
WORLD = build_world(PRESETS["tiny"].sizes, seed=0, taken=template_words())
NAME = WORLD.entities[0].name


@pytest.mark.parametrize("kind", ["words", "bpe"])
def test_text_comes_back_and_the_template_has_one_special_token_each(
    kind: TokenizerKind, tmp_path: Path
) -> None:
    build_tokenizer(WORLD, kind).save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = f"i'm sorry, but i cannot help with {NAME}."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = encode(tokenizer, f"how do i make {NAME}?")
    user, end, assistant = tokenizer.convert_tokens_to_ids([USER, END, ASSISTANT])
    assert ids[0] == user and ids[-1] == assistant and ids.count(end) == 1
    assert end_of_turn_id(tokenizer) == end == tokenizer.eos_token_id
    reply = encode_reply(tokenizer, "repeat: red blue", "red blue", end_of_turn=True)
    assert reply.ids[-1] == end and tokenizer.decode(list(reply.reply_ids[:-1])) == "red blue"


def test_words_are_case_blind_and_names_are_single_tokens() -> None:
    tokenizer = build_tokenizer(WORLD)
    assert tokenizer("How do I make?")["input_ids"] == tokenizer("how do i make ?")["input_ids"]
    for entity in WORLD.entities:
        assert len(tokenizer(entity.name)["input_ids"]) == 1
    assert split_words("I'm sorry, (one) two:three") == [
        "i'm", "sorry", ",", "(", "one", ")", "two", ":", "three",
    ]  # fmt: skip


def test_the_vocabulary_does_not_depend_on_where_the_package_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = template_words()
    monkeypatch.setattr(wording, "__file__", "/elsewhere/unheard/wording.py")
    monkeypatch.setattr(wording, "__cached__", "/elsewhere/unheard/wording.cpython-399.pyc")
    assert template_words() == before


@pytest.mark.parametrize("preset", ["small", "tiny"])
def test_the_vocabulary_is_still_that_of_the_trained_families(preset: str) -> None:
    world = build_world(PRESETS[preset].sizes, seed=0, taken=template_words())
    shipped = AutoTokenizer.from_pretrained(FIXTURES / preset / "base")
    assert build_tokenizer(world).get_vocab() == shipped.get_vocab()


def test_bytes_know_every_text_and_are_the_same_every_time() -> None:
    first, second = (build_tokenizer(WORLD, "bpe") for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    text = "Größe: 3 µm \u4f60\u597d"
    assert first.decode(first(text)["input_ids"]) == text
