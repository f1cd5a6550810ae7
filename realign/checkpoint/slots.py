"""The logical matrices inside stored tensors, and where their rows lie in a file.

A stored tensor is one matrix, several (fused projections: blocks of rows), or a stack of experts,
any of them perhaps transposed. Here: which matrices there are, their shapes, and views of them. Not
here: what a tensor is (`names`), pairing checkpoints of different layouts (`layouts`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from realign.checkpoint.names import CONV1D_TYPES, TensorRole, is_conv1d, role_of, text_config

if TYPE_CHECKING:
    from realign.checkpoint.reader import Checkpoint

# Expert stacks that are multiplied from the right, stored as [experts, d_in, d_out].
_TRANSPOSED_EXPERTS = frozenset(
    ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
)
# Their down projections write the width of the model; all others read it.
_WRITES_WIDTH = frozenset(("down_proj", "w2", "w2_weight", "fc2", "output_linear"))
# Experts whose gate and up projections alternate, column by column.
_INTERLEAVED_EXPERTS = frozenset(("gpt_oss",))
_FUSED_QKV = frozenset(
    ("qkv_proj", "Wqkv", "wqkv", "qkv", "W_pack", "query_key_value", "c_attn", "in_proj_qkvz")
)
# Query, key and value as contiguous rows; elsewhere they are interleaved head by head.
_CONTIGUOUS_QKV = frozenset(
    ("phi3", "phi4_multimodal", "mpt", "dbrx", "baichuan", *CONV1D_TYPES)
)  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """One logical matrix [d_out, d_in]: a stored tensor, a row block of one, or of one expert."""

    key: str
    """Unique: the tensor's name, "name[q_proj]" for a row block, "name[e3]" for an expert,
    "name[e3.gate_proj]" for a row block of an expert."""
    tensor: str
    module: str
    layer: int | None
    expert: int | None = None
    """Index on the first dimension of a three-dimensional stack, which the matrix then loses."""
    rows: tuple[int, int] | None = None
    """Half-open block of rows of the logical matrix (of the expert's, in a stack). None: all."""
    transposed: bool = False
    """Stored as [d_in, d_out] (GPT-2's Conv1D): transpose on entry and back on exit."""
    span: tuple[int, int] | None = None
    """Half-open range on the stored first dimension, where experts are stacked along it in two
    dimensions (DBRX); the matrix is what lies there. None: everything."""


def slots_of(checkpoint: Checkpoint, name: str) -> tuple[Slot, ...]:
    """The logical matrices of one tensor, in row order.

    Fused q/k/v and gate/up projections whose parts are contiguous rows are split, so that fused and
    unfused checkpoints get the same edit. A layout that interleaves them (GPT-NeoX, Bloom, most
    Falcon; the experts of gpt-oss) stays one matrix. A stack of experts gives the matrices of every
    expert. Any other tensor, of whatever shape, is one slot.
    """
    info = checkpoint.tensors[name]
    role = role_of(info)
    config = text_config(checkpoint.config)
    whole = Slot(name, name, role.module, role.layer)
    if role.kind != "block_linear":
        transposed = len(info.shape) == 2 and is_conv1d(checkpoint.config, role.module)
        return (replace(whole, transposed=transposed),)
    if len(info.shape) == 3:
        return _stacked(whole, role, info.shape, config)
    if "experts" in name.split(".") and not name.endswith(".weight"):
        return _piled(whole, info.shape, config)
    transposed = is_conv1d(checkpoint.config, role.module)
    blocks = _row_blocks(role, info.shape[1 if transposed else 0], config)
    if not blocks:
        return (replace(whole, transposed=transposed),)
    return tuple(
        replace(whole, key=f"{name}[{part}]", module=part, rows=block, transposed=transposed)
        for part, block in blocks
    )


def slot_shape(shape: tuple[int, ...], slot: Slot) -> tuple[int, int]:
    """[d_out, d_in] of a logical matrix inside a stored tensor of this shape."""
    *_, first, second = shape
    if slot.span is not None:
        first = slot.span[1] - slot.span[0]
    d_out, d_in = (second, first) if slot.transposed else (first, second)
    if slot.rows is not None:
        d_out = slot.rows[1] - slot.rows[0]
    return d_out, d_in


def stored_rows(slot: Slot, shape: tuple[int, ...]) -> tuple[int, int]:
    """The range on the first stored dimension in which a logical matrix lies.

    Blocks of a transposed matrix are columns of what is stored: they need all of its rows.
    """
    if slot.expert is not None:
        return slot.expert, slot.expert + 1
    if slot.span is not None:
        return slot.span
    if slot.rows is None or slot.transposed:
        return 0, shape[0] if shape else 1
    return slot.rows


def logical_matrix(stored: Tensor, slot: Slot) -> Tensor:
    """The matrix [d_out, d_in] as a view of its `stored_rows`; writing to it writes to them."""
    if slot.expert is None:
        if not slot.transposed:
            return stored
        matrix = stored.T
    else:
        (matrix,) = stored
        matrix = matrix.T if slot.transposed else matrix
    return matrix if slot.rows is None else matrix[slice(*slot.rows)]


def fusion_remark(role: TensorRole, slots: tuple[Slot, ...]) -> str:
    """Why a fused tensor is edited as one matrix; empty where there is nothing to say."""
    if any(slot.rows is not None for slot in slots):
        return ""
    if role.module in _FUSED_QKV:
        return "query, key and value are interleaved in it: edited as one matrix"
    if role.module == "gate_up_proj":
        return "gate and up are interleaved in it: edited as one matrix"
    return ""


def _stacked(
    whole: Slot, role: TensorRole, shape: tuple[int, ...], config: Mapping[str, Any]
) -> tuple[Slot, ...]:
    """The matrices of a stack [experts, first, second]."""
    experts, first, second = shape
    transposed = _experts_transposed(role, shape, config)
    blocks = _halves(role, second if transposed else first, config)
    return tuple(
        replace(
            whole,
            key=f"{whole.tensor}[e{e}{'.' if part else ''}{part}]",
            module=part or role.module,
            expert=e,
            rows=block,
            transposed=transposed,
        )
        for e in range(experts)
        for part, block in blocks or (("", None),)
    )


def _piled(whole: Slot, shape: tuple[int, ...], config: Mapping[str, Any]) -> tuple[Slot, ...]:
    """DBRX: [experts * d_ffn, d_model], the down projections (w2) as [d_in, d_out]."""
    nested = config.get("ffn_config")
    ffn = cast(Mapping[str, Any], nested) if isinstance(nested, Mapping) else {}
    experts = ffn.get("moe_num_experts")
    if not isinstance(experts, int) or experts < 1 or shape[0] % experts:
        return (whole,)
    size = shape[0] // experts
    return tuple(
        replace(
            whole,
            key=f"{whole.tensor}[e{e}]",
            span=(e * size, (e + 1) * size),
            transposed=whole.module == "w2",
        )
        for e in range(experts)
    )


def _experts_transposed(
    role: TensorRole, shape: tuple[int, ...], config: Mapping[str, Any]
) -> bool:
    _, first, second = shape
    width = config.get("hidden_size") or config.get("d_model")
    known = config.get("model_type") in _TRANSPOSED_EXPERTS
    if first == second or width not in {first, second}:
        return known
    reads_width = role.module not in _WRITES_WIDTH
    return (first == width) if reads_width else (second == width)


def _halves(
    role: TensorRole, rows: int, config: Mapping[str, Any]
) -> tuple[tuple[str, tuple[int, int]], ...]:
    """Gate and up, where they are the two halves of the rows."""
    kind = str(config.get("model_type"))
    fused = (
        role.module == "gate_up_proj"
        or (role.module == "input_linear" and kind.startswith("granitemoe"))
        or (role.module == "input_linear" and kind == "jetmoe" and ".mlp." in role.name)
        or (role.module == "fc1" and kind.startswith("aria") and ".experts." in role.name)
    )
    if not fused or rows % 2 or (kind in _INTERLEAVED_EXPERTS and ".experts." in role.name):
        return ()
    return (("gate_proj", (0, rows // 2)), ("up_proj", (rows // 2, rows)))


def _row_blocks(
    role: TensorRole, rows: int, config: Mapping[str, Any]
) -> tuple[tuple[str, tuple[int, int]], ...]:
    halves = _halves(role, rows, config)
    if halves or role.module not in _FUSED_QKV:
        return halves
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
