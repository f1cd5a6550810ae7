"""Pair the tensors of several checkpoints and decide, for each of the fine-tune's, edit or copy.

Pairing is by exact name, never by order and never by substring. Whatever does not fit is refused
here, from headers alone, with both names or both shapes in the message.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from realign.checkpoint.chunks import Chunk, chunks_of, read_chunk
from realign.checkpoint.headers import FLOATS, TensorInfo
from realign.checkpoint.names import (
    Kind,
    TensorRole,
    classify,
    dispensable,
    find_embedding,
    find_head,
    in_tower,
    is_tied,
    role_of,
    text_config,
)
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, fusion_remark, slots_of
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
    "all": frozenset({"block_linear", "embedding", "head", "norm", "bias"}),
}
_NEVER: Mapping[Kind, str] = {
    "router": "a router is never edited",
    "buffer": "a buffer is never edited",
    "other": "neither a linear layer, an embedding, a norm nor a bias",
}
_ARCHITECTURE_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "n_embd", "n_layer", "num_experts",
    "num_local_experts",
)  # fmt: skip
# The same computation under two names: Phi-3 with its projections split is a Llama or a Mistral.
_SAME_MODELS = frozenset((frozenset(("phi3", "llama")), frozenset(("phi3", "mistral"))))
_VOCABULARY_MODULES = frozenset({"lm_head", "embed_out", "output_layer"})
_PROBE_BYTES = 65536
_COMPARE_BYTES = 8 * 2**20


@dataclass(frozen=True)
class TensorPair:
    """What will happen to one tensor of the fine-tune, and why."""

    role: TensorRole
    action: Literal["edit", "copy"]
    reason: str
    """Always set, for people: "in scope block_linear", "outside scope block_linear", ..."""
    slots: tuple[Slot, ...]
    """The logical matrices of an edited tensor; empty for a copied one."""
    common_rows: int | None
    """Rows that all checkpoints share where the vocabulary was extended; None: all of them."""
    partial: bool = False
    """Some of the matrices in it were left out and are copied."""


@dataclass(frozen=True)
class Matching:
    """The decision for every tensor of the fine-tune, in file order, and remarks for the plan."""

    pairs: tuple[TensorPair, ...]
    notes: tuple[str, ...]


def match(finetuned: Checkpoint, others: Mapping[str, Checkpoint], *, scope: Scope) -> Matching:
    """Pair the fine-tune with the checkpoints that a method reads.

    Args:
        finetuned: the checkpoint to edit.
        others: by role: "aligned", "base", "unaligned".
        scope: which tensors may be edited. `block_linear`: linear layers inside decoder blocks;
            `matrices` adds embeddings and head; `all` adds norms and biases. Routers and buffers
            are never edited.

    Raises:
        MismatchError: architecture, names, shapes or types do not fit; it names both sides.
    """
    if scope not in get_args(Scope):
        raise UsageError(f"scope {scope!r} is unknown", f"use one of {', '.join(get_args(Scope))}")
    notes = [*finetuned.remarks]
    for label, other in others.items():
        notes += other.remarks
        label = _spelled(label)
        check_architecture(finetuned, label, other)
        notes += _check_names(finetuned, label, other)
        notes += _dtype_notes(finetuned, label, other)
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

    if role.kind == "buffer":
        return copy(_NEVER["buffer"])
    common, absent = _common_rows(finetuned, role, others)
    if role.kind in _NEVER:
        tower = role.kind == "other" and in_tower(role.name)
        return copy("outside the language model" if tower else _NEVER[role.kind])
    if role.kind not in _IN_SCOPE[scope]:
        return copy(f"outside scope {scope}: {_KIND_WORDS[role.kind]}")
    if absent is not None and role.kind != "head":
        use = dispensable(finetuned.config, role.name)
        return copy(f"{use}; the {absent} model stores none")
    if absent is not None:
        return copy(f"the {absent} model ties its output head and stores none")
    if 0 in finetuned.tensors[role.name].shape:
        return copy("it has no entries")
    if common == 0:
        return copy("no row of it is in every checkpoint")
    if common is not None:
        notes.append(
            f"{role.name}: rows from {common} on are not in every checkpoint and are copied"
        )
    slots = slots_of(finetuned, role.name)
    reason = [f"in scope {scope}", fusion_remark(role, slots)]
    if (
        role.kind == "embedding"
        and is_tied(finetuned.config, finetuned.tensors)
        and _is_input(finetuned, role)
    ):
        reason.append("tied to the output head, which changes with it")
    return TensorPair(role, "edit", "; ".join(part for part in reason if part), slots, common)


_KIND_WORDS: Mapping[Kind, str] = {
    "block_linear": "a linear layer of a decoder block",
    "embedding": "an embedding",
    "head": "the output head",
    "norm": "a norm",
    "bias": "a bias",
}


def _is_input(finetuned: Checkpoint, role: TensorRole) -> bool:
    return role.name == find_embedding(finetuned.tensors) and not find_head(finetuned.tensors)


def _common_rows(
    finetuned: Checkpoint, role: TensorRole, others: Mapping[str, Checkpoint]
) -> tuple[int | None, str | None]:
    """The rows that all checkpoints share where they differ, and who does not store the tensor."""
    info = finetuned.tensors[role.name]
    common: int | None = None
    absent: str | None = None
    for label, other in others.items():
        there = other.tensors.get(role.name)
        if there is None:
            absent = label
            continue
        rows = _shared_rows(finetuned, role, info, _spelled(label), other, there)
        if rows is not None:
            common = rows if common is None else min(common, rows)
    return (common if common is not None and common < info.shape[0] else None), absent


def _spelled(label: str) -> str:
    """How messages call a model: other fine-tunes by the option that gave them."""
    number = label.removeprefix("also")
    return f"--also (number {number})" if number != label and number.isdigit() else label


def _shared_rows(
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
    by_vocabulary = role.kind in {"embedding", "head"} or role.module in _VOCABULARY_MODULES
    if by_vocabulary and info.shape and info.shape[1:] == there.shape[1:]:
        return min(info.shape[0], there.shape[0])
    raise MismatchError(
        f"{role.name} has shape {list(info.shape)} in {finetuned.source} but {list(there.shape)} "
        f"in the {label} model {other.source}",
        f"is {other.source} really the {label} model of this fine-tune?",
    )


def check_architecture(finetuned: Checkpoint, label: str, other: Checkpoint) -> None:
    """Refuse checkpoints whose configs name different architectures or sizes.

    Args:
        finetuned: the model that decides.
        label: what `other` is called in the message: "aligned", "reference", ...
        other: the model compared with it.

    Raises:
        MismatchError: the message names both models, the key and both values.
    """
    ours, theirs = text_config(finetuned.config), text_config(other.config)
    for key in _ARCHITECTURE_KEYS:
        mine, yours = ours.get(key), theirs.get(key)
        if key == "model_type" and frozenset((mine, yours)) in _SAME_MODELS:
            continue
        if mine is not None and yours is not None and mine != yours:
            raise MismatchError(
                f"{finetuned.source} has {key} = {mine!r}, the {label} model {other.source} has "
                f"{yours!r}: they are different architectures",
                f"is {other.source} really the {label} model of this fine-tune?",
            )


def _check_names(finetuned: Checkpoint, label: str, other: Checkpoint) -> list[str]:
    """Both sides must store the same tensors, but for what a loader does without.

    That is: buffers, a head that one of them ties, heads that predict several tokens at once, which
    transformers drops when it saves a model, and towers for images and sound, where one of them is
    a model of language alone. Returns remarks on the latter two.
    """
    ours, theirs = _required(finetuned), _required(other)
    for checkpoint, names in ((finetuned, theirs), (other, ours)):
        if is_tied(checkpoint.config, checkpoint.tensors) and not find_head(checkpoint.tensors):
            names -= {name for name in names if role_kind(name) == "head"}
    here, there = sorted(ours - theirs), sorted(theirs - ours)
    here = [name for name in here if name not in other.tensors]
    there = [name for name in there if name not in finetuned.tensors]
    notes = [*_dispensed(finetuned, here, "copied"), *_dispensed(other, there, "not used")]
    here = [name for name in here if not dispensable(finetuned.config, name)]
    there = [name for name in there if not dispensable(other.config, name)]
    if not here and not there:
        return notes
    parts: list[str] = []
    if here:
        parts.append(f"{len(here)} only in the fine-tune ({_first(here)})")
    if there:
        parts.append(f"{len(there)} only in the {label} model ({_first(there)})")
    prefix = _prefix_between(ours, theirs)
    raise MismatchError(
        f"{finetuned.source} and the {label} model {other.source} do not store the same tensors: "
        + "; ".join(parts),
        f"the names differ by the prefix {prefix!r} alone: load both with the same class of "
        "transformers and save them again"
        if prefix
        else "the checkpoints must come from the same architecture and be saved the same way",
    )


def _first(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _dispensed(checkpoint: Checkpoint, names: list[str], fate: str) -> list[str]:
    """A line for each use of tensors that only this checkpoint stores."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(dispensable(checkpoint.config, name), []).append(name)
    return [
        f"{len(each)} tensors {use} are only in {checkpoint.source} ({_first(each)}): {fate}"
        for use, each in found.items()
        if use
    ]


