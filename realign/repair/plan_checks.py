"""What a plan asks of a request before tensors are paired: roles, texts, settings, work to do.

Headers, JSON and a few rows decide. Here: refusals and remarks that concern the request as a whole.
Not here: the plan itself (`plan`), anchors (`plan_anchors`), patches (`patch_checks`).
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from math import inf
from pathlib import Path

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.lineage import propose
from realign.checkpoint.manifest import read_manifest
from realign.checkpoint.matching import Matching, same_weights
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import slot_shape
from realign.errors import AlreadyRepairedError, NothingToDoError, UsageError
from realign.repair.method import Method
from realign.repair.preparation import Data
from realign.repair.request import ALSO, ROLE_OPTIONS, Inputs, RepairRequest
from realign.repair.texts import OPTIONS, PlannedTexts, missing_data, plan_texts

ENCODINGS = ("compressed-tensors",)

_DISTINCT = ("safety", "reference", ALSO)
"""Roles in which the fine-tune itself makes no sense."""


def check_roles(roles: Collection[str], method: Method, inputs: Inputs) -> None:
    """Ask for the first checkpoint that is needed and was not given.

    Raises:
        UsageError: names the option.
    """
    for role in sorted(roles):
        if role not in inputs.others:
            raise UsageError(f"{method.name} needs the {role} model", _how_to_give(role, inputs))


def _how_to_give(role: str, inputs: Inputs) -> str:
    """Proposes what the fine-tune's own files name as its origin; the user decides."""
    finetuned, option = inputs.finetuned, ROLE_OPTIONS[role]
    folder = (
        finetuned.adapter_folder if isinstance(finetuned, AdapterCheckpoint) else finetuned.folder
    )
    found = propose(folder)
    named = {"aligned": found.aligned, "base": found.base}.get(role)
    if named is None:
        return f"give its folder or Hub id: {option} ..."
    if (folder / named).exists():  # a path in an adapter's config counts from its own folder
        named = str((folder / named).resolve())
    option = f"{option} {shlex.quote(named)}"
    return f"the files of {finetuned.source} name {named}; if that is it: {option}"


def others_fused(request: RepairRequest, method: Method) -> tuple[str, ...]:
    """The roles of other fine-tunes, where the method fuses several.

    Raises:
        UsageError: it does not, and some were given.
    """
    roles = tuple(f"{ALSO}{number}" for number, _ in enumerate(request.also, start=1))
    if roles and not method.fuses:
        raise UsageError(
            f"{method.name} repairs one fine-tune and cannot fuse others with it",
            "leave out --also, or use a method that fuses: somf",
        )
    return roles


def settle_texts(
    request: RepairRequest, method: Method
) -> tuple[dict[Data, PlannedTexts], list[str]]:
    """Check the texts that a method asks for; remark on those that it does not.

    Raises:
        UsageError: one is needed and was not given; names the option.
        SuiteError: a file is missing or malformed, or shares prompts with a suite of this run.
    """
    needed, given = method.required_data(), request.texts
    for data in sorted(needed - set(given)):
        if data != "safe":  # the anchors stand in, with the aligned model's own refusals
            raise missing_data(data, method=method.name)
    used: dict[Data, str | Path] = {
        data: source for data, source in given.items() if data in needed
    }
    notes = [
        f"{method.name} reads no such texts with these settings: {OPTIONS[data]} is not used"
        for data in given
        if data not in needed
    ]
    return plan_texts(used, suites=request.suites), notes


def check_something_to_do(
    method: Method, finetuned: Checkpoint, used: Mapping[str, Checkpoint]
) -> None:
    """Refuse checkpoints that leave nothing to repair, or no means to do it.

    Raises:
        NothingToDoError: two of them hold the same weights; names both.
    """
    aligned = finetuned if method.subject_is_aligned else used.get("aligned")
    for role, checkpoint in used.items():
        if role.startswith(_DISTINCT) and same_weights(finetuned, checkpoint):
            option = ROLE_OPTIONS.get(role, f"--{ALSO}")
            raise NothingToDoError(
                f"{finetuned.source} and {checkpoint.source} hold the same weights: {option} must "
                "name another model than the fine-tune",
                f"check {option}",
            )
    if aligned is None:
        return
    if not method.subject_is_aligned and same_weights(finetuned, aligned):
        raise NothingToDoError(
            f"{finetuned.source} and {aligned.source} hold the same weights: "
            "the fine-tune has not moved away from the aligned model",
            "check that the fine-tuned and the aligned model are the ones you mean",
        )
    kind = method.vector_kind
    if kind is not None and kind in used and same_weights(aligned, used[kind]):
        raise NothingToDoError(
            f"{aligned.source} and {used[kind].source} hold the same weights: "
            f"aligned - {kind} is zero, there is no safety vector",
            f"check --aligned and --{kind}",
        )
    for one, other in method.must_differ():
        if one in used and other in used and same_weights(used[one], used[other]):
            raise NothingToDoError(
                f"{used[one].source} and {used[other].source} hold the same weights: {method.name} "
                f"repairs by what the {one} model has beyond the {other} one",
                f"check {ROLE_OPTIONS[one]} and {ROLE_OPTIONS[other]}",
            )


