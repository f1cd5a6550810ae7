"""Editing one piece: the method's edit, applied and checked, and what is said of it.

`Editor.edit` depends on its piece alone, so pieces may be edited in any order and in any thread.
What the chunks of one tensor add up to is put together afterwards, in order, by `Ledger`. Here:
matrices and chunks. Not here: where pieces come from (`stream`), the fast form of differences
(`entries`), the arithmetic of applying an edit (`apply`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from realign.checkpoint.slots import Slot, logical_matrix
from realign.errors import ModelError
from realign.repair.apply import CHUNK_ELEMENTS, Effect, apply_edit, row_chunks, unchanged_effect
from realign.repair.edit import Dense, Edit, LowRank, Unchanged
from realign.repair.entries import EntryWork
from realign.repair.lanes import Lane, Lanes
from realign.repair.layers import LayerMaker, entries_before
from realign.repair.plan import Plan
from realign.repair.preparation import Statistics
from realign.repair.record import TensorRow, edited_row
from realign.repair.request import Inputs
from realign.repair.stream import Cut, Piece
from realign.repair.verify import check_input, check_output
from realign.subspace.eigen import decomposing


@dataclass(frozen=True, eq=False)
class EditedMatrix:
    """What was done to one logical matrix, or to a tensor that was edited entry by entry."""

    slot: Slot
    edit: Edit
    row: TensorRow


@dataclass(frozen=True, eq=False)
class EditedPiece:
    """Rows ready to be written, and what was done to them."""

    cut: Cut
    stored: Tensor
    """In the layout and dtype of the file."""
    done: tuple[EditedMatrix, ...] = ()
    """The matrices in it."""
    share: tuple[Edit, Effect] | None = None
    """What the chunk adds to a tensor that is edited entry by entry."""


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A logical matrix in every checkpoint, and where its result goes."""

    slot: Slot
    views: Mapping[str, Tensor]
    target: Tensor


