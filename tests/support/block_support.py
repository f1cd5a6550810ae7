"""Tiny models of architectures whose blocks differ: experts, states, windows, parallel paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

_SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "initializer_range": 0.2,
}

CONFIGS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(
        **_SMALL, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=True
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2
    ),
    "gemma2 (windows)": lambda: transformers.Gemma2Config(
        **_SMALL, intermediate_size=48, num_hidden_layers=4, head_dim=8, sliding_window=4
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_SMALL, intermediate_size=20, num_hidden_layers=2, num_local_experts=3
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SMALL,
        intermediate_size=48,
        num_hidden_layers=2,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SMALL,
        intermediate_size=24,
        num_hidden_layers=2,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=4,
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=48, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.2
    ),
    "falcon_h1 (hybrid)": lambda: transformers.FalconH1Config(
        **_SMALL,
        intermediate_size=48,
        num_hidden_layers=2,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
    ),
}


def block_model(name: str, *, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model in evaluation mode."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.requires_grad_(False)
