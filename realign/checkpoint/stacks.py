"""LoRA on bare parameters (peft's `target_parameters`): which base tensors a stack of experts is.

An adapter names the parameter of the running model, one stack [experts, ., .] per projection; a
base may store the same stack, or every expert in tensors of its own. Here: finding them by name and
shape. Not here: other modules (`pairing`), the arithmetic (`lora`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.lora import LoraConfig
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import slots_of

_LAYER = re.compile(r"(.*?(?:^|\.)(?:layers|h|blocks|block|layer)\.\d+\.)")
_ONE = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
# What a stack in memory is made of, part after part, where experts are tensors of their own.
_PARTS = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}
_ALIASES = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}


@dataclass(frozen=True)
class StackTarget:
    """A base tensor that takes part of a stack's product."""

    tensor: str
    parameter: str
    """The parameter's full name, as rank and alpha patterns know it."""
    experts: int
    transposed: bool
    """Stored as [experts, d_in, d_out]."""
    expert: int | None = None
    """The one expert that the tensor is; None: it is the whole stack."""
    rows: tuple[int, int] | None = None
    """The rows of that expert's product."""


def find_stack(
    base: Checkpoint, lora: LoraConfig, module: str, a: TensorInfo, b: TensorInfo
) -> tuple[StackTarget, ...]:
    """The base tensors to which the factors of one module belong; empty where there are none.

    Args:
        base: the model under the adapter.
        lora: its config.
        module: as in the adapter's file: "...experts", or "...experts.base_layer" where several
            parameters of one module are wrapped.
        a: [experts * r, d_in].
        b: [d_out, r * experts].
    """
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    for parameter in owned_parameters(lora, owner):
        rank = lora.rank_of(parameter)
        if a.shape[0] % rank or b.shape[1] != a.shape[0]:
            continue
        experts, product = a.shape[0] // rank, (b.shape[0], a.shape[1])
        found = _stored_stack(base, parameter, experts, product)
        found = found or _single_experts(base, parameter, experts, product)
        if found:
            return found
    return ()


def owned_parameters(lora: LoraConfig, owner: str) -> tuple[str, ...]:
    """Full names of the target parameters of one module, gate and up before down."""
    names: list[str] = []
    for target in lora.parameters:
        full = f"{owner}.{target.rpartition('.')[2]}"
        if full == target or full.endswith(f".{target}"):
            names.append(full)
    return tuple(sorted(set(names), key=lambda name: ("gate" not in name, name)))


def _stored_stack(
    base: Checkpoint, parameter: str, experts: int, product: tuple[int, int]
) -> tuple[StackTarget, ...]:
    leaf = parameter.rpartition(".")[2]
    for name, info in base.tensors.items():
        if len(info.shape) != 3 or info.shape[0] != experts:
            continue
        alias = _ALIASES.get(leaf)
        same = name == parameter or name.endswith(_tail(parameter))
        if not same and not (alias and name.endswith(alias) and _layer(name) == _layer(parameter)):
            continue
        straight, turned = info.shape[1:] == product, info.shape[1:] == product[::-1]
        if straight and turned:
            straight = not slots_of(base, name)[0].transposed
        if straight or turned:
            return (StackTarget(name, parameter, experts, transposed=not straight),)
    return ()


def _single_experts(
    base: Checkpoint, parameter: str, experts: int, product: tuple[int, int]
) -> tuple[StackTarget, ...]:
    parts: Sequence[Sequence[str]] = _PARTS.get(parameter.rpartition(".")[2], ())
    found: list[StackTarget] = []
    for name, info in base.tensors.items():
        one = _ONE.search(name)
        if one is None or _layer(name) != _layer(parameter) or len(info.shape) != 2:
            continue
        for i, leaves in enumerate(parts):
            if one[2] in leaves and info.shape[1] == product[1]:
                rows = (i * info.shape[0], (i + 1) * info.shape[0])
                found.append(
                    StackTarget(name, parameter, experts, False, expert=int(one[1]), rows=rows)
                )
    complete = len(found) == experts * len(parts) and all(
        each.rows is not None and each.rows[1] <= product[0] for each in found
    )
    return tuple(found) if complete else ()


def _layer(name: str) -> str:
    """The name up to its layer's number, without what a causal model puts in front."""
    found = _LAYER.match(name)
    text = found[1] if found else ""
    return ".".join(text.split(".")[-3:])


def _tail(parameter: str) -> str:
    """The parameter's name from its layer on: the part on which file and memory agree."""
    layer = _layer(parameter)
    return f".{layer}{parameter.partition(layer)[2]}" if layer else f".{parameter}"
