"""Teacher-forced scores: published vectors, by-hand sums, and indifference to batching."""

from __future__ import annotations

import math

import pytest
import torch
from support.model_support import PROMPTS, WORDS, gpt2, llama, loaded, qwen2, word_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from realign.errors import ModelError, NonFiniteError, UsageError
from realign.model.chat import encode
from realign.model.scoring import (
    AGREEMENTS,
    REFUSALS,
    continuation_logprobs,
    first_token_logodds,
    first_token_score,
    log_odds,
    refusal_first_tokens,
    refusal_logodds,
)

R = ("w1 w2 w3", "w2 w5 w9 w9")
C = ("w3 w3 w3", "w20 w21 w22", "w30 w31")


def by_hand(model: PreTrainedModel, prompt: list[int], reply: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + reply])).logits[0].double()
    scores = torch.log_softmax(logits, dim=-1)
    return torch.stack(
        [scores[len(prompt) - 1 + at, token] for at, token in enumerate(reply)]
    ).detach()


def pairs() -> list[tuple[list[int], list[int]]]:
    tokenizer = word_tokenizer()
    replies = [[9, 10, 11], [], [12], [9] * 7, [30, 31], [40], [7, 8], [20, 21, 22, 23], [11]]
    return [(encode(tokenizer, p), r) for p, r in zip(PROMPTS, replies, strict=True)]


@pytest.mark.parametrize("build", [llama, gpt2, qwen2])
def test_continuations_equal_the_sum_by_hand_and_batches_do_not_matter(
    build: type[PreTrainedModel],
) -> None:
    model = build()
    one = continuation_logprobs(loaded(model), pairs(), batch_size=1)
    eight = continuation_logprobs(loaded(model), pairs(), batch_size=8)
    for single, batched, (prompt, reply) in zip(one, eight, pairs(), strict=True):
        assert single.shape == (len(reply),)
        assert single.dtype == torch.float64
        assert torch.allclose(single, batched, atol=1e-4)
        if reply:
            assert torch.allclose(single, by_hand(model, prompt, reply), atol=1e-5)


def test_log_odds_vector() -> None:
    assert log_odds([-2, -3], [-4, -6]) == pytest.approx(2.186334, abs=1e-6)
    assert log_odds([-2, -3], [0]) == pytest.approx(-1.686738, abs=1e-6)


def test_refusal_logodds_by_hand() -> None:
    model = llama()
    subject = loaded(model)
    found = refusal_logodds(subject, PROMPTS, refusals=R, agreements=C, k=3)
    assert found.values is not None
    assert found.refusals == R
    assert found.agreements == C[:2], "the opening of two words is shorter than k"
    ids = subject.tokenizer.convert_tokens_to_ids
    for value, prompt in zip(found.values, PROMPTS, strict=True):
        context = encode(subject.tokenizer, prompt)
        sides = [
            [float(by_hand(model, context, ids(text.split()[:3])).sum()) for text in side]
            for side in (R, C[:2])
        ]
        assert value == pytest.approx(log_odds(*sides), abs=1e-4)


def test_refusal_logodds_per_byte_divides_by_the_bytes_of_k_tokens() -> None:
    subject = loaded(llama())
    plain = refusal_logodds(subject, PROMPTS[:1], refusals=R[:1], agreements=C[:1], k=2)
    byte = refusal_logodds(
        subject, PROMPTS[:1], refusals=R[:1], agreements=C[:1], k=2, per_byte=True
    )
    assert plain.values is not None
    assert byte.values is not None
    assert byte.values[0] == pytest.approx(plain.values[0] / len("w1 w2"))


def test_a_tokenizer_without_the_words_gives_a_reason_not_a_number() -> None:
    found = refusal_logodds(loaded(llama()), PROMPTS)
    assert found.values is None
    assert "refusal opening" in found.reason
    with_refusals = refusal_logodds(loaded(llama()), PROMPTS, refusals=R, k=3)
    assert with_refusals.values is None
    assert "agreement opening" in with_refusals.reason


def test_the_fixed_openings() -> None:
    assert (len(REFUSALS), len(AGREEMENTS)) == (8, 8)
    words = tuple(dict.fromkeys(" ".join(REFUSALS + AGREEMENTS).split()))
    tokenizer = word_tokenizer(words=WORDS + words)
    subject = loaded(llama(vocabulary=len(tokenizer)), tokenizer)
    found = refusal_logodds(subject, PROMPTS[:2])
    assert found.values is not None
    assert (found.refusals, found.agreements) == (REFUSALS, AGREEMENTS)
    assert all(math.isfinite(value) for value in found.values)


def test_no_prompts_and_bad_k() -> None:
    assert refusal_logodds(loaded(llama()), [], refusals=R, agreements=C, k=3).values == ()
    with pytest.raises(UsageError, match="k is 0"):
        refusal_logodds(loaded(llama()), [], k=0)


@pytest.mark.parametrize(
    ("probability", "score"),
    [(0.9, 2.197224), (0.5, 0.0), (0.02, -3.891820), (0.0, -18.420681), (1.0, 18.420681)],
)
def test_first_token_score_vectors(probability: float, score: float) -> None:
    assert first_token_score(probability) == pytest.approx(score, abs=1e-6)


def test_first_token_logodds_by_hand() -> None:
    model = llama()
    subject = loaded(model)
    found = first_token_logodds(subject, PROMPTS, tokens=[9, 14, 9], batch_size=4)
    for value, prompt in zip(found, PROMPTS, strict=True):
        context = encode(subject.tokenizer, prompt)
        logits = model(torch.tensor([context])).logits[0, -1].detach()
        odds = torch.softmax(logits.double(), dim=-1)
        assert value == pytest.approx(first_token_score(float(odds[9] + odds[14])), abs=1e-4)
    for tokens in ([], [48], [-1]):
        with pytest.raises(UsageError, match="no set of token ids"):
            first_token_logodds(subject, PROMPTS, tokens=tokens)


def test_refusal_first_tokens() -> None:
    refused = [1] * 50 + [2] * 30 + [3] * 16 + [4] * 4 + [None] * 10
    # 1 opens benign replies too; 2 at exactly a tenth of its share; 4 is too rare
    benign = [1] * 10 + [2] * 3 + [9] * 97
    assert refusal_first_tokens(refused, benign) == (2, 3)
    assert refusal_first_tokens(refused, []) == (1, 2, 3)
    assert refusal_first_tokens(refused, [], most=1) == (1,)
    assert refusal_first_tokens([], benign) == ()
    assert refusal_first_tokens([None, None], benign) == ()


def test_errors_name_the_model() -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="tiny"):
        continuation_logprobs(loaded(model), pairs())
    with pytest.raises(ModelError, match="prompt 3 "):
        continuation_logprobs(loaded(llama(positions=8)), [([2], [8])] * 3 + [([2] * 8, [8])])
