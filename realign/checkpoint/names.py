"""What a tensor is, told by its name, its shape and the config: the naming habits of the field.

Here: kind, module and layer of every tensor. Not here: the logical matrices inside a stored one
(`slots`), comparing checkpoints (`matching`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

from realign.checkpoint.headers import FLOATS, TensorInfo

if TYPE_CHECKING:
    from realign.checkpoint.reader import Checkpoint

Kind = Literal["block_linear", "embedding", "head", "norm", "bias", "router", "buffer", "other"]

_LAYER = re.compile(
    r"(?:^|\.)(?:layers|layer|h|blocks|block|attentions|ffns|cross_attn_layers)\.(\d+)\."
)
_MAIN_BLOCKS = re.compile(r"(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
_AHEAD = frozenset(("mtp", "mtp_layers", "mtp_block", "mtp_emb_norm"))
# Towers for images and sound have blocks of their own, which are no decoder blocks.
_TOWER = re.compile(
    r"(?:^|\.)[a-z_]*(?:vision|visual|image|audio|speech|whisper|qformer|resampler|multi_modal|"
    r"mm_projector|connector|aligner|vqmodel)[a-z_]*(?:\.|$)"
)
_NORM = re.compile(r"norm|(?:^|[._])ln(?:[._\d]|$)")
_EXPERTS = re.compile(r"(?:^|\.)(?:shared_)?experts\.")
_PILED = frozenset(("w1", "v1", "w2"))
# Stacks beside experts: Granite's and JetMoE's linear layers, and the heads of Zamba's mamba.
_STACKED = frozenset(("input_linear", "output_linear", "x_proj_weight", "dt_proj_weight"))
_EMBEDDINGS = frozenset(
    ("embed_tokens", "embed_tokens_per_layer", "wte", "wpe", "word_embeddings", "embed_in",
     "embeddings", "tok_embeddings", "embed_positions", "position_embeddings", "token_embedding",
     "relative_attention_bias", "tokens_embed", "positions_embed", "word_embedding",
     "input_embedding", "segment_embedding", "token_type_embeddings", "ngram_embeddings",
     "pronunciation_embed", "shape_embed", "encoder_hash_tok_embedding")
)  # fmt: skip
_INPUTS = (
    "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "tokens_embed",
    "word_embedding", "embeddings", "embed",
)  # fmt: skip
_OUTER_EMBEDDINGS = frozenset(
    ("embed", "shared", "w")
)  # words of many meanings, where there is no layer
_HEADS = frozenset(
    ("lm_head", "embed_out", "output_layer", "unembed", "lm_loss", "generator_lm_head")
)
_HEAD_ENDS = (
    "predictions.decoder.weight", "lm_head.decoder.weight", "pred_layer.proj.weight",
)  # fmt: skip
_HEAD_NAMES = frozenset(("head.weight", "output.weight"))
# What sends tokens to experts; an indexer picks the tokens that sparse attention looks at.
_ROUTERS = frozenset(
    ("gate", "router", "modality_router", "shared_expert_gate", "wg", "indexer", "moe_statics",
     "e_score_correction_bias", "expert_bias")
)  # fmt: skip
_BUFFERS = frozenset(("inv_freq", "masked_bias", "position_ids", "freqs_cis"))

CONV1D_TYPES = frozenset(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"))
_CONV1D_MODULES = frozenset(("c_attn", "c_proj", "c_fc", "q_attn"))


@dataclass(frozen=True)
class TensorRole:
    """What one stored tensor is."""

    name: str
    kind: Kind
    module: str
    """The name of the module that holds it: "q_proj", "down_proj", "input_layernorm", ..."""
    layer: int | None
    """Index of its decoder block; None outside the blocks."""


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
    for module in _INPUTS:
        found = [name for name in tensors if name.split(".")[-2:] == [module, "weight"]]
        if len(found) == 1:
            return found[0]
    return None


def find_head(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The stored output head of a language model, by name; None where it is tied or absent."""
    found = sorted((name.count("."), name) for name in tensors if _is_head(name))
    if not found or (len(found) > 1 and found[0][0] == found[1][0]):
        return None
    return found[0][1]  # helpers inside a model may have heads of their own: the outermost counts


def _is_head(name: str) -> bool:
    parts = name.split(".")
    if parts[-1] != "weight" or len(parts) < 2:
        return False
    return parts[-2] in _HEADS or name in _HEAD_NAMES or name.endswith(_HEAD_ENDS)


def in_tower(name: str) -> bool:
    """Whether a tensor belongs to a tower for images or sound, or joins one to the language."""
    return _TOWER.search(name) is not None


def predicts_ahead(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor belongs to the heads that predict several tokens at once.

    They are stored as "mtp..." or as decoder blocks after the last one (DeepSeek-V3, GLM-4.5), and
    transformers leaves them out when it loads and saves such a model.
    """
    if any(part in _AHEAD for part in name.split(".")):
        return True
    blocks = text_config(config).get("num_hidden_layers")
    found = _MAIN_BLOCKS.match(name)
    return found is not None and isinstance(blocks, int) and int(found.group(1)) >= blocks


def dispensable(config: Mapping[str, Any], name: str) -> str:
    """What a tensor is for that one side may lack, or nothing: the rest of the model pairs."""
    if predicts_ahead(config, name):
        return "for predicting several tokens at once"
    return "for images and sound" if in_tower(name) else ""


def is_conv1d(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module stores its weight as [d_in, d_out] (GPT-2's Conv1D)."""
    return text_config(config).get("model_type") in CONV1D_TYPES and module in _CONV1D_MODULES


def classify(checkpoint: Checkpoint) -> Mapping[str, TensorRole]:
    """The role of every tensor of a checkpoint, by name."""
    return {name: role_of(info) for name, info in checkpoint.tensors.items()}


def role_of(info: TensorInfo) -> TensorRole:
    """The role of one tensor, from its name, type and number of dimensions."""
    return _role(info.name, info.dtype in FLOATS, len(info.shape))


@lru_cache(maxsize=2**17)  # asked many times of every tensor, and large models have 10^5 of them
def _role(name: str, floating: bool, dimensions: int) -> TensorRole:
    parts = name.split(".")
    leaf, tower = parts[-1], in_tower(name)
    module = parts[-2] if len(parts) > 1 and leaf in {"weight", "bias"} else leaf
    found = None if tower else _LAYER.search(name)
    layer = int(found.group(1)) if found else None
    if not floating or leaf in _BUFFERS or (leaf == "bias" and dimensions > 2):
        kind: Kind = "buffer"
    elif tower:
        kind = "other"
    elif layer is not None and not _ROUTERS.isdisjoint(parts):
        kind = "router"
    elif leaf == "bias" or leaf.endswith("_bias"):
        kind = "bias"
    elif dimensions == 1:
        kind = "norm" if any(_NORM.search(part.lower()) for part in parts[-2:]) else "other"
    else:
        kind = _kind_of_matrix(name, module, layer, dimensions)
    return TensorRole(name, kind, module, layer)


def _kind_of_matrix(name: str, module: str, layer: int | None, dimensions: int) -> Kind:
    if module in _EMBEDDINGS or (layer is None and module in _OUTER_EMBEDDINGS):
        return "embedding"
    if _is_head(name):
        return "head"
    if layer is None:
        return "other"
    in_experts = _EXPERTS.search(name) is not None
    if dimensions == 2:
        # DBRX piles its experts up in two dimensions, as parameters without a module.
        linear = name.endswith(".weight") or (in_experts and module in _PILED)
    else:
        linear = dimensions == 3 and (in_experts or module in _STACKED)
    return "block_linear" if linear else "other"
