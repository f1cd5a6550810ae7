"""What a tensor is, told by its name, its shape and the config: the naming habits of the field.

Here: kind, module and layer of every tensor, and the logical matrices inside a stored one. Not
here: comparing checkpoints (`matching`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from realign.checkpoint.headers import FLOATS, TensorInfo

if TYPE_CHECKING:
    from realign.checkpoint.reader import Checkpoint

Kind = Literal["block_linear", "embedding", "head", "norm", "bias", "router", "buffer", "other"]

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
# Towers for images and sound have blocks of their own, which are no decoder blocks.
_TOWER = re.compile(r"(?:^|\.)[a-z_]*(?:vision|visual|image|audio|speech)[a-z_]*\.")
_NORM = re.compile(r"norm|(?:^|[._])ln(?:[._\d]|$)")
_EXPERTS = re.compile(r"(?:^|\.)experts\.")
_EMBEDDINGS = frozenset(
    ("embed_tokens", "embed_tokens_per_layer", "wte", "wpe", "word_embeddings", "embed_in",
     "embeddings", "tok_embeddings", "embed_positions", "position_embeddings", "token_embedding",
     "relative_attention_bias")
)  # fmt: skip
_HEADS = frozenset(("lm_head", "embed_out", "output_layer"))
_ROUTERS = frozenset(("gate", "router", "shared_expert_gate", "wg"))
_BUFFERS = frozenset(("inv_freq", "masked_bias", "position_ids", "freqs_cis"))

_CONV1D_TYPES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))
_CONV1D_MODULES = frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))
# Expert stacks that are multiplied from the right, stored as [experts, d_in, d_out].
_TRANSPOSED_EXPERTS = frozenset(("gpt_oss", "llama4", "llama4_text", "dbrx"))
_FUSED = frozenset(
    ("qkv_proj", "Wqkv", "wqkv", "qkv", "W_pack", "query_key_value", "c_attn", "in_proj_qkvz")
)
# Query, key and value as contiguous rows; elsewhere they are interleaved head by head.
_CONTIGUOUS_QKV = frozenset(
    ("phi3", "phi4_multimodal", "mpt", "dbrx", "baichuan", *_CONV1D_TYPES)
)  # fmt: skip


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
    """One logical matrix [d_out, d_in]: a stored tensor, a row block of one, or one expert."""

    key: str
    """Unique: the tensor's name, or "name[q_proj]" for a row block, "name[e3]" for an expert."""
    tensor: str
    module: str
    layer: int | None
    rows: tuple[int, int] | None
    """Half-open block of rows of the logical matrix; of a three-dimensional stack of experts, the
    one index (e, e + 1) on its first dimension, which the matrix then loses. None: everything."""
    transposed: bool
    """Stored as [d_in, d_out] (GPT-2's Conv1D): transpose on entry and back on exit."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config (multimodal models nest it)."""
    nested = config.get("text_config")
    return cast(Mapping[str, Any], nested) if isinstance(nested, Mapping) else config


def says_tied(config: Mapping[str, Any]) -> bool | None:
    """What a config says about its output head being the embeddings; None where it says nothing."""
    inner = text_config(config)
    said = inner.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    return None if said is None else bool(said)


