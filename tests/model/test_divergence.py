"""KL to the reference: vectors, clamping, one model at a time, vocabularies that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.model_support import PROMPTS, WORDS, llama, loaded, qwen2, word_tokenizer
from transformers import LlamaForCausalLM

from realign.errors import MismatchError, UsageError
from realign.model.chat import encode
from realign.model.divergence import kl_divergence
from realign.model.generation import Reply, generate
from realign.model.scoring import kl_to_reference, record_reference


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_vectors() -> None:
    divergence, clamped = kl_divergence(logs(0.7, 0.2, 0.1, 0), logs(0.5, 0.3, 0.1, 0.1))
    assert float(divergence) == pytest.approx(0.154438, abs=1e-6)
    assert clamped == 0
    divergence, clamped = kl_divergence(logs(0.9, 0.1), logs(1, 0))
    assert float(divergence) == pytest.approx(4.674917, abs=1e-6)
    assert clamped == 1


def test_a_negative_divergence_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="negative KL"):
        kl_divergence(logs(0.5, 0.5), logs(0.9, 0.9))  # q is no distribution


@given(st.lists(st.floats(-40, 40), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_divergence_is_never_negative(values: list[float], random: object) -> None:
    p = torch.tensor([values], dtype=torch.float64)
    q = p.flip(1)
    divergence, _ = kl_divergence(p.log_softmax(-1), q.log_softmax(-1))
    assert float(divergence) >= -1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_itself(dtype: torch.dtype) -> None:
    subject = loaded(llama().to(dtype))
    with record_reference(subject, PROMPTS, k=8, batch_size=3) as trace:
        again = kl_to_reference(subject, trace, batch_size=3)
        assert again.curve == pytest.approx([0.0] * 8, abs=1e-12), "nothing is rounded on the way"
        if dtype == torch.float32:
            single = kl_to_reference(subject, trace, batch_size=1)
            assert all(abs(value) < 1e-6 for value in single.curve)
    assert (again.dropped_reference, again.dropped_subject) == (0, 0)


def test_curve_by_hand() -> None:
    reference, subject = llama(), llama(seed=1)
    with record_reference(loaded(reference), PROMPTS, k=16) as trace:
        found = kl_to_reference(loaded(subject), trace, batch_size=4)
    replies = sorted(generate(loaded(reference), PROMPTS, max_new_tokens=16))
    tokenizer = word_tokenizer()
    for values, reply, prompt in zip(found.per_prompt, replies, PROMPTS, strict=True):
        assert len(values) == min(16, len(reply.token_ids) + 1)
        ids = torch.tensor([[*encode(tokenizer, prompt), *reply.token_ids[:15]]])
        p, q = (
            torch.log_softmax(m(ids).logits[0, -len(values) :].detach().double(), dim=-1)
            for m in (reference, subject)
        )
        expected = (p.exp() * (p - q)).sum(-1)
        assert torch.allclose(torch.tensor(values).double(), expected, atol=1e-4)
    lengths = [len(values) for values in found.per_prompt]
    assert found.counts == tuple(sum(n > k for n in lengths) for k in range(max(lengths)))
    assert found.curve[0] == pytest.approx(
        sum(v[0] for v in found.per_prompt) / len(PROMPTS), rel=1e-12
    )
    assert found.first == found.curve[0]
    assert found.shallow == pytest.approx(sum(found.curve[:5]) / 5, rel=1e-12)


def test_the_curve_reaches_one_position_past_the_reply() -> None:
    subject = loaded(llama())
    replies = [Reply(1, "", (), True), Reply(0, "", (9, 10), True), Reply(2, "", (9,) * 9, False)]
    with record_reference(subject, PROMPTS[:3], k=4, replies=replies) as trace:
        assert kl_to_reference(subject, trace).counts == (3, 2, 2, 1)


def test_suppressed_token_is_finite_and_counted() -> None:
    reference, subject = loaded(llama()), llama()
    token = next(iter(generate(reference, PROMPTS[:1], max_new_tokens=1))).token_ids[0]

    def suppress(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([token]), -torch.inf)

    subject.lm_head.register_forward_hook(suppress)
    with record_reference(reference, PROMPTS[:1], k=1) as trace:
        found = kl_to_reference(loaded(subject), trace)
    assert found.clamped == 1
    assert 0 < found.curve[0] < 60


def extended(model: LlamaForCausalLM, order: list[int], *, bias: float = -30.0) -> LlamaForCausalLM:
    """The same model with its tokens at other ids and two more that it never expects."""
    other = llama(vocabulary=50)
    other.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "embed" not in k and "lm_head" not in k},
        strict=False,
    )
    with torch.no_grad():
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            other.get_parameter(name)[order] = model.get_parameter(name)

    def never(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        fresh = [i for i in range(50) if i not in order]
        output = output.clone()
        output[..., fresh] = output.amax(dim=-1, keepdim=True) + bias
        return output

    other.lm_head.register_forward_hook(never)
    return other


def test_vocabularies_that_differ_are_matched_by_string() -> None:
    # special tokens keep their ids, two new words come before the old ones
    tokenizer = word_tokenizer(words=("new1", "new2", *WORDS))
    order = [*range(7), *range(9, 50)]
    subject = loaded(extended(llama(), order), tokenizer)
    with record_reference(loaded(llama()), PROMPTS, k=6) as trace:
        found = kl_to_reference(subject, trace)
        assert all(abs(value) < 1e-5 for value in found.curve)
        assert found.counts[0] == len(PROMPTS)
        assert found.dropped_reference == pytest.approx(0.0, abs=1e-12)
        assert 0 < found.dropped_subject < 1e-6
        likely = loaded(extended(llama(), order, bias=-2.0), tokenizer)
        with pytest.raises(MismatchError, match="only one of them has"):
            kl_to_reference(likely, trace)


def test_a_reply_is_followed_up_to_the_first_unknown_token() -> None:
    reference = llama()
    reference.lm_head.register_forward_hook(  # it hardly ever says w40, so that no mass is dropped
        lambda _, __, out: out.index_fill(-1, torch.tensor([47]), -30.0)
    )
    subject = loaded(llama(vocabulary=47), word_tokenizer(words=WORDS[:-1]))
    replies = [Reply(0, "", (9, 47, 9), True)]
    with record_reference(loaded(reference), PROMPTS[:1], k=4, replies=replies) as trace:
        found = kl_to_reference(subject, trace)
    assert found.counts == (1, 1)


def test_no_common_token() -> None:
    tokenizer = word_tokenizer()
    with record_reference(loaded(llama()), PROMPTS, k=2) as trace:
        trace.vocabulary = {f"other{i}": i for i in range(48)}
        with pytest.raises(MismatchError, match="no token in common"):
            kl_to_reference(loaded(llama(), tokenizer), trace)


def test_the_reference_may_be_gone_and_its_file_goes_too(tmp_path: Path) -> None:
    with loaded(llama()) as reference:
        trace = record_reference(reference, PROMPTS, k=4, folder=tmp_path)
    assert next(reference.model.parameters()).device.type == "meta"
    (stored,) = tmp_path.rglob("logits.bin")
    assert stored.stat().st_size == sum(len(r) + 1 for r in trace.replies) * 48 * 4
    assert kl_to_reference(loaded(qwen2()), trace).first is not None
    trace.close()
    assert not list(tmp_path.iterdir())


def test_usage_and_nothing() -> None:
    subject = loaded(llama())
    with pytest.raises(UsageError, match="k is 0"):
        record_reference(subject, PROMPTS, k=0)
    with pytest.raises(UsageError, match="one by one"):
        record_reference(subject, PROMPTS, replies=[])
    with record_reference(subject, []) as trace:
        found = kl_to_reference(subject, trace)
    assert (found.curve, found.first, found.shallow) == ((), None, None)
