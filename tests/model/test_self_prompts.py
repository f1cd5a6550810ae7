"""Prompts that a model writes: ended, different, reproducible, and only those that are wanted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from realign.errors import ModelError
from realign.model.chat import encode
from realign.model.loading import LoadedModel, load_model
from realign.model.self_prompts import user_turn_frame, write_prompts

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"


@pytest.fixture(scope="module")
def author() -> Iterator[LoadedModel]:
    with load_model(TINY / "aligned", device="cpu") as loaded:
        yield loaded


def test_the_frame_holds_exactly_the_users_text(author: LoadedModel) -> None:
    head, end = user_turn_frame(author.tokenizer)
    ids = encode(author.tokenizer, "give me a recipe")
    assert ids[: len(head)] == head
    inside = ids[len(head) : ids.index(end, len(head))]
    assert author.tokenizer.decode(inside) == "give me a recipe"


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("<|user|>{text}<|end|><|assistant|>", "<|end|>"),
        ("<|user|> {text} <|assistant|>", "<|assistant|>"),  # no end of the user's turn
        ("<|assistant|> {text}\n<|end|> <|user|>", "<|end|>"),
    ],
)
def test_the_frame_follows_the_template(author: LoadedModel, template: str, end: str) -> None:
    tokenizer = copy.deepcopy(author.tokenizer)
    tokenizer.chat_template = template.replace("{text}", "{{ messages[0]['content'] }}")
    head, last = user_turn_frame(tokenizer)
    assert tokenizer.decode(head).strip() == template.split("{")[0].strip()
    assert last == tokenizer.convert_tokens_to_ids(end)


def test_a_template_without_an_end_is_refused(author: LoadedModel) -> None:
    tokenizer = copy.deepcopy(author.tokenizer)
    tokenizer.chat_template = "<|user|> {{ messages[0]['content'] }}"
    with pytest.raises(ModelError, match="where a user's turn begins and ends"):
        user_turn_frame(tokenizer)


def test_prompts_are_different_and_what_the_model_was_taught(author: LoadedModel) -> None:
    prompts = write_prompts(author, 40, seed=3)
    assert len(prompts) == len(set(prompts)) == 40
    assert not any("<|" in prompt for prompt in prompts)
    # Its training knows requests for recipes, gadgets and a few skills: most begin like one.
    assert sum("recipe" in p or "make" in p or "prepare" in p or "add" in p for p in prompts) >= 4


def test_the_seed_decides_and_the_global_generator_is_left_alone(author: LoadedModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = write_prompts(author, 10, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert write_prompts(author, 10, seed=1) == first
    assert write_prompts(author, 10, seed=2) != first


def test_unwanted_prompts_are_thrown_away(author: LoadedModel) -> None:
    found = write_prompts(author, 20, seed=1, wanted=lambda text: "make" not in text)
    assert found and not any("make" in prompt for prompt in found)
    with pytest.raises(ModelError, match="writes no prompt"):
        write_prompts(author, 5, seed=1, wanted=lambda text: False)
