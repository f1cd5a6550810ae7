"""Tiny real models and a word-level tokenizer with a chat template, built from configurations."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from realign.model.loading import LoadedModel, wrap_model

SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>")
WORDS = tuple(f"w{i}" for i in range(41))
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def word_tokenizer(
    *, words: tuple[str, ...] = WORDS, template: str | None = TEMPLATE
) -> PreTrainedTokenizerFast:
    """Whitespace words; the template closes the assistant's turn with <end>, not with <eos>."""
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *words))}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<assistant>", "<end>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def llama(*, vocabulary: int = 48, seed: int = 0, positions: int = 128) -> LlamaForCausalLM:
    """Two layers, grouped heads, weights large enough that outputs differ clearly."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def qwen2(*, vocabulary: int = 48, seed: int = 0) -> Qwen2ForCausalLM:
    """Like `llama`, with biases on q, k and v (made large, as real ones are)."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 3.0)
    return model


def gpt2(*, vocabulary: int = 48, seed: int = 0) -> GPT2LMHeadModel:
    """Transposed weights (Conv1D), fused c_attn, biases, learned positions."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 1.0)
    return model


def loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> LoadedModel:
    """In memory, on the CPU."""
    return wrap_model(model, tokenizer or word_tokenizer(), name="tiny")


def save(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None
) -> Path:
    """An ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return folder


PROMPTS = [
    "w1 w2 w3",
    "w4",
    "w5 w6 w7 w8 w9 w10 w11",
    "w12 w1 w13",
    "w14 w15 w16 w17",
    "w2 w2",
    "w30 w31 w32 w33 w34",
    "w0",
    "w40 w39 w38 w37 w36 w35",
]
