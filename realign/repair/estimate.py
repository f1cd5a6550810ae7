"""What a repair will read, write and hold in memory, from headers alone.

The figures are for people who decide whether a run fits their machine; constants that stand for
what was measured say so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import TypeAlias

from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.matching import Matching
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, slot_shape, stored_rows
from realign.repair.estimate_prepare import models_run, preparation_bytes
from realign.repair.method import Method
from realign.repair.plan_anchors import PlannedAnchors
from realign.repair.preparation import Data
from realign.repair.request import Inputs
from realign.repair.texts import PlannedTexts

OwnBytes: TypeAlias = Callable[[int, int], int | None]
"""From d_out and d_in to what a method's `edit` holds; None: what a decomposition holds."""

INTERPRETER_BYTES = 240 * 2**20
"""Resident size of Python with torch imported, before any tensor."""

MODEL_LIBRARY_BYTES = 150 * 2**20
"""What transformers adds, where a model is run."""

STREAM_BYTES = 2**20
"""Tensors that are copied or edited entry by entry are read in chunks of about this size, which
stay in the processor's cache on their way from the file through hash and arithmetic to the file."""

STREAM_BUDGET = 24 * 2**20
"""Chunks under way together, read ahead and waiting to be written included."""

MEMORY_LIMIT = 400 * 10**6
"""Resident memory that no repair exceeds but for `MATRIX_SHARE` of its largest matrix."""

MATRIX_SHARE = 6
"""Times the largest decomposed matrix in float32."""

WORKERS = 2
"""Matrices decomposed at once on the processor, where memory allows."""

_OVERHEAD = 0.06
"""Of a matrix's working memory, what malloc and the libraries hold beside it: measured on matrices
of 8192 x 28672."""

_LIBRARY_BUFFERS = 60 * 2**20  # measured: BLAS's buffers, freed memory kept, the final picture


@dataclass(frozen=True)
class Estimate:
    """What the run is expected to move and to hold, in bytes."""

    read: int
    """Every weight file once; what no edit needs is read for its hash in the manifest."""
    written: int
    peak_memory: int
    """Resident memory at its highest, the interpreter included."""
    largest_matrix: int
    """Entries of the largest matrix that is decomposed; 0 for element-wise methods."""


def estimate_repair(
    method: Method,
    matching: Matching,
    inputs: Inputs,
    used: Mapping[str, Checkpoint],
    *,
    patch: bool,
    offload: bool = False,
    texts: Mapping[Data, PlannedTexts] = MappingProxyType({}),
    anchors: PlannedAnchors | None = None,
) -> Estimate:
    """Estimate one run.

    Args:
        method: with its safety vector settled.
        matching: what is edited and what is copied.
        inputs: the open checkpoints.
        used: those that the method reads beside the fine-tune.
        patch: whether only the edit is written.
        offload: whether a model that is measured is read block by block.
        texts: those that the method reads.
        anchors: those that the aligned model answers.
    """
    finetuned = inputs.finetuned
    written = held = largest = 0
    costs: list[int] = []
    for pair in matching.pairs:
        info = finetuned.tensors[pair.role.name]
        written += info.nbytes
        if pair.action == "copy" or (method.elementwise and not pair.partial):
            continue
        largest = max(largest, *(math.prod(slot_shape(info.shape, slot)) for slot in pair.slots))
        for rows, slots in groupby(pair.slots, key=partial(stored_rows, shape=info.shape)):
            cost = block_bytes(
                info,
                rows,
                tuple(slots),
                inputs=1 + len(used),
                rank=fixed_rank(method),
                own=method.edit_bytes,
            )
            costs.append(cost)
    files = [file for each in (finetuned, *used.values()) for file in each.weight_files]
    read = sum(file.stat().st_size for file in files)
    if costs:
        budget = min(matrix_budget(largest, max(costs)), WORKERS * max(costs))
        held = most_together(costs, budget)
    held += STREAM_BUDGET + _LIBRARY_BUFFERS
    for running in models_run(method, finetuned, used, anchors=anchors):
        read += sum(info.nbytes for info in running.tensors.values())
    preparing = preparation_bytes(
        method, matching, finetuned, used, offload=offload, texts=texts, anchors=anchors
    )
    if preparing:
        held = max(held, preparing) + MODEL_LIBRARY_BYTES
    return Estimate(
        read=read,
        written=0 if patch else written,
        peak_memory=INTERPRETER_BYTES + held,
        largest_matrix=largest,
    )


