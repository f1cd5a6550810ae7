"""Families of mixtures of experts, saved as transformers saves them: experts apart, or stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from support.repair_support import SMALL

_SMALL: dict[str, Any] = {**SMALL, "num_hidden_layers": 2, "tie_word_embeddings": False}

CONFIGS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(
        **_SMALL, intermediate_size=48, num_local_experts=3
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_SMALL,
        intermediate_size=48,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[1],
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **_SMALL, intermediate_size=48, num_local_experts=3
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_SMALL,
        intermediate_size=24,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    ),
}


def make_experts(folder: Path, arch: str) -> dict[str, Path]:
    """Save base, aligned and fine-tuned models; returns their folders by role."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[arch]())
    found: dict[str, Path] = {}
    for seed, role in enumerate(("base", "aligned", "finetuned")):
        generator = torch.Generator().manual_seed(seed)
        if seed:
            with torch.no_grad():
                for parameter in model.parameters():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.03 * noise)
        found[role] = folder / role
        model.save_pretrained(found[role])
    return found
