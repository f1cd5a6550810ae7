"""A part of the model: which decoder blocks and which kinds of modules a repair edits.

What is left out is copied with the reason. Modules are called by their own names or by those of the
Llama family, which stand for the same thing in every architecture: q_proj, k_proj, v_proj, o_proj,
gate_proj, up_proj and down_proj. Here: reading `--layers` and `--modules`, and narrowing a matching
by them. Not here: scopes, which are about kinds of tensors (`realign.checkpoint.matching`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from realign.checkpoint.matching import Matching, TensorPair
from realign.checkpoint.slots import Slot
from realign.errors import NothingToDoError, UsageError

_QKV = ("q_proj", "k_proj", "v_proj")
_FUSED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("qkv_proj", "Wqkv", "wqkv", "qkv", "W_pack", "query_key_value", "c_attn", "in_proj_qkvz"),
        _QKV,
    ),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PLAIN: Mapping[str, str] = {
    **dict.fromkeys(("query", "q_lin", "query_proj", "wq", "q"), "q_proj"),
    **dict.fromkeys(("key", "k_lin", "key_proj", "wk", "k"), "k_proj"),
    **dict.fromkeys(("value", "v_lin", "value_proj", "wv", "v"), "v_proj"),
    **dict.fromkeys(("out_lin", "attn_out", "o"), "o_proj"),
    **dict.fromkeys(
        ("c_fc", "fc1", "fc_in", "dense_h_to_4h", "lin1", "wi", "wi_1", "w3", "v1"), "up_proj"
    ),
    **dict.fromkeys(("w1", "wi_0"), "gate_proj"),
    **dict.fromkeys(("fc2", "fc_out", "dense_4h_to_h", "lin2", "w2", "output_linear"), "down_proj"),
}
_AMBIGUOUS = frozenset(("c_proj", "dense", "out_proj", "wo"))
"""Names that end an attention in one place and a feed-forward part in another."""
_ATTENTION = re.compile(r"attn|attention|(?:^|\.)att\.")


@dataclass(frozen=True)
class Subset:
    """What a user, or a method by itself, leaves of a model.

    Attributes:
        layers: decoder blocks; None: all.
        modules: kinds of modules; None: all.
        asked: whether the user named the modules, or the method's own choice stands.
    """

    layers: frozenset[int] | None = None
    modules: frozenset[str] | None = None
    asked: bool = False

    def to_json(self) -> dict[str, list[int] | list[str] | None]:
        """The subset as JSON."""
        return {
            "layers": None if self.layers is None else sorted(self.layers),
            "modules": None if self.modules is None else sorted(self.modules),
        }


def parse_layers(text: str) -> frozenset[int]:
    """Read "0-5,8".

    Raises:
        UsageError: it is not a list of numbers and ranges.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UsageError(
                f"--layers takes numbers and ranges, not {part.strip()!r}",
                "layers count from 0, for example --layers 0-5,8",
            )
        found.update(range(first, last + 1))
    return frozenset(found)


def parse_modules(text: str) -> frozenset[str]:
    """Read "q_proj,v_proj".

    Raises:
        UsageError: a name is missing.
    """
    names = [part.strip() for part in text.split(",")]
    if not all(names):
        raise UsageError(
            f"--modules takes names with commas between them, not {text!r}",
            "for example --modules q_proj,v_proj",
        )
    return frozenset(names)


def kinds_of(slot: Slot) -> frozenset[str]:
    """The names of a matrix: its own, and those of the Llama family for what is in it.

    Several of the latter where a fused projection cannot be taken apart.
    """
    module = slot.module
    names = {module}
    if module in _FUSED:
        names.update(_FUSED[module])
    elif module in _AMBIGUOUS:
        names.add("o_proj" if _ATTENTION.search(slot.tensor) else "down_proj")
    elif module in _PLAIN:
        names.add(_PLAIN[module])
    return frozenset(names)