def _required(checkpoint: Checkpoint) -> set[str]:
    return {name for name, role in classify(checkpoint).items() if role.kind != "buffer"}


def role_kind(name: str) -> Kind:
    """The kind of a two-dimensional floating-point tensor of this name."""
    return role_of(TensorInfo(name, "F32", (1, 1), Path(), 0, 4)).kind


def _prefix_between(ours: set[str], theirs: set[str]) -> str:
    for prefix in ("model.", "transformer.", "language_model.", "model.language_model."):
        for one, two in ((ours, theirs), (theirs, ours)):
            if {name.removeprefix(prefix) for name in one} == {n.removeprefix(prefix) for n in two}:
                return prefix
    return ""


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
    each tensor are compared, which almost always tells two models apart; only when all of them
    agree are whole tensors read.
    """
    if _identities(a) == _identities(b):
        return True
    if _signature(a) != _signature(b):
        return False
    names = sorted(a.tensors)
    return all(_same_start(a, b, n) for n in names) and all(_same_tensor(a, b, n) for n in names)


def _identities(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    stats = [file.stat() for file in checkpoint.weight_files]
    return sorted((stat.st_dev, stat.st_ino) for stat in stats)


def _signature(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}


def _same_start(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    chunk = next(chunks_of([(a, name), (b, name)], nbytes=_PROBE_BYTES), None)
    return chunk is None or _same_bytes(a, b, name, chunk)


def _same_tensor(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    chunks = chunks_of([(a, name), (b, name)], nbytes=_COMPARE_BYTES)
    return all(_same_bytes(a, b, name, chunk) for chunk in chunks)


def _same_bytes(a: Checkpoint, b: Checkpoint, name: str, chunk: Chunk) -> bool:
    one, two = (read_chunk(each, name, chunk).reshape(-1) for each in (a, b))
    # Compared as bytes: a NaN differs from itself as a number.
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))
