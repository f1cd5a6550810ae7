"""Whether a repair can be written as a LoRA patch, told before any work is done for it.

Here: what request, method and headers say. What only the edits say (their ranks, the modules that
hold them) shows when the patch is built (`patch`).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.reader import Checkpoint
from realign.errors import UsageError
from realign.repair.cards import edit_word
from realign.repair.method import Method
from realign.repair.patch_adapter import check_extendable

if TYPE_CHECKING:
    from realign.repair.request import RepairRequest


def check_patch(request: RepairRequest, method: Method, finetuned: Checkpoint) -> None:
    """Refuse what cannot become a patch.

    Raises:
        UsageError: a rank below 1 or without a patch, a method that edits every entry with no rank
            to truncate to, a scope that LoRA cannot hold, or an adapter that cannot be extended.
    """
    rank = request.max_patch_rank
    if rank is not None and rank < 1:
        raise UsageError(f"max_patch_rank is {rank}", "it must be at least 1")
    if not request.patch:
        if rank is not None:
            raise UsageError("--max-patch-rank belongs to --patch", "add --patch")
        return
    if (edits_entries(method) or edit_word(type(method)) == "dense") and rank is None:
        raise UsageError(
            f"{method.name} edits every entry: its edit is no LoRA patch",
            "leave out --patch, use a low-rank method (replace, delta_svd, lssf), or keep its best "
            "approximation of rank K with --max-patch-rank K; the error is reported",
        )
    if request.scope == "all":
        raise UsageError(
            "a LoRA patch holds matrices, no norms and biases",
            "use --scope block_linear or --scope matrices, or leave out --patch",
        )
    if isinstance(finetuned, AdapterCheckpoint):
        check_extendable(finetuned)


def edits_entries(method: Method) -> bool:
    """Whether a method edits entry by entry, in its own form or in that of `by_matrices`."""
    return method.elementwise or getattr(type(method), "_by_matrices", False)


def by_matrices(method: Method) -> Method:
    """The method over whole matrices: what can be decomposed, and truncated to a rank.

    An element-wise method edits tensors of any shape in chunks of rows; for a patch it must see
    matrices, and only them.
    """
    if not method.elementwise:
        return method
    kind = type(method)
    changes = {"elementwise": False, "default_scope": "block_linear", "_by_matrices": True}
    whole: type[Method] = type(kind.__name__, (kind,), changes)
    return whole(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})
