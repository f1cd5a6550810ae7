"""The pieces in which tensors pass through a repair, in the order in which they are written.

A piece is what is in memory at once: a chunk of rows of a tensor that is copied or edited entry by
entry, or one logical matrix in every checkpoint. Here: cutting tensors into pieces, reading them,
and editing one. Not here: the order of files, threads and the output (`engine`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from realign.checkpoint.matching import TensorPair
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, stored_rows
from realign.errors import CheckpointError, ModelError
from realign.repair.apply import (
    CHUNK_ELEMENTS,
    Effect,
    apply_edit,
    row_chunks,
    unchanged_effect,
)
from realign.repair.edit import Dense, Edit, Layer, LowRank, Unchanged
from realign.repair.estimate import STREAM_BYTES
from realign.repair.method import Statistics
from realign.repair.plan import Plan
from realign.repair.record import TensorRow, edited_row
from realign.repair.request import Inputs
from realign.repair.verify import check_input, check_output


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a tensor with what is needed to write them."""

    pair: TensorPair
    start: int
    """First row of dim 0 that the piece covers."""
    tensors: Mapping[str, Tensor]
    """As stored, by role; only the fine-tune's where the rows are copied."""
    edit: bool
    """Whether the rows are edited or copied."""
    slots: tuple[Slot, ...] = ()
    """The logical matrices in it, for methods that work on matrices."""
    last: bool = False
    """Nothing of the tensor is left to edit after this piece."""

    @property
    def nbytes(self) -> int:
        """Bytes read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class EditedMatrix:
    """What was done to one logical matrix, or to a tensor that was edited entry by entry."""

    slot: Slot
    edit: Edit
    row: TensorRow


@dataclass(frozen=True, eq=False)
class EditedPiece:
    """Rows ready to be written, and what was done to them."""

    stored: Tensor
    """In the layout and dtype of the file."""
    done: tuple[EditedMatrix, ...] = ()
    """What this piece completes."""


def read_pieces(pair: TensorPair, plan: Plan, inputs: Inputs) -> Iterator[Piece]:
    """The pieces of one tensor, in the order of its rows, without gap or overlap."""
    info = inputs.finetuned.tensors[pair.role.name]
    total = info.shape[0] if info.shape else 1
    per_chunk = STREAM_BYTES // max(1, info.nbytes // max(1, info.numel))
    at = 0
    if pair.action == "edit":
        roles = {"finetuned": inputs.finetuned, **{r: inputs.others[r] for r in plan.roles}}
        common = total if pair.common_rows is None else pair.common_rows
        if plan.method.elementwise:
            for start, end in row_chunks((common, *info.shape[1:]), per_chunk):
                rows = (start, end)
                yield Piece(pair, start, _read(pair, roles, rows), edit=True, last=end == common)
            at = common
        else:
            for rows, slots in _blocks(pair, shape=info.shape, common=common):
                assert rows[0] >= at, f"{slots[0].key} overlaps another block of its tensor"
                yield from _copies(pair, inputs.finetuned, at, rows[0], per_chunk)
                yield Piece(pair, rows[0], _read(pair, roles, rows), edit=True, slots=slots)
                at = rows[1]
    yield from _copies(pair, inputs.finetuned, at, total, per_chunk)


def planned_keys(plan: Plan) -> tuple[str, ...]:
    """The keys of all rows that the report of this plan must hold."""
    if plan.method.elementwise:
        return tuple(pair.role.name for pair in plan.edits)
    return tuple(slot.key for pair in plan.edits for slot in pair.slots)


class Editor:
    """Applies a method to pieces, checks them, and says what came of it."""

    def __init__(self, plan: Plan, statistics: Statistics) -> None:
        self._plan = plan
        self._statistics = statistics
        # Element-wise work is bound by memory: moving it to an accelerator costs more than it.
        self._device = torch.device("cpu" if plan.method.elementwise else plan.device)
        self._tallies: dict[str, _Tally] = {}

    def edit(self, piece: Piece) -> EditedPiece:
        """Edit one piece, or pass its copy through.

        Raises:
            NonFiniteError: what was read, or what would be written, is not finite.
            CheckpointError: a decomposition does not converge.
            ModelError: the accelerator's memory is too small.
        """
        name = piece.pair.role.name
        if piece.pair.role.kind != "buffer":  # a stored attention mask may hold -inf
            for role, tensor in piece.tensors.items():
                source = self._plan.inputs[role].source
                check_input(tensor, name=name, role=role, source=source)
        if not piece.edit:
            return EditedPiece(piece.tensors["finetuned"])
        edited = self._edit_matrices(piece) if piece.slots else self._edit_entries(piece)
        check_output(edited.stored, name=name, dtype=str(edited.stored.dtype))
        return edited

    def _edit_matrices(self, piece: Piece) -> EditedPiece:
        stored = torch.empty_like(piece.tensors["finetuned"])
        done: list[EditedMatrix] = []
        for slot in piece.slots:
            matrices = {
                role: logical_matrix(tensor, slot).to(self._device)
                for role, tensor in piece.tensors.items()
            }
            layer = self._layer(slot.key, slot.module, slot.layer, matrices)
            try:
                edit = self._plan.method.edit(layer, self._statistics)
                result, effect = self._apply(edit, matrices)
            except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
                raise CheckpointError(
                    f"{slot.key}: its decomposition does not converge ({error})",
                    "check the tensor in every checkpoint of the run",
                ) from error
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{slot.key} does not fit into the memory of {self._device}",
                    "use --device cpu",
                ) from error
            logical_matrix(stored, slot).copy_(result)
            row = self._row(piece, edit, effect, key=slot.key, module=slot.module)
            done.append(EditedMatrix(slot, edit, row))
        return EditedPiece(stored, tuple(done))

    def _edit_entries(self, piece: Piece) -> EditedPiece:
        """Small blocks of rows, so that the float32 scratch stays in the processor's cache."""
        role = piece.pair.role
        finetuned = piece.tensors["finetuned"]
        stored = torch.empty_like(finetuned)
        tally = self._tallies.setdefault(role.name, _Tally())
        for start, stop in row_chunks(tuple(finetuned.shape), CHUNK_ELEMENTS):
            rows = {label: tensor[start:stop] for label, tensor in piece.tensors.items()}
            layer = self._layer(role.name, role.module, role.layer, rows)
            edit = self._plan.method.edit(layer, self._statistics)
            stored[start:stop], effect = self._apply(edit, rows)
            tally.add(edit, effect)
        if not piece.last:
            return EditedPiece(stored)
        del self._tallies[role.name]
        edit = tally.edit()
        row = self._row(piece, edit, tally.effect, key=role.name, module=role.module)
        return EditedPiece(stored, (EditedMatrix(piece.pair.slots[0], edit, row),))

    def _apply(self, edit: Edit, matrices: Mapping[str, Tensor]) -> tuple[Tensor, Effect]:
        kind = self._plan.method.vector_kind
        finetuned, aligned = matrices["finetuned"], matrices.get("aligned")
        other = None if kind is None else matrices.get(kind)
        if isinstance(edit, Unchanged):
            return finetuned, unchanged_effect(finetuned, aligned=aligned, other=other)
        return apply_edit(
            finetuned, edit, strength=self._plan.strength, aligned=aligned, other=other
        )

    def _layer(
        self, key: str, module: str, layer: int | None, matrices: Mapping[str, Tensor]
    ) -> Layer:
        return Layer(
            key=key,
            module=module,
            layer=layer,
            finetuned=matrices["finetuned"],
            aligned=matrices.get("aligned"),
            base=matrices.get("base"),
            unaligned=matrices.get("unaligned"),
            seed=derived_seed(self._plan.seed, self._plan.method.name, key),
        )

    def _row(self, piece: Piece, edit: Edit, effect: Effect, *, key: str, module: str) -> TensorRow:
        tensor, layer = piece.pair.role.name, piece.pair.role.layer
        if isinstance(edit, Unchanged):
            return TensorRow(
                key=key,
                tensor=tensor,
                module=module,
                layer=layer,
                outcome="unchanged",
                reason=edit.reason,
                numel=effect.numel,
            )
        return edited_row(
            key=key,
            tensor=tensor,
            module=module,
            layer=layer,
            edit="low-rank" if isinstance(edit, LowRank) else "dense",
            strength=self._plan.strength,
            effect=effect,
            facts=edit.facts,
        )


