"""What single architectures need beside the generic reduction, with the reason in a comment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Special:
    """One architecture's deviations."""

    start: Mapping[str, Any] = field(default_factory=dict)
    """Arguments without which its config cannot be made."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What is set after the reduction."""
    drop: tuple[str, ...] = ()
    """Keys left to their defaults; "keep:KEY" keeps a list that is dropped otherwise."""
    part: str = ""
    """The part of its config that its causal class takes, where the Auto class passes the whole."""
    prepare: Callable[[Any], None] | None = None
    """Done to the fresh model."""
    dtype: torch.dtype | None = None
    """Where only one type works."""
    reason: tuple[str, str] | None = None
    """Why it cannot be repaired: an entry of the closed list, and the particulars."""


def _hybrid(*types: str, **settings: Any) -> Special:
    """A layer pattern in which every kind of layer occurs."""
    layers = {"num_hidden_layers": len(types), "layer_types": list(types)}
    return Special(settings={**layers, **settings})


_LINEAR, _FULL, _SLIDING = "linear_attention", "full_attention", "sliding_attention"
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2}
_NEXT = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
_GEMMA3N = {
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
    "hidden_size_per_layer_input": 16,
}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
    "global_head_dim": 16,
}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 32,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 16,
}
_ASSISTANT = {
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 0,
        "layer_types": [_SLIDING, _FULL],
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 16,
    },
    "backbone_hidden_size": 64,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_DOTS3 = {
    "layer_types": ["indexed_attention", _SLIDING],
    "index_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 24,
    "swa_kv_lora_rank": 24,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}

OVERRIDES: Mapping[str, Special] = {
    # Both kinds of layer, so that the cache finds an attention layer.
    "bailing_hybrid": _hybrid(_LINEAR, _FULL),
    "kimi_linear": _hybrid(_LINEAR, _FULL),
    "lfm3": _hybrid("conv", _FULL, "conv", _SLIDING),
    "qwen3_5": Special(settings={"text_config": {"num_hidden_layers": 4, "layer_types": [*_NEXT]}}),
    "qwen3_5_text": _hybrid(*_NEXT),
    "qwen3_5_moe": Special(
        settings={"text_config": {"num_hidden_layers": 4, "layer_types": [*_NEXT]}}
    ),
    "qwen3_5_moe_text": _hybrid(*_NEXT),
    "qwen3_next": _hybrid(*_NEXT),
    "qwen4_exp": Special(
        settings={"text_config": {"num_hidden_layers": 4, "layer_types": [*_NEXT], **_INDEXER}}
    ),
    "qwen4_exp_text": _hybrid(*_NEXT, **_INDEXER),
    "jamba": Special(settings={"num_hidden_layers": 4, "attn_layer_period": 2,
                               "attn_layer_offset": 1, "expert_layer_period": 2,
                               "expert_layer_offset": 1}),
    "recurrent_gemma": Special(settings={"num_hidden_layers": 3}),
    "bamba": Special(settings={**_MAMBA, "attn_layer_indices": [1]}),
    "falcon_h1": Special(settings={**_MAMBA, "mamba_d_ssm": 128}),
    "granitemoehybrid": _hybrid(_LINEAR, _FULL, **_MAMBA),
    "mamba2": Special(settings={"num_heads": 8, "head_dim": 16}),
    "zamba": Special(settings={"num_hidden_layers": 4, "attention_head_dim": 32,
                               "attention_hidden_size": 128,
                               "layers_block_type": [_LINEAR, _LINEAR, "hybrid", "hybrid"]}),
    "zamba2": Special(
        settings={"num_hidden_layers": 4, "n_mamba_heads": 4,
                  "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"]},
        drop=("mamba_headdim", "attention_hidden_size", "attention_head_dim", "kv_channels",
              "hybrid_layer_ids"),
    ),
    "lfm2_moe": Special(settings={"layer_types": ["conv", _FULL]}),
    # Sizes that must agree with one another.
    "xlnet": Special(settings={"d_head": 16}, dtype=torch.float32),  # its masks are float32
    "gpt_neo": Special(settings={"attention_types": [[["global", "local"], 1]]},
                       drop=("attention_layers",)),
    "reformer": Special(settings={"attn_layers": ["local", "lsh"], "axial_pos_embds_dim": [16, 48],
                                  "axial_pos_shape": [8, 16], "num_buckets": 4,
                                  "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16}),
    "xlstm": Special(drop=("chunk_size",), settings={"hidden_size": 128, "embedding_dim": 128,
                                                    "num_blocks": 2}),
    "longcat_flash": Special(settings={"zero_expert_num": 2}),
    "deepseek_v2": Special(settings={"num_experts_per_tok": 2}),
    "dots1": Special(
        settings={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    ),
    "nemotron": Special(settings={"num_key_value_heads": 2}),
    "cohere_compass_text": Special(
        settings={"rope_parameters": {_FULL: {"rope_type": "default", "rope_theta": 1e4}}}
    ),
    "hrm_text": Special(drop=("num_layers_per_stack",)),
    "blt": Special(settings={"encoder_hash_byte_group_vocab": 100}),
    "qwen2_vl": Special(settings={"text_config": {"rope_parameters": _MROPE}}),
    "qwen2_5_vl": Special(settings={"text_config": {"rope_parameters": _MROPE}}),
    # Their causal class takes the decoder's config, and the Auto class hands it the whole.
    "musicgen": Special(part="decoder"),
    "musicgen_melody": Special(part="decoder"),
    "emu3": Special(part="text_config"),
    "mllama": Special(part="text_config"),
    # Draft models: they read the states of a larger model.
    "gemma4_assistant": Special(start=_ASSISTANT),
    "gemma4_unified_assistant": Special(start=_ASSISTANT),
    "gemma3n": Special(settings={"text_config": _GEMMA3N}),
    "gemma3n_text": Special(settings=_GEMMA3N),
    "gemma4": Special(settings={"text_config": _GEMMA4}),
    "gemma4_text": Special(settings=_GEMMA4),
    "gemma4_unified": Special(settings={"text_config": _GEMMA4}),
    "gemma4_unified_text": Special(settings=_GEMMA4),
    "dots3_note": Special(
        settings={
            "text_config": _DOTS3,
            "vision_config": {
                "pyramid_num_routed": [-1, 4],
                "adapter_in_dim": 64,
                "adapter_out_dim": 64,
            },
            "audio_config": {"adapter_input_size": 64},
        }
    ),
    "dots3_note_text": Special(settings=_DOTS3),
    "dbrx": Special(start={"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}),
    # The language whose adapters run must be chosen.
    "xmod": Special(settings={"default_language": "en_XX", "languages": ["en_XX", "de_DE"]}),
}  # fmt: skip