class Editor:
    """Applies a method to pieces and checks what came of it; safe to call from several threads."""

    def __init__(
        self,
        plan: Plan,
        statistics: Statistics,
        *,
        batch: int = 1,
        inputs: Inputs | None = None,
    ) -> None:
        """Open nothing yet.

        Args:
            plan: what is done.
            statistics: what the method learned from a running model.
            batch: how many matrices of one shape are given to the method at once.
            inputs: the open checkpoints, for LoRA factors; None: no layer has them.
        """
        self._plan = plan
        self._batch = batch
        self._layers = LayerMaker(plan, inputs)
        self._statistics = statistics
        # Element-wise work stays on the CPU: over PCIe (25 GB/s each way at best) moving three
        # tensors there and one back takes longer than the 5 GB/s per core that it runs at here.
        device = torch.device("cpu" if plan.method.elementwise else plan.device)
        self._lanes = Lanes(device)
        linear = plan.method.linear_edit() if plan.method.elementwise else None
        self._entries: dict[float, EntryWork] = {}
        if linear is not None:
            vector = plan.method.vector_kind
            for strength in {plan.strength, *plan.strengths.values()}:
                self._entries[strength] = EntryWork(linear, vector=vector, strength=strength)

    def edit(self, pieces: Sequence[Piece]) -> list[EditedPiece]:
        """Edit pieces that came together, or pass their copies through.

        Raises:
            NonFiniteError: what was read, or what would be written, is not finite.
            CheckpointError: a decomposition does not converge.
            ModelError: the accelerator's memory is too small.
        """
        if len(pieces) == 1 and not pieces[0].cut.slots:
            return [self._edit_rows(pieces[0])]
        for piece in pieces:
            assert piece.cut.slots, "only matrices come together"
            self._check_read(piece)
        edited = self._edit_matrices(pieces)
        for each in edited:
            self._check_result(each)
        return edited

    def _edit_rows(self, piece: Piece) -> EditedPiece:
        cut = piece.cut
        entries = self._entries.get(self._plan.strength_of(cut.pair.role.layer))
        if cut.edit and entries is not None and entries.fits(piece.tensors):
            stored, edit, effect = entries.edit(piece.tensors)
            if effect.is_finite:  # then so is all that was read and written: no pass of its own
                return EditedPiece(cut, stored, share=(edit, effect))
        self._check_read(piece)
        if not cut.edit:
            return EditedPiece(cut, piece.tensors["finetuned"])
        edited = self._edit_entries(piece)
        self._check_result(edited)
        return edited

    def _check_read(self, piece: Piece) -> None:
        role = piece.cut.pair.role
        if role.kind != "buffer":  # a stored attention mask may hold -inf
            for label, tensor in piece.tensors.items():
                source = self._plan.inputs[label].source
                check_input(tensor, name=role.name, role=label, source=source)

    def _check_result(self, edited: EditedPiece) -> None:
        stored = edited.stored
        check_output(stored, name=edited.cut.pair.role.name, dtype=str(stored.dtype))

    def _edit_matrices(self, pieces: Sequence[Piece]) -> list[EditedPiece]:
        stored = [torch.empty_like(piece.tensors["finetuned"]) for piece in pieces]
        for piece, rows in zip(pieces, stored, strict=True):
            if piece.cut.pair.partial:  # what lies between the matrices stays
                rows.copy_(piece.tensors["finetuned"])
        done: list[list[EditedMatrix]] = [[] for _ in pieces]
        places = [(at, slot) for at, piece in enumerate(pieces) for slot in piece.cut.slots]
        for group in self._groups(places, pieces):
            matrices: list[_Matrix] = []
            for at, slot in group:
                tensors = pieces[at].tensors
                views = {label: logical_matrix(each, slot) for label, each in tensors.items()}
                matrices.append(_Matrix(slot, views, logical_matrix(stored[at], slot)))
            keys = ", ".join(slot.key for _, slot in group)
            try:
                with decomposing(keys):
                    found = self._lanes.run(partial(self._edit_group, matrices))
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{keys} does not fit into the memory of {self._plan.device}",
                    "use --device cpu",
                ) from error
            for (at, slot), (edit, effect) in zip(group, found, strict=True):
                row = self.row(pieces[at].cut, edit, effect, key=slot.key, module=slot.module)
                done[at].append(EditedMatrix(slot, edit, row))
        return [
            EditedPiece(piece.cut, rows, tuple(matrices))
            for piece, rows, matrices in zip(pieces, stored, done, strict=True)
        ]

    def _groups(
        self, places: Sequence[tuple[int, Slot]], pieces: Sequence[Piece]
    ) -> Iterator[list[tuple[int, Slot]]]:
        """Neighbours of one shape, as many as go together; on the processor one by one."""

        def shape(place: tuple[int, Slot]) -> tuple[object, ...]:
            at, slot = place
            tensors = pieces[at].tensors
            return (
                tuple(logical_matrix(tensors["finetuned"], slot).shape),
                *(tensor.dtype for tensor in tensors.values()),
            )

        for _, same in groupby(places, key=shape):
            rest = list(same)
            while rest:
                yield rest[: self._batch]
                rest = rest[self._batch :]

    def _edit_group(self, matrices: Sequence[_Matrix], lane: Lane) -> list[tuple[Edit, Effect]]:
        there = [lane.up(each.views) for each in matrices]
        layers = [
            self._layers.matrix(each.slot, tensors)
            for each, tensors in zip(matrices, there, strict=True)
        ]
        method = self._plan.method
        if len(layers) == 1:
            edits = [method.edit(layers[0], self._statistics)]
        else:
            edits = method.edit_batch(layers, self._statistics)
        found: list[tuple[Edit, Effect]] = []
        for each, tensors, edit in zip(matrices, there, edits, strict=True):
            result, effect = self._apply(edit, tensors, layer=each.slot.layer)
            lane.down(result, each.target)
            found.append((edit, effect))
        return found

    def _edit_entries(self, piece: Piece) -> EditedPiece:
        """Small blocks of rows, so that the float32 scratch stays in the processor's cache."""
        role = piece.cut.pair.role
        finetuned = piece.tensors["finetuned"]
        stored = torch.empty_like(finetuned)
        tally = Tally()
        within = piece.cut.chunk.within if piece.cut.chunk is not None else None
        before = entries_before(piece.cut.shape, piece.cut.start, within[0] if within else 0)
        width = finetuned.numel() // max(1, finetuned.shape[0] if finetuned.dim() else 1)
        for start, stop in row_chunks(tuple(finetuned.shape), CHUNK_ELEMENTS):
            rows = {label: tensor[start:stop] for label, tensor in piece.tensors.items()}
            layer = self._layers.entries(
                role.name, role.module, role.layer, rows, start=before + start * width
            )
            edit = self._plan.method.edit(layer, self._statistics)
            stored[start:stop], effect = self._apply(edit, rows, layer=role.layer)
            tally.add(edit, effect)
        return EditedPiece(piece.cut, stored, share=(tally.edit(), tally.effect))

    def _apply(
        self, edit: Edit, matrices: Mapping[str, Tensor], *, layer: int | None
    ) -> tuple[Tensor, Effect]:
        kind = self._plan.method.vector_kind
        finetuned, aligned = matrices["finetuned"], matrices.get("aligned")
        other = None if kind is None else matrices.get(kind)
        if isinstance(edit, Unchanged):
            return finetuned, unchanged_effect(finetuned, aligned=aligned, other=other)
        strength = self._plan.strength_of(layer)
        return apply_edit(finetuned, edit, strength=strength, aligned=aligned, other=other)

    def row(self, cut: Cut, edit: Edit, effect: Effect, *, key: str, module: str) -> TensorRow:
        """What the report says of a matrix, or of a tensor that was edited entry by entry."""
        tensor, layer = cut.pair.role.name, cut.pair.role.layer
        scores = dict(self._statistics.scores.get(key, {}))
        if isinstance(edit, Unchanged):
            return TensorRow(
                key=key,
                tensor=tensor,
                module=module,
                layer=layer,
                outcome="unchanged",
                reason=edit.reason,
                numel=effect.numel,
                facts=scores,
            )
        return edited_row(
            key=key,
            tensor=tensor,
            module=module,
            layer=layer,
            edit="low-rank" if isinstance(edit, LowRank) else "dense",
            strength=self._plan.strength_of(layer),
            effect=effect,
            facts={**scores, **edit.facts},
        )


class Ledger:
    """Puts together, in order, what was done to tensors that came in several pieces."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._tally = Tally()

    def settle(self, piece: EditedPiece) -> tuple[EditedMatrix, ...]:
        """What this piece completes; pieces are given in the order of the file."""
        if piece.share is None:
            return piece.done
        self._tally.add(*piece.share)
        if not piece.cut.last:
            return ()
        tally, self._tally = self._tally, Tally()
        role, edit = piece.cut.pair.role, tally.edit()
        row = self._editor.row(piece.cut, edit, tally.effect, key=role.name, module=role.module)
        return (EditedMatrix(piece.cut.pair.slots[0], edit, row),)


class Tally:
    """The chunks of one tensor, added up."""

    def __init__(self) -> None:
        self.effect = Effect()
        self._reasons: list[str] = []
        self._edited = False

    def add(self, edit: Edit, effect: Effect) -> None:
        """Add one chunk."""
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
