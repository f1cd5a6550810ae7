"""The factors of edits, gathered by the module of the running model to which LoRA adds them.

peft knows modules: linear layers, embeddings, and bare parameters that are stacks of experts. A
file knows tensors. One module may take several matrices (the blocks of a fused projection, the
experts of a stack, files that are merged in memory); their factors are laid side by side, zero
outside of each one's rows, so that the product is exact. Here: this placing. Not here: where the
factors come from and what the adapter's config says (`patch`, `patch_adapter`).

Shape suffixes: _or is [d_out, r], _ri is [r, d_in], of the matrix as peft multiplies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from realign.checkpoint.names import is_tied, role_of
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot
from realign.errors import UsageError
from realign.model.skeleton import Place, Skeleton, skeleton_of

INSTEAD = "write the checkpoint (without --patch)"

ModuleKind = Literal["linear", "weight", "embedding", "stack"]
"""A "weight" is a linear layer that is targeted by its parameter: see `_by_parameter`."""

_MOVED = frozenset(("gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"))


@dataclass(frozen=True, eq=False)
class Factors:
    """The part of a patch that stands for one logical matrix."""

    slot: Slot
    left_or: Tensor
    right_ri: Tensor
    error: float
    """norm(E - left @ right) / norm(E); 0 where the factors are the edit itself."""

    @property
    def rank(self) -> int:
        """R."""
        return self.left_or.shape[1]


@dataclass(frozen=True, eq=False)
class ModuleFactors:
    """The factors of one module: one product, or one per expert of a stack."""

    name: str
    """The module, or the full name of the parameter that is a stack."""
    kind: ModuleKind
    tensors: tuple[str, ...]
    """The stored tensors that it changes."""
    transposed: bool
    """A linear layer that is stored as [d_in, d_out] (Conv1D)."""
    left_eor: Tensor
    """[experts, d_out, r]; one "expert" where it is no stack."""
    right_eri: Tensor
    """[experts, r, d_in]."""
    order: int = 0
    """Stacks of one module are wrapped in this order."""

    @property
    def rank(self) -> int:
        """R of each product."""
        return self.left_eor.shape[2]

    @property
    def target(self) -> str:
        """How the config names it."""
        return f"{self.name}.weight" if self.kind == "weight" else self.name

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """lora_A and lora_B in the shapes in which peft keeps them."""
        return pack(self.left_eor, self.right_eri, kind=self.kind)


def pack(left_eor: Tensor, right_eri: Tensor, *, kind: ModuleKind) -> tuple[Tensor, Tensor]:
    """(A, B) as peft stores them: a stack keeps A expert by expert and B rank by rank."""
    if kind == "stack":
        experts, d_out, rank = left_eor.shape
        a = right_eri.reshape(experts * rank, -1)
        b = left_eor.permute(1, 2, 0).reshape(d_out, rank * experts)
        return a.contiguous(), b.contiguous()
    return right_eri[0], left_eor[0]


def unpack(a: Tensor, b: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """(left_eor, right_eri) of what `pack` gives; any number of experts."""
    experts = a.shape[0] // rank
    right_eri = a.reshape(experts, rank, a.shape[1])
    left_eor = b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    return left_eor, right_eri


def gather(factors: Iterable[Factors], finetuned: Checkpoint) -> list[ModuleFactors]:
    """Place the factors of every edited matrix into modules.

    Args:
        factors: of all edited matrices.
        finetuned: the checkpoint whose tensors they edit.

    Raises:
        UsageError: a matrix that no module of the model holds, or that LoRA cannot reach.
    """
    skeleton = skeleton_of(finetuned.config)
    groups: dict[tuple[str, ModuleKind], list[_Part]] = {}
    for each in factors:
        part = _place(each, finetuned, skeleton)
        groups.setdefault((part.module, part.kind), []).append(part)
    return [
        _module(name, kind, parts) for (name, kind), parts in sorted(groups.items(), key=_first)
    ]


@dataclass(frozen=True, eq=False)
class _Part:
    module: str
    kind: ModuleKind
    tensor: str
    transposed: bool
    shape: tuple[int, int]
    """[d_out, d_in] of the whole product."""
    experts: int
    expert: int
    row: int
    """First row of the product that the left factor covers."""
    column: int
    left: Tensor
    right: Tensor
    order: int = 0


def _first(item: tuple[tuple[str, ModuleKind], list[_Part]]) -> tuple[str, ModuleKind]:
    return item[0]


def _place(each: Factors, finetuned: Checkpoint, skeleton: Skeleton | None) -> _Part:
    slot = each.slot
    shape = finetuned.tensors[slot.tensor].shape
    if role_of(finetuned.tensors[slot.tensor]).kind in {"embedding", "head"} and is_tied(
        finetuned.config, finetuned.tensors
    ):
        raise UsageError(
            f"{slot.tensor} serves embeddings and output head alike: a running LoRA adapter "
            "changes one of them only",
            f"{INSTEAD}, or use --scope block_linear",
        )
    place = _stored_place(slot.tensor, shape) if skeleton is None else skeleton.place(slot.tensor)
    if place is None or slot.span is not None:
        name = "the model" if skeleton is None else skeleton.class_name
        raise UsageError(
            f"{slot.tensor} of shape {list(shape)} is no linear layer of {name}: LoRA cannot "
            "reach it",
            INSTEAD,
        )
    start = 0 if slot.rows is None else slot.rows[0]
    left, right = each.left_or, each.right_ri
    if place.holder == "linear" and len(shape) == 2:
        size = shape[::-1] if slot.transposed else shape
        kind: ModuleKind = "weight" if _by_parameter(place.name, skeleton) else "linear"
        return _Part(
            place.name, kind, slot.tensor, slot.transposed, (size[0], size[1]), 1, 0, start, 0,
            left, right,
        )  # fmt: skip
    if place.holder == "embedding" and len(shape) == 2 and not slot.transposed:
        # peft multiplies [width, r] by [r, vocabulary] and transposes the product.
        return _Part(
            place.name, "embedding", slot.tensor, False, (shape[1], shape[0]), 1, 0, 0, start,
            right.T, left.T,
        )  # fmt: skip
    if place.holder == "parameter" and len(place.shape) == 3:
        return _stack_part(each, place, shape, start)
    raise UsageError(
        f"{slot.tensor} of shape {list(shape)} is no linear layer: LoRA cannot reach it", INSTEAD
    )


def _by_parameter(module: str, skeleton: Skeleton | None) -> bool:
    """Whether peft would take a linear layer for a part of a stack of experts.

    For classes whose experts have become stacks, it reads any target module that ends like an old
    expert's projection as the stack, also where it belongs to a shared expert or a dense block.
    """
    if skeleton is None or not skeleton.merges_experts:
        return False
    return module.rpartition(".")[2] in _MOVED


def _stack_part(each: Factors, place: Place, shape: tuple[int, ...], start: int) -> _Part:
    """One expert of a stack, from a stack in the file or from a file of its own."""
    slot = each.slot
    experts, first, second = place.shape
    size = (second, first) if place.transposed else (first, second)
    expert = slot.expert if slot.expert is not None else place.expert
    if expert is None:
        raise UsageError(f"{slot.tensor}: it is not known which expert it is", INSTEAD)
    row, column, left, right = start, 0, each.left_or, each.right_ri
    if slot.expert is None:  # a file of its own: its rows follow those of the parts before it
        row += place.part * shape[1 if slot.transposed else 0]
        if slot.transposed or place.transposed:
            raise UsageError(f"{slot.tensor}: experts that are transposed in memory", INSTEAD)
    elif slot.transposed != place.transposed:
        # The class multiplies the stored matrix as it is: our rows are its columns.
        row, column, left, right = 0, start, right.T, left.T
    return _Part(
        place.name, "stack", slot.tensor, False, size, experts, expert, row, column, left, right,
        order=place.order,
    )  # fmt: skip


def _stored_place(name: str, shape: tuple[int, ...]) -> Place | None:
    """Without a class to ask, the names in the file have to be those of the modules."""
    if len(shape) != 2 or not name.endswith(".weight"):
        return None
    return Place(name.removesuffix(".weight"), "linear", shape)


def _module(name: str, kind: ModuleKind, parts: Sequence[_Part]) -> ModuleFactors:
    """Lay the factors of a module's matrices side by side, those of each expert by themselves."""
    first = parts[0]
    d_out, d_in = first.shape
    ranks = [0] * first.experts
    for part in parts:
        ranks[part.expert] += part.left.shape[1]
    rank = max(ranks)
    left_eor = first.left.new_zeros(first.experts, d_out, rank)
    right_eri = first.left.new_zeros(first.experts, rank, d_in)
    at = [0] * first.experts
    for part in parts:
        e, k = part.expert, part.left.shape[1]
        columns = slice(at[e], at[e] + k)
        left_eor[e, part.row : part.row + part.left.shape[0], columns] = part.left
        right_eri[e, columns, part.column : part.column + part.right.shape[1]] = part.right
        at[e] += k
    tensors = tuple(dict.fromkeys(part.tensor for part in parts))
    return ModuleFactors(
        name, kind, tensors, first.transposed, left_eor, right_eri, order=first.order
    )