def most_together(costs: Sequence[int], budget: int) -> int:
    """The most that neighbours in a row of jobs cost together while their sum fits a budget.

    One job alone is always admitted, as by the pipeline.
    """
    best = total = first = 0
    for last, cost in enumerate(costs):
        total += cost
        while total > budget and first < last:
            total -= costs[first]
            first += 1
        best = max(best, total)
    return best


def fixed_rank(method: Method) -> int | None:
    """How many directions a method keeps, where its settings say so; None: a rule decides."""
    rank: object = getattr(method, "rank", None)
    return rank if isinstance(rank, int) else None


def block_bytes(
    info: TensorInfo,
    rows: tuple[int, int],
    slots: Sequence[Slot],
    *,
    inputs: int,
    rank: int | None = None,
    own: OwnBytes | None = None,
) -> int:
    """Bytes held while the matrices in some stored rows are edited, one after the other.

    Args:
        info: the stored tensor.
        rows: the range of its first dimension that is read.
        slots: the matrices that lie in it.
        inputs: how many checkpoints are read, the fine-tune included.
        rank: how many directions are kept of each; None: that depends on its spectrum.
        own: what the method itself says of its memory.
    """
    share = (rows[1] - rows[0]) / max(1, info.shape[0] if info.shape else 1)
    stored = int(info.nbytes * share)
    working = max(_working_bytes(info.shape, slot, rank, own) for slot in slots)
    working += int(_OVERHEAD * working)
    # The result takes memory when it is written into: after the working memory of a single matrix
    # is freed, but beside that of the second of several.
    return stored * inputs + (max(stored, working) if len(slots) == 1 else stored + working)


def _working_bytes(
    shape: tuple[int, ...], slot: Slot, rank: int | None, own: OwnBytes | None
) -> int:
    """Beside what is stored: two float32 differences, the Gram with its reduction, the vectors.

    Rules keep a third of all directions of a typical difference; see `methods.ranks`.
    """
    d_out, d_in = slot_shape(shape, slot)
    told = None if own is None else own(d_out, d_in)
    if told is not None:
        return told
    n = min(d_out, d_in)
    kept = n // 3 if rank is None else min(rank, n)
    return 8 * d_out * d_in + 8 * n * n + kept * (8 * n + 4 * (d_out + d_in))


def matrix_budget(largest: int, cost: int) -> int:
    """Bytes that matrices under way together may cost.

    Args:
        largest: entries of the largest matrix.
        cost: what the costliest one holds, which is always admitted alone.
    """
    allowed = MEMORY_LIMIT + MATRIX_SHARE * 4 * largest
    return max(cost, allowed - INTERPRETER_BYTES - STREAM_BUDGET - _LIBRARY_BUFFERS)


def device_bytes(
    matching: Matching, inputs: Inputs, roles: Sequence[str], *, own: OwnBytes | None = None
) -> int:
    """Memory of an accelerator that the largest matrix of a plan needs while it is edited.

    Args:
        matching: what is edited.
        inputs: the open checkpoints.
        roles: those that are read beside the fine-tune.
        own: what the method itself says of its memory.
    """
    tensors = inputs.finetuned.tensors
    needed = 0
    for pair in matching.pairs:
        if pair.action != "edit":
            continue
        info = tensors[pair.role.name]
        itemsize = info.nbytes // max(1, info.numel)
        for slot in pair.slots:
            d_out, d_in = slot_shape(info.shape, slot)
            # As on the host; and the solver there works on copies of the Gram matrix.
            entries, gram = d_out * d_in, 8 * min(d_out, d_in) ** 2
            told = None if own is None else own(d_out, d_in)
            working = entries * 16 + 5 * gram if told is None else told
            needed = max(needed, entries * itemsize * (len(roles) + 2) + working)
    return needed
