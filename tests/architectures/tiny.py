"""Reduced configs: every architecture of the installed transformers at a size of some 100 kB.

Here: one generic reduction by the habits of naming in configs, and the overrides where habits
fail (`overrides`). Not here: weights (`trio`) and what is done with them (`examine`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from architectures.overrides import OVERRIDES, Special
from transformers import CONFIG_MAPPING, PretrainedConfig

VOCABULARY = 160
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, EXPERTS = 64, 4, 2, 16, 96, 2, 4
POSITIONS = 128

# First match wins; the value an attribute gets that is an int, and larger than the new one.
_RULES: tuple[tuple[str, int], ...] = (
    (r"^(vocab_size|.*_vocab_size|n_vocab|vocab_size_per_layer_input|n_words)$", VOCABULARY),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions|"
     r"max_source_positions|seq_length|max_sequence_length|max_length|model_max_length)$",
     POSITIONS),
    (r"^(original_max_position_embeddings)$", POSITIONS // 2),
    (r"^(sliding_window|attention_window|window_size|local_window_size|attention_chunk_size|"
     r"chunk_size|mamba_chunk_size|sliding_window_size)$", 32),
    (r"^(num_key_value_heads|num_kv_heads|n_kv_heads|num_global_key_value_heads|kv_n_heads|"
     r"multi_query_group_num|.*num_key_value_heads)$", KV_HEADS),
    (r"^(num_attention_heads|n_head|n_heads|num_heads|encoder_attention_heads|"
     r"decoder_attention_heads|.*_num_heads|.*_attention_heads|.*_n_heads|.*num_.*_heads)$", HEADS),
    (r"^(qk_rope_head_dim|rotary_dim)$", 8),
    (r"^(qk_nope_head_dim|v_head_dim|head_dim|.*head_dim|d_kv|kv_channels|head_size|.*_d_head)$",
     HEAD_DIM),
    (r"^(q_lora_rank|kv_lora_rank|.*_lora_rank|.*_rank)$", 24),
    (r"^(num_hidden_layers|n_layer|n_layers|num_layers|encoder_layers|decoder_layers|"
     r"num_decoder_layers|num_encoder_layers|depth|depths|.*num_hidden_layers|.*_layers)$", LAYERS),
    (r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|.*num_experts|"
     r"ffn_num_experts)$", EXPERTS),
    (r"^(num_experts_per_tok|moe_top_k|num_experts_per_token|top_k|moe_k|.*_topk|"
     r"experts_per_token|num_selected_experts)$", 2),
    (r"^(n_group|topk_group|n_groups|num_expert_group|mamba_n_groups)$", 1),
    (r"^(moe_intermediate_size|moe_ffn_hidden_size|expert_ffn_hidden_size|"
     r"shared_expert_intermediate_size|ffn_dim|ffn_hidden_size|.*_ffn_dim|intermediate_size|"
     r".*intermediate_size.*|n_inner|d_ff|mlp_hidden_size|dff|.*mlp_dim.*|.*ff_dim)$", FFN),
    (r"^(hidden_size|d_model|n_embd|embed_dim|hidden_dim|emb_dim|word_embed_proj_dim|"
     r"embedding_size|.*_hidden_size.*|.*_width|dim|width|.*embed_dim|lru_width|hidden_size.*|"
     r"projection_dim|.*_dim|.*hidden_size)$", HIDDEN),
    (r"^(image_size)$", 32),
    (r"^(.*patch_size)$", 16),
    (r"^(state_size|d_state|mamba_d_state|ssm_state_size)$", 8),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), value) for pattern, value in _RULES)
_ID = re.compile(r"(_token_id|_token_index|_token_ids|_idx|_index|_id)$")
_DERIVED = (
    "layer_types", "layers_block_type", "mlp_layer_types", "block_types", "_block_types",
    "hybrid_override_pattern", "no_rope_layers", "layer_block_types", "attention_layers",
    "per_layer_config", "num_attention_heads_per_layer", "per_layer_attributes",
)  # fmt: skip
_KEEP = frozenset(("transformers_version", "model_type", "architectures", "dtype", "torch_dtype"))


def special(model_type: str) -> Special:
    """What this architecture needs beside the generic reduction."""
    return OVERRIDES.get(model_type, Special())


def tiny_config(model_type: str, extra: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A small config of an architecture, with ids inside its vocabulary."""
    own = special(model_type)
    kind = CONFIG_MAPPING[model_type]
    start = kind(**copy.deepcopy(dict(own.start)))
    settings = _reduced(start.to_dict(), drop=own.drop)
    settings = _merge(settings, own.settings)
    settings = _merge(settings, extra or {})
    settings.pop("model_type", None)
    settings.pop("transformers_version", None)
    return kind(**settings)


def _merge(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict) and not key.startswith("rope"):
            merged[key] = _merge(old, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _reduced(settings: Mapping[str, Any], *, drop: tuple[str, ...]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if key in drop or (key in _DERIVED and "keep:" + key not in drop):
            continue
        small[key] = _value(key, value, drop)
    if "is_decoder" in small:
        small["is_decoder"] = True
    if "head_dim" in small and small["head_dim"] is None:
        small["head_dim"] = HEAD_DIM
    if "kv_lora_rank" in small and "qk_rope_head_dim" in small:  # latent attention: no groups
        small["num_key_value_heads"] = small.get("num_attention_heads", HEADS)
        if settings.get("head_dim") == settings["qk_rope_head_dim"]:
            small["head_dim"] = small["qk_rope_head_dim"]
        if "qk_head_dim" in small:
            small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    return small


def _value(key: str, value: Any, drop: tuple[str, ...]) -> Any:
    if key in _KEEP or isinstance(value, bool):
        return value
    if isinstance(value, dict):
        if key in {"id2label", "label2id", "rope_parameters", "rope_scaling"}:
            return _inner_rope(value) if key.startswith("rope") else value
        return _reduced(value, drop=drop)
    if _ID.search(key) and isinstance(value, int):
        return _small_id(key, value)
    if isinstance(value, int):
        for pattern, new in _COMPILED:
            if pattern.match(key):
                return min(value, new)
        return value
    if isinstance(value, list) and value and key.endswith("token_id"):
        return [_small_id(key, each) for each in value]
    return value


def _inner_rope(value: dict[str, Any]) -> dict[str, Any]:
    new = dict(value)
    for key, inner in value.items():
        if isinstance(inner, dict):
            new[key] = _inner_rope(inner)
        elif key == "mrope_section":
            new[key] = [2, 3, 3]
        elif key == "original_max_position_embeddings":
            new[key] = POSITIONS // 2
    return new


def _small_id(key: str, value: int) -> int:
    fixed = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if key in fixed:
        return fixed[key]
    return value if value < 8 else 140 + (sum(map(ord, key)) % 16)