def is_tied(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the output head is the embeddings.

    Where the config does not say, its class decides (GPT-2 and Gemma tie, and transformers leaves
    out what equals a default): a checkpoint without a head of its own is taken for a tied one. A
    stored copy of the embeddings is left out when a checkpoint is opened (see `reader`).
    """
    said = says_tied(config)
    return find_head(tensors) is None if said is None else said


def find_embedding(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The input embeddings of a language model, by name."""
    for module in ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"):
        found = [name for name in tensors if name.split(".")[-2:] == [module, "weight"]]
        if len(found) == 1:
            return found[0]
    return None


def find_head(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The stored output head of a language model, by name; None where it is tied or absent."""
    found = [
        name
        for name in tensors
        if (parts := name.split("."))[-1] == "weight" and len(parts) > 1 and parts[-2] in _HEADS
    ]
    return found[0] if len(found) == 1 else None


def is_conv1d(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module stores its weight as [d_in, d_out] (GPT-2's Conv1D)."""
    return text_config(config).get("model_type") in _CONV1D_TYPES and module in _CONV1D_MODULES


def classify(checkpoint: Checkpoint) -> Mapping[str, TensorRole]:
    """The role of every tensor of a checkpoint, by name."""
    return {name: role_of(info) for name, info in checkpoint.tensors.items()}


def role_of(info: TensorInfo) -> TensorRole:
    """The role of one tensor, from its name, type and number of dimensions."""
    parts = info.name.split(".")
    leaf = parts[-1]
    module = parts[-2] if len(parts) > 1 and leaf in {"weight", "bias"} else leaf
    found = None if _TOWER.search(info.name) else _LAYER.search(info.name)
    layer = int(found.group(1)) if found else None
    return TensorRole(info.name, _kind(info, parts, module, layer), module, layer)


def _kind(info: TensorInfo, parts: list[str], module: str, layer: int | None) -> Kind:
    leaf, dimensions = parts[-1], len(info.shape)
    if info.dtype not in FLOATS or leaf in _BUFFERS or (leaf == "bias" and dimensions > 2):
        return "buffer"
    if layer is not None and _ROUTERS.intersection(parts):
        return "router"
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias"
    if dimensions == 1:
        return "norm" if any(_NORM.search(part.lower()) for part in parts[-2:]) else "other"
    if module in _EMBEDDINGS:
        return "embedding"
    if module in _HEADS:
        return "head"
    if layer is None:
        return "other"
    if (dimensions == 2 and leaf == "weight") or (
        dimensions == 3 and _EXPERTS.search(info.name) is not None
    ):
        return "block_linear"
    return "other"


def slots_of(checkpoint: Checkpoint, name: str) -> tuple[Slot, ...]:
    """The logical matrices of one tensor, in row order.

    Fused q/k/v and gate/up projections whose parts are contiguous rows are split, so that fused and
    unfused checkpoints get the same edit. A layout that interleaves heads (GPT-NeoX, Bloom, most
    Falcon) stays one matrix. A three-dimensional stack gives one matrix per expert. Any other
    tensor, of whatever shape, is one slot.
    """
    info = checkpoint.tensors[name]
    role = role_of(info)
    config = text_config(checkpoint.config)
    if role.kind == "block_linear" and len(info.shape) == 3:
        transposed = _experts_transposed(role, info.shape, config)
        return tuple(
            Slot(f"{name}[e{e}]", name, role.module, role.layer, (e, e + 1), transposed)
            for e in range(info.shape[0])
        )
    transposed = len(info.shape) == 2 and is_conv1d(checkpoint.config, role.module)
    rows = info.shape[1 if transposed else 0] if len(info.shape) == 2 else 0
    blocks = _row_blocks(role, rows, config) if role.kind == "block_linear" else ()
    if not blocks:
        return (Slot(name, name, role.module, role.layer, None, transposed),)
    return tuple(
        Slot(f"{name}[{part}]", name, part, role.layer, block, transposed) for part, block in blocks
    )


def fusion_remark(role: TensorRole, slots: tuple[Slot, ...]) -> str:
    """Why a fused tensor is edited as one matrix; empty where there is nothing to say."""
    if len(slots) == 1 and role.module in _FUSED:
        return "query, key and value are interleaved in it: edited as one matrix"
    return ""


def _experts_transposed(
    role: TensorRole, shape: tuple[int, ...], config: Mapping[str, Any]
) -> bool:
    _, first, second = shape
    width = config.get("hidden_size") or config.get("d_model")
    known = config.get("model_type") in _TRANSPOSED_EXPERTS
    if first == second or width not in {first, second}:
        return known
    reads_width = role.module not in {"down_proj", "w2"}  # down projections write it
    return (first == width) if reads_width else (second == width)


def _row_blocks(
    role: TensorRole, rows: int, config: Mapping[str, Any]
) -> tuple[tuple[str, tuple[int, int]], ...]:
    if role.module == "gate_up_proj" and rows % 2 == 0:
        return (("gate_proj", (0, rows // 2)), ("up_proj", (rows // 2, rows)))
    if role.module not in _FUSED:
        return ()
    heads, kv_heads, head_dim = _heads(config)
    kind = config.get("model_type")
    if kind == "falcon" and not config.get("new_decoder_architecture"):
        kv_heads = 1 if config.get("multi_query") else 0
    elif kind == "gpt_bigcode":
        kv_heads = 1 if config.get("multi_query", True) else 0
    elif kind not in _CONTIGUOUS_QKV:
        return ()
    if not heads or not kv_heads or rows != (heads + 2 * kv_heads) * head_dim:
        return ()
    q, kv = heads * head_dim, kv_heads * head_dim
    return (("q_proj", (0, q)), ("k_proj", (q, q + kv)), ("v_proj", (q + kv, rows)))


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Query heads, key/value heads and the width of one; 0 where the config does not say."""

    def number(*keys: str) -> int:
        for key in keys:
            value = config.get(key)
            if isinstance(value, int) and value > 0:
                return value
        return 0

    heads = number("num_attention_heads", "n_heads", "n_head")
    attention = config.get("attn_config")
    nested = cast(Mapping[str, Any], attention) if isinstance(attention, Mapping) else {}
    kv_heads = number("num_key_value_heads") or int(nested.get("kv_n_heads") or 0) or heads
    width = number("hidden_size", "d_model", "n_embd")
    return heads, kv_heads, number("head_dim") or (width // heads if heads else 0)