def narrow(matching: Matching, subset: Subset, *, method: str) -> Matching:
    """Leave only a part of the planned edits; the rest is copied.

    A fused projection that cannot be taken apart is edited where a method's own choice reaches some
    of it, and where a user names it or all that is in it.

    Args:
        matching: what is planned.
        subset: what is left of it.
        method: for the reason.

    Raises:
        UsageError: a layer or a module is named that no planned edit has.
        NothingToDoError: nothing is left.
    """
    if subset.layers is None and subset.modules is None:
        return matching
    edits = [pair for pair in matching.pairs if pair.action == "edit"]
    _check_layers(edits, subset.layers)
    if subset.asked:
        _check_modules(edits, subset.modules)
    pairs = tuple(_narrowed(pair, subset, method) for pair in matching.pairs)
    if not any(pair.action == "edit" for pair in pairs):
        raise NothingToDoError(
            f"no tensor is left to edit: {_words(subset, method)}",
            f"without these options {len(edits)} tensors would be edited",
        )
    whole = [
        pair.role.module
        for pair in pairs
        if pair.action == "edit"
        and subset.modules is not None
        and any(not _all_of(slot, subset.modules) for slot in pair.slots)
    ]
    notes = [
        f"{module} cannot be taken apart: {method} edits all of it"
        for module in dict.fromkeys(whole)
    ]
    return Matching(pairs, (*matching.notes, *notes))


def _narrowed(pair: TensorPair, subset: Subset, method: str) -> TensorPair:
    if pair.action != "edit":
        return pair
    if subset.layers is not None and pair.role.layer not in subset.layers:
        return _copied(pair, "not in --layers")
    if subset.modules is None:
        return pair
    slots = tuple(slot for slot in pair.slots if _chosen(slot, subset))
    if len(slots) == len(pair.slots):
        return pair
    if slots:
        return replace(pair, slots=slots, partial=True)
    if subset.asked:
        return _copied(pair, "not in --modules")
    return _copied(pair, f"{method} edits {', '.join(sorted(subset.modules))} only")


def _chosen(slot: Slot, subset: Subset) -> bool:
    assert subset.modules is not None
    if subset.asked:
        return _all_of(slot, subset.modules)
    return not kinds_of(slot).isdisjoint(subset.modules)


def _all_of(slot: Slot, modules: Collection[str]) -> bool:
    parts = _FUSED.get(slot.module)
    if slot.module in modules:
        return True
    if parts is not None:
        return all(part in modules for part in parts)
    return not kinds_of(slot).isdisjoint(modules)


def _copied(pair: TensorPair, reason: str) -> TensorPair:
    return TensorPair(pair.role, "copy", reason, (), None)


def _check_layers(edits: list[TensorPair], layers: frozenset[int] | None) -> None:
    if layers is None:
        return
    there = {pair.role.layer for pair in edits if pair.role.layer is not None}
    missing = sorted(layers - there)
    if missing:
        raise UsageError(
            f"--layers names {_few(missing)}: no tensor of such a layer would be edited",
            f"the layers are {min(there)} to {max(there)}" if there else "leave it out",
        )


def _check_modules(edits: list[TensorPair], modules: frozenset[str] | None) -> None:
    there = {kind for pair in edits for slot in pair.slots for kind in kinds_of(slot)}
    missing = sorted((modules or frozenset()) - there)
    if missing:
        raise UsageError(
            f"--modules names {', '.join(missing)}: no tensor of that kind would be edited",
            f"the kinds are {', '.join(sorted(there))}",
        )


def _few(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:3]))
    return f"{shown}, ..." if len(numbers) > 3 else shown


def _words(subset: Subset, method: str) -> str:
    parts: list[str] = []
    if subset.layers is not None:
        parts.append(f"--layers {_few(sorted(subset.layers))}")
    if subset.modules is not None:
        names = ",".join(sorted(subset.modules))
        parts.append(f"--modules {names}" if subset.asked else f"{method} edits {names} only")
    return "; ".join(parts)
