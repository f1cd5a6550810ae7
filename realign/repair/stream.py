"""The pieces in which tensors pass through a repair, in the order in which they are written.

A piece is what is in memory at once: a chunk of rows of a tensor that is copied or edited entry by
entry, or one logical matrix in every checkpoint. Here: cutting tensors into pieces, what each will
hold, and reading them. Not here: editing one (`editor`), threads (`pipeline`), the order of files
and the output (`engine`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from realign.checkpoint.chunks import Chunk, chunks_of, read_chunk, read_rows
from realign.checkpoint.matching import TensorPair
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, stored_rows
from realign.repair.estimate import STREAM_BYTES, block_bytes, fixed_rank
from realign.repair.plan import Plan
from realign.repair.request import Inputs


@dataclass(frozen=True, eq=False)
class Cut:
    """Some rows of a tensor, not read yet."""

    pair: TensorPair
    start: int
    """First row of dim 0 that the piece covers."""
    stop: int
    shape: tuple[int, ...]
    """Of the whole tensor."""
    roles: tuple[str, ...]
    """What is read; only the fine-tune where the rows are copied."""
    edit: bool
    """Whether the rows are edited or copied."""
    cost: int
    """Bytes that the piece holds at its worst, until it is written."""
    slots: tuple[Slot, ...] = ()
    """The logical matrices in it, for methods that work on matrices."""
    last: bool = False
    """Nothing of the tensor is left to edit after this piece."""
    chunk: Chunk | None = None
    """What is read where no matrices are."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a tensor with what is needed to write them."""

    cut: Cut
    tensors: Mapping[str, Tensor]
    """As stored, by role."""


def cut_tensor(pair: TensorPair, plan: Plan, inputs: Inputs) -> Iterator[Cut]:
    """The pieces of one tensor, in the order of its rows, without gap or overlap."""
    info = inputs.finetuned.tensors[pair.role.name]
    total = info.shape[0] if info.shape else 1
    at = 0
    if pair.action == "edit":
        roles = ("finetuned", *plan.roles)
        common = total if pair.common_rows is None else pair.common_rows
        if plan.by_entries(pair):
            yield from _chunks(pair, inputs, 0, common, roles=roles)
            at = common
        else:
            shape = (common, *info.shape[1:])
            grouped = groupby(pair.slots, key=lambda slot: stored_rows(slot, shape))
            for (start, stop), group in grouped:
                slots = tuple(group)
                assert start >= at, f"{slots[0].key} overlaps another block of its tensor"
                yield from _chunks(pair, inputs, at, start)
                cost = block_bytes(
                    info,
                    (start, stop),
                    slots,
                    inputs=len(roles),
                    rank=fixed_rank(plan.method),
                    own=plan.method.edit_bytes,
                )
                yield Cut(pair, start, stop, info.shape, roles, edit=True, cost=cost, slots=slots)
                at = stop
    yield from _chunks(pair, inputs, at, total)


def _chunks(
    pair: TensorPair, inputs: Inputs, start: int, stop: int, *, roles: tuple[str, ...] = ()
) -> Iterator[Cut]:
    """Rows that are copied, or edited entry by entry where `roles` are given."""
    name, read = pair.role.name, roles or ("finetuned",)
    info, checkpoints = inputs.finetuned.tensors[name], inputs.all()
    used = [(checkpoints[role], name) for role in read]
    for chunk in chunks_of(used, nbytes=STREAM_BYTES, rows=(start, stop)):
        at_end = chunk.within is None or chunk.within[1] == info.shape[1]
        yield Cut(
            pair,
            chunk.start,
            chunk.stop,
            info.shape,
            read,
            edit=bool(roles),
            cost=info.nbytes * chunk.numel // max(1, info.numel) * (len(read) + 1),
            chunk=chunk,
            last=at_end and chunk.stop == stop,
        )


def batched(cuts: Iterable[Cut], count: int, *, limit: int) -> Iterator[tuple[Cut, ...]]:
    """Neighbouring cuts with matrices of one shape together, all others alone; the order stays.

    Args:
        cuts: in order.
        count: how many go together at most; 1: none do.
        limit: what those that go together may cost at most, in bytes.
    """
    together: list[Cut] = []
    for cut in cuts:
        fits = (
            together
            and cut.slots
            and len(together) < count
            and _shape(cut) == _shape(together[0])
            and cut.cost + sum(each.cost for each in together) <= limit
        )
        if together and not fits:
            yield tuple(together)
            together = []
        together.append(cut)
    if together:
        yield tuple(together)


def _shape(cut: Cut) -> tuple[int, ...] | None:
    """What decides whether matrices can be worked on in one call; None: they cannot."""
    if not cut.slots:
        return None
    rows = cut.stop - cut.start
    return (rows, *cut.shape[1:], len(cut.slots))


def planned_keys(plan: Plan) -> tuple[str, ...]:
    """The keys of all rows that the report of this plan must hold."""
    return tuple(
        key
        for pair in plan.edits
        for key in (
            [pair.role.name] if plan.by_entries(pair) else [slot.key for slot in pair.slots]
        )
    )


def read_cut(cut: Cut, checkpoints: Mapping[str, Checkpoint]) -> Piece:
    """Read the rows of a cut in every checkpoint that it names."""
    name = cut.pair.role.name

    def read(checkpoint: Checkpoint) -> Tensor:
        if cut.chunk is not None:
            return read_chunk(checkpoint, name, cut.chunk)
        return read_rows(checkpoint, name, (cut.start, cut.stop))

    return Piece(cut, {role: read(checkpoints[role]) for role in cut.roles})


def read_slot(checkpoint: Checkpoint, slot: Slot) -> Tensor:
    """The stored rows in which a logical matrix lies."""
    shape = checkpoint.tensors[slot.tensor].shape
    return read_rows(checkpoint, slot.tensor, stored_rows(slot, shape))
