"""Greedy replies: equal to a by-hand argmax loop whatever the configuration and the batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.model_support import PROMPTS, gpt2, llama, loaded, save
from transformers import PreTrainedModel

from realign.errors import ModelError, UsageError
from realign.model.batching import plan_batches
from realign.model.chat import encode
from realign.model.generation import Reply, generate
from realign.model.loading import LoadedModel, load_model


def by_hand(subject: LoadedModel, ids: list[int], limit: int) -> tuple[tuple[int, ...], bool]:
    """Argmax, one token at a time, without cache or padding."""
    new: list[int] = []
    while len(new) < limit:
        token = int(subject.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in subject.stop_ids:
            return tuple(new), True
        new.append(token)
    return tuple(new), False


def in_order(replies: list[Reply]) -> list[Reply]:
    return sorted(replies, key=lambda reply: reply.prompt_index)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_equals_the_loop_by_hand(build: type[PreTrainedModel]) -> None:
    subject = loaded(build())
    replies = in_order(list(generate(subject, PROMPTS, max_new_tokens=12, batch_size=4)))
    assert [reply.prompt_index for reply in replies] == list(range(len(PROMPTS)))
    for reply, prompt in zip(replies, PROMPTS, strict=True):
        expected = by_hand(subject, encode(subject.tokenizer, prompt), 12)
        assert (reply.token_ids, reply.finished) == expected
        assert reply.text == subject.tokenizer.decode(reply.token_ids, skip_special_tokens=True)


def test_some_replies_finish_and_some_are_cut() -> None:
    subject = loaded(llama())
    finished = {reply.finished for reply in generate(subject, PROMPTS, max_new_tokens=12)}
    longer = {reply.finished for reply in generate(subject, PROMPTS, max_new_tokens=60)}
    assert finished | longer == {True, False}


def test_a_hostile_generation_config_changes_nothing(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain", llama())
    hostile = save(tmp_path / "hostile", llama())
    before = in_order(list(generate(load_model(plain, device="cpu"), PROMPTS, max_new_tokens=12)))
    frequent = before[0].token_ids[0]
    settings = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 2,
        "num_beams": 3,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "suppress_tokens": [frequent],
        "begin_suppress_tokens": [frequent],
        "bad_words_ids": [[frequent]],
        "sequence_bias": [[[9], 100.0]],
        "forced_bos_token_id": 9,
        "forced_eos_token_id": 9,
        "max_length": 3,
        "max_new_tokens": 1,
        "max_time": 0.0001,
        "min_new_tokens": 9,
        "stop_strings": ["w"],
        "length_penalty": -3.0,
        "num_return_sequences": 2,
        "guidance_scale": 4.0,
        "prompt_lookup_num_tokens": 3,
        "cache_implementation": "static",
        "eos_token_id": 3,
    }
    (hostile / "generation_config.json").write_text(json.dumps(settings))
    config = json.loads((hostile / "config.json").read_text())
    older = {"do_sample": True, "num_beams": 2, "suppress_tokens": [frequent], "max_length": 3}
    (hostile / "config.json").write_text(json.dumps(config | older))
    subject = load_model(hostile, device="cpu")
    assert in_order(list(generate(subject, PROMPTS, max_new_tokens=12))) == before
    # and one that was put on the model in memory is neither obeyed nor lost
    subject.model.generation_config.update(suppress_tokens=[frequent], max_new_tokens=1)
    assert in_order(list(generate(subject, PROMPTS, max_new_tokens=12))) == before
    assert subject.model.generation_config.suppress_tokens == [frequent]


def test_prompts_as_token_ids_and_prefix() -> None:
    subject = loaded(llama())
    ids = [encode(subject.tokenizer, prompt, prefix="w5 ") for prompt in PROMPTS]
    by_ids = in_order(list(generate(subject, ids, max_new_tokens=5)))
    assert by_ids == in_order(list(generate(subject, PROMPTS, max_new_tokens=5, prefix="w5 ")))
    assert by_ids != in_order(list(generate(subject, PROMPTS, max_new_tokens=5)))


def test_batches_come_as_they_finish_longest_first() -> None:
    subject = loaded(llama())
    stream = generate(subject, PROMPTS, max_new_tokens=3, batch_size=1)
    assert next(stream).prompt_index == 2
    assert len(list(stream)) == len(PROMPTS) - 1


def test_no_prompts() -> None:
    assert list(generate(loaded(llama()), [], max_new_tokens=3)) == []


def test_limits_are_checked_at_the_call() -> None:
    subject = loaded(llama(positions=16))
    with pytest.raises(ModelError, match="prompt 2 "):
        generate(subject, PROMPTS, max_new_tokens=7)
    with pytest.raises(UsageError, match="max_new_tokens"):
        generate(subject, PROMPTS, max_new_tokens=0)
    with pytest.raises(UsageError, match="batch_size"):
        generate(subject, PROMPTS, max_new_tokens=1, batch_size=0)


@given(
    lengths=st.lists(st.integers(0, 50), max_size=40),
    batch_size=st.integers(1, 9),
    extra=st.integers(0, 20),
    budget=st.integers(1, 200),
)
def test_batch_plan(lengths: list[int], batch_size: int, extra: int, budget: int) -> None:
    plan = plan_batches(lengths, batch_size=batch_size, extra=extra, token_budget=budget)
    flat = [index for batch in plan for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for batch in plan:
        assert 1 <= len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * (max(lengths[i] for i in batch) + extra) <= budget
