"""Pair the tensors of several checkpoints and decide, for each of the fine-tune's, edit or copy.

Pairing is by exact name, never by order and never by substring. Whatever does not fit is refused
here, from headers alone, with both names or both shapes in the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from realign.checkpoint.headers import FLOATS, TensorInfo
from realign.checkpoint.names import (
    Kind,
    Slot,
    TensorRole,
    classify,
    slots_of,
    text_config,
)
from realign.checkpoint.reader import Checkpoint
from realign.errors import MismatchError, UsageError

__all__ = [
    "Kind",
    "Matching",
    "Scope",
    "Slot",
    "TensorPair",
    "TensorRole",
    "classify",
    "match",
    "same_weights",
    "slots_of",
]

Scope = Literal["block_linear", "matrices", "all"]

_IN_SCOPE: Mapping[Scope, frozenset[Kind]] = {
    "block_linear": frozenset({"block_linear"}),
    "matrices": frozenset({"block_linear", "embedding", "head"}),
    "all": frozenset({"block_linear", "embedding", "head", "norm", "bias", "other"}),
}

_ARCHITECTURE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "n_embd", "n_layer")
_PROBE_BYTES = 65536


@dataclass(frozen=True)
class TensorPair:
    """What will happen to one tensor of the fine-tune, and why."""

    role: TensorRole
    action: Literal["edit", "copy"]
    reason: str
    """Always set, for people: "in scope block_linear", "outside scope block_linear", ..."""
    slots: tuple[Slot, ...]
    """The logical matrices of an edited 2-D tensor; empty for a copied one."""
    common_rows: int | None
    """Rows that all checkpoints share where the vocabulary was extended; None: all of them."""


@dataclass(frozen=True)
class Matching:
    """The decision for every tensor of the fine-tune, in file order, and remarks for the plan."""

    pairs: tuple[TensorPair, ...]
    notes: tuple[str, ...]


def match(
    finetuned: Checkpoint, others: Mapping[str, Checkpoint], *, scope: Scope
) -> Matching:
    """Pair the fine-tune with the checkpoints that a method reads.

    Args:
        finetuned: the checkpoint to edit.
        others: by role: "aligned", "base", "unaligned".
        scope: which tensors may be edited. `block_linear`: linear layers inside decoder blocks;
            `matrices` adds embeddings and head; `all` adds norms and biases. Routers and buffers are
            never edited.

    Raises:
        MismatchError: architecture, names, shapes or types do not fit; the message names both sides.
    """
    if scope not in get_args(Scope):
        raise UsageError(f"scope {scope!r} is unknown", f"use one of {', '.join(get_args(Scope))}")
    notes: list[str] = []
    for role, other in others.items():
        _check_architecture(finetuned, role, other)
        _check_missing(finetuned, role, other, scope)
        notes += _dtype_notes(finetuned, role, other)
    roles = classify(finetuned)
    pairs = tuple(_pair(finetuned, roles[name], others, scope, notes) for name in roles)
    return Matching(pairs, tuple(dict.fromkeys(notes)))


def _pair(
    finetuned: Checkpoint,
    role: TensorRole,
    others: Mapping[str, Checkpoint],
    scope: Scope,
    notes: list[str],
) -> TensorPair:
    def copy(reason: str) -> TensorPair:
        return TensorPair(role, "copy", reason, (), None)

    if role.kind in {"router", "buffer"}:
        return copy(f"a {role.kind} is never edited")
    if role.kind not in _IN_SCOPE[scope]:
        if role.kind == "other" and len(finetuned.tensors[role.name].shape) > 2:
            return copy("not a matrix: tensors of three and more dimensions are not edited")
        return copy(f"{role.kind.replace('_', ' ')}, outside scope {scope}")
    info = finetuned.tensors[role.name]
    common: int | None = None
    for label, other in others.items():
        there = other.tensors.get(role.name)
        if there is None:
            # _check_missing has refused block tensors: only vocabulary-side tensors remain.
            return copy(f"not in the {label} model")
        rows = _common_rows(finetuned, role, info, label, other, there)
        if rows is not None:
            common = rows if common is None else min(common, rows)
    if common is not None:
        notes.append(
            f"{role.name}: rows from {common} on are not in every checkpoint and are copied"
        )
    slots = slots_of(finetuned, role.name) if len(info.shape) == 2 else ()
    return TensorPair(role, "edit", _edit_reason(finetuned, role, scope), slots, common)


def _edit_reason(finetuned: Checkpoint, role: TensorRole, scope: Scope) -> str:
    tied = text_config(finetuned.config).get("tie_word_embeddings", False)
    if role.kind == "head" and tied:
        return "stored copy of the tied embeddings, edited as they are"
    if role.kind == "embedding" and tied:
        return f"in scope {scope}; tied to the output head"
    return f"in scope {scope}"


def _common_rows(
    finetuned: Checkpoint,
    role: TensorRole,
    info: TensorInfo,
    label: str,
    other: Checkpoint,
    there: TensorInfo,
) -> int | None:
    if (info.dtype in FLOATS) != (there.dtype in FLOATS):
        raise MismatchError(
            f"{role.name} is {info.dtype} in {finetuned.source} but {there.dtype} in the {label} "
            f"model {other.source}",
            "use checkpoints that both store it as floating point",
        )
    if info.shape == there.shape:
        return None
    if (
        role.kind in {"embedding", "head"}
        and len(info.shape) == len(there.shape)
        and info.shape[1:] == there.shape[1:]
    ):
        return min(info.shape[0], there.shape[0])
    raise MismatchError(
        f"{role.name} has shape {list(info.shape)} in {finetuned.source} but {list(there.shape)} "
        f"in the {label} model {other.source}",
        f"is {other.source} really the {label} model of this fine-tune?",
    )


def _check_architecture(finetuned: Checkpoint, role: str, other: Checkpoint) -> None:
    ours, theirs = text_config(finetuned.config), text_config(other.config)
    for key in _ARCHITECTURE_KEYS:
        mine, yours = ours.get(key), theirs.get(key)
        if mine is not None and yours is not None and mine != yours:
            raise MismatchError(
                f"{finetuned.source} has {key} = {mine!r}, the {role} model {other.source} has "
                f"{yours!r}: they are different architectures",
                f"is {other.source} really the {role} model of this fine-tune?",
            )


def _check_missing(finetuned: Checkpoint, role: str, other: Checkpoint, scope: Scope) -> None:
    def required(checkpoint: Checkpoint) -> set[str]:
        return {
            name
            for name, tensor in classify(checkpoint).items()
            if tensor.kind in _IN_SCOPE[scope] and tensor.layer is not None
        }

    ours, theirs = required(finetuned), required(other)
    if ours == theirs:
        return
    here = sorted(ours - set(other.tensors))
    there = sorted(theirs - set(finetuned.tensors))
    parts: list[str] = []
    if here:
        parts.append(f"{len(here)} only in {finetuned.source} (first: {here[0]})")
    if there:
        parts.append(f"{len(there)} only in the {role} model {other.source} (first: {there[0]})")
    if parts:
        raise MismatchError(
            "the tensors do not pair by name: " + "; ".join(parts),
            "the checkpoints must come from the same architecture and be saved the same way",
        )


def _dtype_notes(finetuned: Checkpoint, role: str, other: Checkpoint) -> list[str]:
    def floats(checkpoint: Checkpoint) -> set[str]:
        return {info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOATS}

    mine, theirs = floats(finetuned), floats(other)
    if mine == theirs:
        return []
    return [
        f"the fine-tune stores {'/'.join(sorted(mine))}, the {role} model "
        f"{'/'.join(sorted(theirs))}: differences are taken in float32, the output keeps "
        f"{'/'.join(sorted(mine))}"
    ]


def same_weights(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints hold the same weights.

    The same files are the same weights; different tensor lists are not. Otherwise a few bytes of
    each tensor are compared, which almost always tells two models apart; only when all of them agree
    are whole tensors read.
    """
    if a.weight_files and _identities(a) == _identities(b):
        return True
    if _signature(a) != _signature(b):
        return False
    names = sorted(a.tensors)
    return all(_same_start(a, b, n) for n in names) and all(_same_tensor(a, b, n) for n in names)


def _identities(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    stats = [file.stat() for file in checkpoint.weight_files]
    return sorted((stat.st_dev, stat.st_ino) for stat in stats)


def _signature(checkpoint: Checkpoint) -> dict[str, tuple[Any, ...]]:
    return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


def _same_start(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    info = a.tensors[name]
    if not info.shape or not info.nbytes:
        return True
    rows = max(1, min(info.shape[0], _PROBE_BYTES * info.shape[0] // info.nbytes))
    return _bytes_equal(a, b, name, (0, rows))


def _same_tensor(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    return _bytes_equal(a, b, name, None)


def _bytes_equal(a: Checkpoint, b: Checkpoint, name: str, rows: tuple[int, int] | None) -> bool:
    import torch

    one, two = a.read(name, rows).reshape(-1), b.read(name, rows).reshape(-1)
    # Compared as bytes: a NaN differs from itself as a number.
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))