def derived_seed(seed: int, method: str, key: str) -> int:
    """The seed of one matrix: the same whatever the order of shards, the device or the threads."""
    digest = hashlib.sha256(f"{seed}\0{method}\0{key}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


class _Tally:
    """The chunks of one tensor, added up."""

    def __init__(self) -> None:
        self.effect = Effect()
        self._reasons: list[str] = []
        self._edited = False

    def add(self, edit: Edit, effect: Effect) -> None:
        if isinstance(edit, Unchanged):
            self._reasons.append(edit.reason)
        else:
            self._edited = True
        self.effect = self.effect + effect

    def edit(self) -> Edit:
        """What the tensor as a whole got; the numbers themselves are written already."""
        if self._edited:
            return Dense(torch.empty(0))
        return Unchanged(self._reasons[0] if self._reasons else "empty tensor")


def _read(
    pair: TensorPair, roles: Mapping[str, Checkpoint], rows: tuple[int, int]
) -> dict[str, Tensor]:
    return {role: read_rows(each, pair.role.name, rows) for role, each in roles.items()}


def _copies(
    pair: TensorPair, finetuned: Checkpoint, start: int, stop: int, per_chunk: int
) -> Iterator[Piece]:
    if start == stop:
        return
    name = pair.role.name
    shape = finetuned.tensors[name].shape
    for first, last in row_chunks((stop - start, *shape[1:]), per_chunk):
        rows = (start + first, start + last)
        # No name for the tensor: the generator would hold it while the next one is read.
        yield Piece(pair, rows[0], {"finetuned": read_rows(finetuned, name, rows)}, edit=False)


def read_rows(checkpoint: Checkpoint, name: str, rows: tuple[int, int]) -> Tensor:
    """Rows [start, stop) of a tensor; a scalar is one row of no dimension but that."""
    shape = checkpoint.tensors[name].shape
    if not shape:
        return checkpoint.read(name).reshape(1)
    if rows == (0, shape[0]):
        return checkpoint.read(name)
    return checkpoint.read(name, rows)


def read_slot(checkpoint: Checkpoint, slot: Slot) -> Tensor:
    """The stored rows in which a logical matrix lies."""
    shape = checkpoint.tensors[slot.tensor].shape
    return read_rows(checkpoint, slot.tensor, stored_rows(slot, shape))


def _blocks(
    pair: TensorPair, *, shape: tuple[int, ...], common: int
) -> Iterator[tuple[tuple[int, int], tuple[Slot, ...]]]:
    """Ranges of stored rows, each with the matrices that lie in it."""
    grouped = groupby(pair.slots, key=lambda slot: stored_rows(slot, (common, *shape[1:])))
    for rows, slots in grouped:
        yield rows, tuple(slots)
