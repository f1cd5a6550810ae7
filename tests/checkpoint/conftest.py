from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of a named architecture, saved by transformers; one folder per name."""
    import torch
    import transformers

    small: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    configs: dict[str, Callable[[], Any]] = {
        "llama": lambda: transformers.LlamaConfig(**small, tie_word_embeddings=False),
        "llama-tied": lambda: transformers.LlamaConfig(**small, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**small, tie_word_embeddings=False),
        "phi3": lambda: transformers.Phi3Config(**small, tie_word_embeddings=False),
        "mixtral": lambda: transformers.MixtralConfig(
            **small, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=4, bos_token_id=1,
            eos_token_id=2,
        ),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
            tie_word_embeddings=False,
        ),
    }  # fmt: skip
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(7)
            model = transformers.AutoModelForCausalLM.from_config(configs[name]())
            with torch.no_grad():  # biases and norms start as constants, which hide mistakes
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
            made[name] = tmp_path_factory.mktemp("saved") / name
            model.save_pretrained(made[name])
        return made[name]

    return make
