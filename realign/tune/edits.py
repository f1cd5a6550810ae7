"""Every edit of a repair, computed once and kept in memory, in factors where it has them.

Here: running the method over the matrices of a plan, and the memory its dense edits may take. Not
here: scaling them (`scaled`), writing a checkpoint (the repair engine, which computes them anew).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from realign.checkpoint.slots import Slot
from realign.errors import UsageError
from realign.progress import Progress
from realign.repair.edit import Dense, Edit, LowRank, Unchanged
from realign.repair.layers import read_layers
from realign.repair.patch import build_patch, factor
from realign.repair.plan import Plan
from realign.repair.preparation import Statistics
from realign.repair.request import Inputs
from realign.repair.stream import planned_keys
from realign.subspace.eigen import decomposing

_SHARE = 0.5
"""Of the free memory that edits may take; the model and its copy need the rest."""


@dataclass(frozen=True, eq=False)
class KeptEdit:
    """The edit of one matrix, or of one tensor entry by entry, at strength 1."""

    place: Slot
    """In the fine-tune's checkpoint."""
    shape: tuple[int, ...]
    """Of the stored tensor."""
    edit: LowRank | Dense
    matrix: bool = True
    """Whether it is the edit of a logical matrix; else of the stored tensor's first rows."""

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        if isinstance(self.edit, LowRank):
            return self.edit.left.nbytes + self.edit.right.nbytes
        target = 0 if self.edit.target is None else self.edit.target.nbytes
        return self.edit.delta.nbytes + target


def compute_edits(
    plan: Plan, inputs: Inputs, statistics: Statistics, *, progress: Progress
) -> tuple[KeptEdit, ...]:
    """Run the method on every matrix of the plan.

    Args:
        plan: of the repair; its strength does not matter.
        inputs: the open checkpoints.
        statistics: what the method learned.
        progress: counts matrices.

    Raises:
        UsageError: the edits do not fit into memory; or nothing would be changed; or a patch was
            asked for and one of them is of too large a rank.
        NonFiniteError: a checkpoint holds what is not finite.
        CheckpointError: a decomposition does not converge.
    """
    method = plan.method
    free = free_memory()
    room = None if free is None else int(free * _SHARE)
    whole = {pair.role.name for pair in plan.edits if plan.by_entries(pair)}
    kept: list[KeptEdit] = []
    taken = 0
    total = len(planned_keys(plan))
    with progress.task("computing edits", total=total, unit="matrices") as task:
        for slot, layer in read_layers(plan, inputs):
            with decomposing(slot.key):
                edit = _on_cpu(method.edit(layer, statistics))
            task.advance()
            if isinstance(edit, Unchanged):
                continue
            if plan.patch:
                edit = _as_factors(slot, edit, plan.max_patch_rank)
            shape = inputs.finetuned.tensors[slot.tensor].shape
            kept.append(KeptEdit(slot, shape, edit, matrix=slot.tensor not in whole))
            taken += kept[-1].nbytes
            if room is not None and taken > room:
                raise UsageError(
                    f"the edits of {method.name} need more than {room / 1e9:.1f} GB: they are "
                    "dense, and half of the free memory is what they may take",
                    "tune a method with low-rank edits (replace, delta_svd, lox), or on a machine "
                    "with more memory",
                )
    if not kept:
        raise UsageError(
            f"{method.name} with these settings changes nothing: there is no strength to find",
            "try other settings or another method",
        )
    return tuple(kept)


def check_patchable(edits: Sequence[KeptEdit], inputs: Inputs) -> None:
    """Refuse, before the search, factors that no LoRA patch can hold.

    Raises:
        UsageError: a matrix that LoRA cannot reach.
    """
    factors = {each.place.key: factor(each.place, each.edit) for each in edits}
    build_patch(factors, inputs.finetuned, strength=1.0)


def _as_factors(slot: Slot, edit: LowRank | Dense, rank: int | None) -> LowRank:
    """The edit as a patch holds it, so that the search looks at what will be written.

    Raises:
        UsageError: it is of too large a rank, and no smaller one was asked for.
    """
    found = factor(slot, edit, max_rank=rank)
    return LowRank(found.left_or, found.right_ri)


def _on_cpu(edit: Edit) -> Edit:
    if isinstance(edit, Unchanged):
        return edit
    if isinstance(edit, LowRank):
        return LowRank(_own(edit.left), _own(edit.right))
    return Dense(_own(edit.delta), None if edit.target is None else _own(edit.target))


def _own(tensor: Tensor) -> Tensor:
    """A copy that holds nothing else in memory, as the checkpoint's tensors."""
    return tensor.detach().to("cpu").contiguous().clone()


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
