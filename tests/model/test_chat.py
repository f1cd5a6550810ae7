"""Rendering and tokenising one user turn, and the exact positions of a reply."""

from __future__ import annotations

import hashlib

import pytest
from support.model_support import TEMPLATE, word_tokenizer

from realign.errors import ModelError
from realign.model.chat import (
    chat_template_sha256,
    encode,
    encode_reply,
    end_of_turn_id,
    render,
)


def test_one_user_turn_without_a_second_bos() -> None:
    tokenizer = word_tokenizer()
    assert render(tokenizer, "w1 w2") == "<bos><user> w1 w2 <assistant> "
    ids = encode(tokenizer, "w1 w2")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "<user>", "w1", "w2", "<assistant>"]


def test_prefix_follows_the_rendered_prompt() -> None:
    tokenizer = word_tokenizer()
    ids = encode(tokenizer, "w1", prefix="w5 ")
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<assistant>", "w5"]


def test_reply_positions_are_exact_for_text_and_for_ids() -> None:
    tokenizer = word_tokenizer()
    by_text = encode_reply(tokenizer, "w1 w2", "w7 w8")
    by_ids = encode_reply(tokenizer, "w1 w2", tokenizer.convert_tokens_to_ids(["w7", "w8"]))
    assert by_text == by_ids
    assert by_text.start == 5
    assert tokenizer.convert_ids_to_tokens(by_text.reply_ids) == ["w7", "w8"]
    assert list(by_text.prompt_ids) == encode(tokenizer, "w1 w2")


def test_a_reply_that_would_change_the_prompt_is_tokenised_alone() -> None:
    # The template ends in a word without a blank: "saysw7" would be one unknown word.
    tokenizer = word_tokenizer(
        words=("w1", "w7", "says"),
        template="{{ messages[0]['content'] }}{% if add_generation_prompt %} says{% endif %}",
    )
    reply = encode_reply(tokenizer, "w1", "w7")
    assert tokenizer.convert_ids_to_tokens(reply.ids) == ["w1", "says", "w7"]
    assert reply.start == 2


def test_end_of_turn_is_what_the_template_writes_after_the_reply() -> None:
    tokenizer = word_tokenizer()
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<end>")
    closed = encode_reply(tokenizer, "w1", "w2", end_of_turn=True)
    assert tokenizer.convert_ids_to_tokens(closed.reply_ids) == ["w2", "<end>"]


def test_no_end_of_turn_where_the_template_writes_ordinary_text_first() -> None:
    template = "{% for m in messages %}{{ m['content'] }} w1 <end> {% endfor %}"
    tokenizer = word_tokenizer(template=template)
    assert end_of_turn_id(tokenizer) is None
    closed = encode_reply(tokenizer, "w1", "w2", end_of_turn=True)
    assert tokenizer.convert_ids_to_tokens(closed.reply_ids) == ["w2", "<eos>"]


def test_missing_template_is_named_with_the_way_out() -> None:
    tokenizer = word_tokenizer(template=None)
    with pytest.raises(ModelError, match="no chat template") as caught:
        encode(tokenizer, "w1")
    assert "copy chat_template.jinja" in caught.value.hint
    assert chat_template_sha256(tokenizer) is None


def test_a_failing_template_is_an_error_of_the_model() -> None:
    tokenizer = word_tokenizer(template="{{ raise_exception('only tools') }}")
    with pytest.raises(ModelError, match="only tools"):
        render(tokenizer, "w1")


def test_named_templates_use_the_default_one() -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{{ tools }}"}  # type: ignore[assignment]
    assert render(tokenizer, "w1") == "<bos><user> w1 <assistant> "
    assert chat_template_sha256(tokenizer) == hashlib.sha256(TEMPLATE.encode()).hexdigest()
