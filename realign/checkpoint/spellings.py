"""One name for the same matrix, however a checkpoint spells and packs it.

The same weights are stored under "model." and "model.language_model.", as `w1` and `gate_proj`,
fused and split, as one stack of experts and as many tensors. Here: the key under which all of these
agree. Not here: reading one layout as another (`layouts`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, slots_of

# What wrappers put before the names of a decoder: class prefixes, parallel and compiled training.
_WRAPPERS = frozenset(
    ("model", "language_model", "transformer", "backbone", "gpt_neox", "gpt_neox_japanese", "rwkv",
     "biogpt", "llm", "text_model", "thinker", "module", "_orig_mod")
)  # fmt: skip
_SPELLINGS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.(?:block_sparse_moe|moe|ffn)\."), ".mlp."),
    (re.compile(r"\.mlp\.(?:router\.)?(?:gate|router|layer)\.weight$"), ".mlp.router.weight"),
    (
        re.compile(
            r"\.mlp\.(?:gate\.|router\.|experts\.)?(?:moe_statics\.)?"
            r"(?:e_score_correction_bias|expert_bias)$"
        ),
        ".mlp.e_score_correction_bias",
    ),
    (re.compile(r"\.mlp\.(?:shared_expert|shared_mlp)\."), ".mlp.shared_experts."),
    (re.compile(r"\.self_attn\.(?:softmax_offset|attention_sink_bias)$"), ".self_attn.sinks"),
    (re.compile(r"\.mlp\.post_mlp_layernorm\."), ".post_mlp_layernorm."),
    (re.compile(r"^(?:embed_out|head|unembed)\.weight$"), "lm_head.weight"),
    (re.compile(r"^(?:embed|embed_in|word_embeddings|wte)\.weight$"), "embed_tokens.weight"),
    (re.compile(r"\.LayerNorm\.gamma$"), ".LayerNorm.weight"),
    (re.compile(r"\.LayerNorm\.beta$"), ".LayerNorm.bias"),
)
_OF_EXPERTS = {
    "w1": "gate_proj",
    "v1": "up_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "output_linear": "down_proj",
    "fc2": "down_proj",
}
"""Mixtral's names and, for stacks, those of DBRX, Granite and Aria."""
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.([^.]+)\.(weight|bias)$")


@dataclass(frozen=True)
class Part:
    """One logical matrix (or vector) of a stored tensor, with the key that all layouts share."""

    key: str
    slot: Slot


def parts_of(checkpoint: Checkpoint, name: str) -> tuple[Part, ...]:
    """The parts of one stored tensor, in row order; a tensor of one meaning is one part."""
    return tuple(Part(_key(slot), slot) for slot in _slots(checkpoint, name))


def spelled(name: str) -> str:
    """A tensor's name without the prefixes of wrappers, in one spelling of its modules.

    The layers of "language_model.model.layers.0..." and "model.language_model.layers.0..." are
    both "layers.0...".
    """
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    name = ".".join(parts)
    for pattern, plain in _SPELLINGS:
        name = pattern.sub(plain, name)
    return name


def _slots(checkpoint: Checkpoint, name: str) -> tuple[Slot, ...]:
    """As `slots_of`, and the bias of a fused projection has the blocks of its weight."""
    slots, shape = slots_of(checkpoint, name), checkpoint.tensors[name].shape
    weight = f"{name.removesuffix('bias')}weight"
    if len(shape) != 1 or not name.endswith(".bias") or weight not in checkpoint.tensors:
        return slots
    fused = slots_of(checkpoint, weight)
    last = fused[-1]
    if last.expert is not None or last.rows is None or last.rows[1] != shape[0]:
        return slots
    return tuple(
        replace(each, key=f"{name}[{each.module}]", tensor=name, transposed=False) for each in fused
    )


def _key(slot: Slot) -> str:
    name = spelled(slot.tensor)
    module, part = name, slot.key[len(slot.tensor) + 1 : -1]
    found = _EXPERT.match(name)
    if found is not None:
        parent, expert, module, leaf = found.groups()
        return f"{parent}.{expert}.{_OF_EXPERTS.get(module, module)}.{leaf}"
    if not part:
        return name
    leaf = "bias" if name.endswith(".bias") else "weight"
    parent, _, module = name.removesuffix(f".{leaf}").rpartition(".")
    expert, _, block = part.partition(".")
    if slot.expert is None and slot.span is None:  # a block of rows
        return f"{parent}.{part}.{leaf}"
    parent = parent.removesuffix(".mlp") if slot.span is not None else parent
    parent = parent if parent.endswith(".experts") else f"{parent}.experts"
    block = block or _OF_EXPERTS.get(module, module)
    return f"{parent}.{expert[1:]}.{block}.{leaf}"
