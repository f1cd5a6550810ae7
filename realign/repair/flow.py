"""Every piece of a repair through reading, editing and writing, in order and within its memory.

Here: which threads there are and what they may hold, for a checkpoint and for a patch. Not here:
the stages themselves (`stream`, `editor`, `sink`) and how they are joined (`pipeline`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from realign.checkpoint.writer import OutputFolder, ShardLayout
from realign.errors import ModelError
from realign.progress import Progress
from realign.repair.edit import Unchanged
from realign.repair.editor import EditedPiece, Editor, Ledger
from realign.repair.estimate import STREAM_BUDGET, WORKERS, device_bytes, matrix_budget
from realign.repair.lanes import device_memory
from realign.repair.native import blas_threads, return_freed_memory, trim_memory
from realign.repair.patch import Factors, factor
from realign.repair.pipeline import Pipeline
from realign.repair.plan import Plan
from realign.repair.preparation import Statistics
from realign.repair.record import TensorRow
from realign.repair.request import Inputs
from realign.repair.sink import ShardSink
from realign.repair.stream import Cut, Piece, batched, cut_tensor, planned_keys, read_cut
from realign.subspace.threads import torch_threads

R = TypeVar("R")

_STREAMS = max(2, min(3, os.cpu_count() or 1))
"""Threads for chunks that are edited entry by entry. More gain nothing: one at a time reads, and
one hashes and writes."""

_LANES = 4
"""Matrices under way on an accelerator: one uploads and one downloads while two compute."""

_BATCH = 32
"""Matrices of one shape that an accelerator decomposes in one call."""

_COPIES = 16
"""Copied chunks that may be under way together; they are of about a megabyte."""

_BATCH_BYTES = 256 * 2**20
"""What they may hold together: large ones fill the device alone."""


class Flow:
    """The pieces of one plan on their way."""

    def __init__(
        self,
        plan: Plan,
        inputs: Inputs,
        statistics: Statistics,
        *,
        progress: Progress,
        in_flight: int | None = None,
    ) -> None:
        """Nothing starts yet.

        Args:
            plan: what is done.
            inputs: the open checkpoints.
            statistics: what the method learned from a running model.
            progress: shows bytes written, or matrices.
            in_flight: how many matrices are worked on at once; None: as memory allows.

        Raises:
            ModelError: the accelerator's memory is too small for the largest matrix.
        """
        self._plan, self._inputs, self._progress = plan, inputs, progress
        self._batch = batch_size(torch.device(plan.device))
        self._editor = Editor(plan, statistics, batch=self._batch, inputs=inputs)
        self._lanes = _how_many(plan, inputs) if in_flight is None else max(1, in_flight)

    def write_shards(self, output: OutputFolder) -> list[TensorRow]:
        """Write every weight file that is not finished yet; the rows of all of them.

        Raises:
            NonFiniteError, CheckpointError, ModelError: see `Editor.edit`.
            OutputError: the disk is full or not writable.
        """
        todo = [shard for shard in self._plan.layout if not output.is_done(shard)]
        cuts = (cut for shard in todo for cut in self._cuts_of(shard))
        total = sum(shard.nbytes for shard in todo)
        ledger = Ledger(self._editor)
        with (
            self._threads(),
            self._progress.task("repairing", total=total, unit="B") as task,
            ShardSink(output, todo, task) as sink,
        ):

            def write(pieces: Sequence[EditedPiece]) -> None:
                for each in pieces:
                    sink.write(each, [done.row for done in ledger.settle(each)])

            self._pipeline(cuts, self._editor.edit, write).run()
        rows: list[TensorRow] = []
        for shard in self._plan.layout:
            if shard.filename in sink.rows:
                rows += sink.rows[shard.filename]
            else:
                done = output.finished(shard)
                assert done is not None, shard.filename
                stored: Sequence[Mapping[str, Any]] = done["rows"]
                rows += [TensorRow.from_json(each) for each in stored]
        return rows

    def collect_factors(self) -> tuple[list[TensorRow], dict[str, Factors]]:
        """Compute every edit in factored form; nothing is written.

        Raises:
            NonFiniteError, CheckpointError, ModelError: see `Editor.edit`.
        """
        plan = self._plan
        cuts = (cut for pair in plan.edits for cut in cut_tensor(pair, plan, self._inputs))
        rows: list[TensorRow] = []
        factors: dict[str, Factors] = {}
        total = len(planned_keys(plan))
        with (
            self._threads(),
            self._progress.task("computing the patch", total=total, unit="matrices") as task,
        ):

            def keep(found: Sequence[tuple[TensorRow, Factors | None]]) -> None:
                for row, factored in found:
                    rows.append(row)
                    if factored is not None:
                        factors[row.key] = factored
                    task.advance()

            self._pipeline((cut for cut in cuts if cut.edit), self._factored, keep).run()
        return rows, factors

    def _factored(self, pieces: Sequence[Piece]) -> list[tuple[TensorRow, Factors | None]]:
        found: list[tuple[TensorRow, Factors | None]] = []
        for each in (each for piece in self._editor.edit(pieces) for each in piece.done):
            if isinstance(each.edit, Unchanged):
                found.append((each.row, None))
                continue
            made = factor(each.slot, each.edit, max_rank=self._plan.max_patch_rank)
            if self._plan.strengths:  # each layer has its own: it goes into the factors
                strength = self._plan.strength_of(each.slot.layer)
                made = replace(made, left_or=made.left_or * strength)
            # A patch is added in the forward pass: no cast of W' rounds it.
            row = replace(each.row, survival=None, patch_rank=made.rank, patch_error=made.error)
            found.append((row, made))
        return found

    def _pipeline(
        self,
        cuts: Iterable[Cut],
        work: Callable[[Sequence[Piece]], R],
        write: Callable[[R], None],
    ) -> Pipeline[tuple[Cut, ...], Sequence[Piece], R]:
        checkpoints, budget = self._inputs.all(), self._budget()
        return Pipeline(
            batched(cuts, self._batch, limit=_BATCH_BYTES),
            read=lambda cuts: [read_cut(cut, checkpoints) for cut in cuts],
            work=work,
            write=write,
            cost=lambda cuts: sum(admission_cost(cut, budget) for cut in cuts),
            budget=budget,
            workers=_STREAMS if self._plan.method.elementwise else self._lanes,
        )

    def _budget(self) -> int:
        if self._plan.method.elementwise:
            return STREAM_BUDGET
        cuts = [
            cut for pair in self._plan.edits for cut in cut_tensor(pair, self._plan, self._inputs)
        ]
        costs = [cut.cost for cut in cuts if cut.edit]
        budget = matrix_budget(self._plan.estimate.largest_matrix, max(costs, default=0))
        return min(budget, self._lanes * max(costs, default=0)) + STREAM_BUDGET

    def _cuts_of(self, shard: ShardLayout) -> Iterator[Cut]:
        pairs = {pair.role.name: pair for pair in self._plan.matching.pairs}
        for spec in shard.tensors:
            yield from cut_tensor(pairs[spec.name], self._plan, self._inputs)

    @contextmanager
    def _threads(self) -> Generator[None]:
        """One per operation where the threads are ours: more would wait for each other's ends."""
        return_freed_memory()
        try:
            if self._plan.method.elementwise:
                with torch_threads(1):
                    yield
                return
            count = max(1, (os.cpu_count() or 1) // self._lanes)
            with torch_threads(count), blas_threads(count):
                yield
        finally:
            trim_memory()


def admission_cost(cut: Cut, budget: int) -> int:
    """What a piece counts while it is under way, in bytes.

    Copies count more than they hold: behind a matrix that takes minutes they would otherwise pile
    up to all that the budget leaves, for nothing, and malloc keeps small blocks when they are gone
    (measured: 0.5 GB beside a matrix of 8192 x 28672, with a head of 2 GB waiting behind it).
    """
    return cut.cost if cut.slots else max(cut.cost, budget // _COPIES)


def batch_size(device: torch.device) -> int:
    """How many matrices of one shape are worked on in one call: on the processor nothing is won."""
    return 1 if device.type == "cpu" else _BATCH


def _how_many(plan: Plan, inputs: Inputs) -> int:
    """How many matrices to work on at once.

    Raises:
        ModelError: the accelerator's memory is too small for one.
    """
    device = torch.device(plan.device)
    if device.type == "cpu" or plan.method.elementwise:
        return max(1, min(WORKERS, os.cpu_count() or 1))
    free = device_memory(device)
    needed = device_bytes(plan.matching, inputs, plan.roles, own=plan.method.edit_bytes)
    if free is None:
        return 1
    if needed > free:
        raise ModelError(
            f"the largest matrix needs {needed / 1e9:.1f} GB on {device}, which has "
            f"{free / 1e9:.1f} GB free",
            "use --device cpu, or free the memory of that device",
        )
    return max(1, min(_LANES, free // max(1, needed)))
