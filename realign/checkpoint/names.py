"""What a tensor is, told by its name, its shape and the config: the naming habits of the field.

Here: kind, module and layer of every tensor, and the logical matrices inside a stored one. Not
here: comparing checkpoints (`matching`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from realign.checkpoint.headers import FLOATS, TensorInfo
from realign.checkpoint.reader import Checkpoint

Kind = Literal[
    "block_linear", "embedding", "head", "norm", "bias", "router", "buffer", "other"
]

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBEDDINGS = {
    "embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embeddings", "tok_embeddings",
    "embed_positions", "position_embeddings", "token_embedding",
}  # fmt: skip
_HEADS = {"lm_head", "embed_out", "output_layer"}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_BUFFERS = {"inv_freq", "masked_bias", "position_ids", "freqs_cis"}
_CONV1D_TYPES = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_MODULES = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True)
class TensorRole:
    """What one stored tensor is."""

    name: str
    kind: Kind
    module: str
    """The name of the module that holds it: "q_proj", "down_proj", "input_layernorm", ..."""
    layer: int | None
    """Index of its decoder block; None outside the blocks."""


@dataclass(frozen=True)
class Slot:
    """One logical matrix [d_out, d_in]: a stored tensor or a row block of one."""

    key: str
    """Unique: the tensor's name, or "name[q_proj]" for a row block."""
    tensor: str
    module: str
    layer: int | None
    rows: tuple[int, int] | None
    """Half-open row block on the first dimension as stored; None is the whole tensor."""
    transposed: bool
    """Stored as [d_in, d_out] (GPT-2's Conv1D): transpose on entry and back on exit."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config (multimodal models nest it)."""
    nested = config.get("text_config")
    return cast(Mapping[str, Any], nested) if isinstance(nested, Mapping) else config


def is_conv1d(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module stores its weight as [d_in, d_out] (GPT-2's Conv1D)."""
    return text_config(config).get("model_type") in _CONV1D_TYPES and module in _CONV1D_MODULES


def classify(checkpoint: Checkpoint) -> Mapping[str, TensorRole]:
    """The role of every tensor of a checkpoint, by name."""
    return {name: _role(info) for name, info in checkpoint.tensors.items()}


def _role(info: TensorInfo) -> TensorRole:
    parts = info.name.split(".")
    leaf = parts[-1]
    module = parts[-2] if len(parts) > 1 and leaf in {"weight", "bias"} else leaf
    found = _LAYER.search(info.name)
    layer = int(found.group(1)) if found else None
    return TensorRole(info.name, _kind(info, leaf, module, layer), module, layer)


def _kind(info: TensorInfo, leaf: str, module: str, layer: int | None) -> Kind:
    if info.dtype not in FLOATS or leaf in _BUFFERS or (leaf == "bias" and len(info.shape) > 1):
        return "buffer"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if len(info.shape) == 1:
        return "norm" if re.search(r"norm|ln_|layernorm|\bln", info.name.lower()) else "other"
    if module in _EMBEDDINGS:
        return "embedding"
    if module in _HEADS:
        return "head"
    if layer is None or len(info.shape) != 2 or leaf != "weight":
        return "other"
    return "router" if module in _ROUTERS else "block_linear"


def slots_of(checkpoint: Checkpoint, name: str) -> tuple[Slot, ...]:
    """The logical matrices of one 2-D tensor, in row order.

    Fused q/k/v and gate/up projections whose parts are contiguous rows are split, so that fused and
    unfused checkpoints get the same edit. A layout that interleaves heads (GPT-NeoX, Bloom, Falcon)
    stays one matrix.
    """
    info = checkpoint.tensors[name]
    role = _role(info)
    config = text_config(checkpoint.config)
    transposed = len(info.shape) == 2 and is_conv1d(checkpoint.config, role.module)
    blocks = () if transposed else _row_blocks(role, info.shape, config)
    if not blocks:
        return (Slot(name, name, role.module, role.layer, None, transposed),)
    return tuple(
        Slot(f"{name}[{part}]", name, part, role.layer, rows, False) for part, rows in blocks
    )


def _row_blocks(
    role: TensorRole, shape: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[tuple[str, tuple[int, int]], ...]:
    rows = shape[0]
    if role.module == "gate_up_proj" and rows % 2 == 0:
        return (("gate_proj", (0, rows // 2)), ("up_proj", (rows // 2, rows)))
    if role.module not in {"qkv_proj", "Wqkv"}:
        return ()
    heads = config.get("num_attention_heads") or config.get("n_heads")
    if not isinstance(heads, int) or not heads:
        return ()
    kv_heads = config.get("num_key_value_heads") or heads
    width = config.get("hidden_size") or config.get("d_model")
    head_dim = config.get("head_dim") or (width // heads if isinstance(width, int) else None)
    if not isinstance(head_dim, int) or rows != (heads + 2 * kv_heads) * head_dim:
        return ()
    q, kv = heads * head_dim, kv_heads * head_dim
    return (("q_proj", (0, q)), ("k_proj", (q, q + kv)), ("v_proj", (q + kv, rows)))