def check_first_repair(request: RepairRequest, method: Method, finetuned: Checkpoint) -> list[str]:
    """Refuse the same method twice; say so when another method went before.

    Raises:
        AlreadyRepairedError: the manifest shows this method, and `force` is not set.
    """
    manifest = read_manifest(finetuned.folder)
    done = None if manifest is None else manifest.get("method")
    name = done.get("name") if isinstance(done, dict) else None
    if not isinstance(name, str):
        return []
    if name == method.name and not request.force:
        raise AlreadyRepairedError(
            f"{finetuned.source} has been repaired with {name} already (see its realign.json)",
            "a second repair is rarely meant; --force repeats it",
        )
    return [f"the fine-tune has been repaired before, with {name}"]


def check_rank(method: Method, matching: Matching, finetuned: Checkpoint) -> list[str]:
    """Refuse a fixed rank that no matrix has; remark on the matrices that have fewer directions.

    Raises:
        UsageError: the rank is above the smaller side of every matrix; names the largest.
    """
    fixed = method.fixed_rank()
    if fixed is None:
        return []
    name, rank = fixed
    sides = _smaller_sides(matching, finetuned)
    if not sides:
        return []
    largest = max(sides, key=lambda key: sides[key])
    if rank > sides[largest]:
        raise UsageError(
            f"{name} = {rank} is above the rank of every matrix: the largest, {largest}, has "
            f"{sides[largest]} directions",
            f"give {name} of at most {sides[largest]}",
        )
    small = [key for key, side in sides.items() if side < rank]
    if not small:
        return []
    return [
        f"{name} = {rank} is above the rank of {len(small)} of {len(sides)} matrices (first "
        f"{small[0]} with {sides[small[0]]}): all of their directions are kept"
    ]


def check_patch_rank(
    request: RepairRequest, matching: Matching, finetuned: Checkpoint
) -> list[str]:
    """Say where the bound on a patch's rank is above every rank: legal, and it bounds nothing."""
    if request.max_patch_rank is None:
        return []
    sides = _smaller_sides(matching, finetuned)
    largest = max(sides.values(), default=0)
    if request.max_patch_rank < largest:
        return []
    return [
        f"--max-patch-rank {request.max_patch_rank} truncates nothing: no matrix has more than "
        f"{largest} directions"
    ]


def check_count(method: Method, matching: Matching, finetuned: Checkpoint) -> list[str]:
    """Say where a fixed number of matrices to select is all of them."""
    fixed = method.fixed_count()
    if fixed is None:
        return []
    (name, count), there = fixed, len(_smaller_sides(matching, finetuned))
    if count <= there:
        return []
    return [f"{name} = {count}: there are only {there} matrices, all are selected"]


def _smaller_sides(matching: Matching, finetuned: Checkpoint) -> dict[str, int]:
    """The largest rank that every matrix to edit can have, by key."""
    return {
        slot.key: min(slot_shape(finetuned.tensors[slot.tensor].shape, slot))
        for pair in matching.pairs
        if pair.action == "edit" and len(finetuned.tensors[pair.role.name].shape) >= 2
        for slot in pair.slots
    }


def check_offload(request: RepairRequest, method: Method) -> list[str]:
    """Refuse to read a model block by block that has to be in memory; say where none is run.

    Raises:
        UsageError: the method trains a model in memory; names it.
    """
    if not request.offload:
        return []
    if method.trains:
        raise UsageError(
            f"{method.name} trains with a whole model in memory: --offload cannot be used with it",
            "leave --offload out; --dry-run says how much memory is needed",
        )
    if not method.prepares() or method.reads_weights_only():
        return [f"{method.name} runs no model with these settings: --offload is not used"]
    return []


def check_encoding(request: RepairRequest) -> None:
    """Check how the output's weights are to be stored.

    Raises:
        UsageError: an unknown word, or a patch, whose factors are not encoded.
    """
    if request.encode is None:
        return
    if request.encode not in ENCODINGS:
        raise UsageError(
            f"there is no encoding {request.encode!r}", f"encodings: {', '.join(ENCODINGS)}"
        )
    if request.patch:
        raise UsageError("--encode and --patch do not go together", "leave out one of them")


def check_strengths(method: Method, strength: float, strengths: Mapping[int, float] | None) -> None:
    """Check the dial t, and those of single layers.

    Raises:
        UsageError: out of the method's range, or all 0, which would change nothing.
    """
    for each in (strength, *(strengths or {}).values()):
        method.validate_strength(each)
    if max((strength, *(strengths or {}).values()), default=inf) == 0.0:
        raise UsageError(
            "strength = 0 would leave the fine-tune as it is", "give a strength above 0"
        )
