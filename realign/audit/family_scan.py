"""A further fine-tune of a known family, measured by one pass over it and its reference.

The subspace file of the family stands for the base, which is not read: what alignment wrote is
known from it. Subject and reference pass by in chunks of rows, a few at a time.
A screening signal, not validated, never a safety verdict.

Here: which tensors are compared, reading them once each, the tables. Not here: the sums
(`realign.subspace.family`) and the file (`subspace_file`).
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from realign.audit.subspace_file import SubspaceFile, SubspaceRow
from realign.audit.weights import MOST_UNMATCHED, NORM, NOT_VALIDATED
from realign.checkpoint.headers import FLOATS, TensorInfo
from realign.checkpoint.layouts import conform
from realign.checkpoint.matching import check_architecture
from realign.checkpoint.names import TensorRole, classify
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot, logical_matrix, slot_shape, slots_of, stored_rows
from realign.errors import MismatchError, NonFiniteError
from realign.progress import SILENT, Progress
from realign.subspace.family import (
    FEWEST_ROWS,
    BlockSums,
    FamilyMeter,
    FamilyMetrics,
    FamilyTerms,
    Scratch,
    merge_family,
)
from realign.subspace.threads import torch_threads

CHUNK_BYTES = 8 * 2**20
"""Bytes of a tensor in each checkpoint that one thread works on before its sums are taken."""
READ_BYTES = 2**20
"""Bytes read at once from each checkpoint: they are still in the cache when they are used."""
MOST_WORKERS = 4
"""Threads that read and compute: a few keep pace with a fast disk."""
SAME_NORM = 1e-6
"""Relative difference of norms above which a reference is not the one that was decomposed."""
_VOCABULARY = {"embedding": "embed", "head": "head"}


@dataclass(frozen=True)
class FamilyRow:
    """One matrix, or a norm or bias, which counts in the distance alone."""

    key: str
    module: str
    """Last module name; "norm" for norms and biases, "embed" and "head" for vocabularies."""
    layer: int | None
    terms: FamilyTerms


@dataclass(frozen=True)
class FamilyScan:
    """What one pass over subject and reference says about a fine-tune."""

    line: str
    """Goes with every number: it is not validated."""
    total: FamilyMetrics | None
    """Over all matrices, norms and biases; vocabularies stand apart."""
    total_reason: str | None
    """Why there is no total."""
    per_module: Mapping[str, FamilyMetrics]
    per_layer: Mapping[int, FamilyMetrics]
    rows: tuple[FamilyRow, ...]
    skipped: tuple[str, ...]
    unmatched: tuple[str, ...]


@dataclass(frozen=True)
class _Chunk:
    """Stored rows [start, stop) of one tensor, in both checkpoints."""

    role: TensorRole
    start: int
    stop: int
    last: bool


@dataclass(frozen=True, eq=False)
class _Part:
    """The part of one matrix that lies in a chunk."""

    slot: Slot
    meter: FamilyMeter
    low: int
    """Stored rows [low, high)."""
    high: int
    row: int
    """Where it begins in the matrix."""
    column: int
    width: int | None
    """Its columns, where it does not have all of them."""
    last: bool
    """Nothing of the matrix comes after it."""


def scan_family(
    file: SubspaceFile,
    *,
    reference: Checkpoint,
    subject: Checkpoint,
    progress: Progress = SILENT,
) -> FamilyScan:
    """Measure a subject against its reference and the family's alignment subspace.

    Every tensor of both is read once; the base is not needed. Memory is a few chunks and the
    factors of one tensor, whatever the size of the model.

    Args:
        file: of the family, made from the reference.
        reference: the aligned model that the file was made from.
        subject: a fine-tune of it, in any layout.
        progress: counts bytes.

    Raises:
        MismatchError: the reference is not the file's: another commit, or other weights; or the
            subject is of another architecture or size, or has none of the file's matrices.
        NonFiniteError: a tensor holds NaN or infinity; names it.
    """
    _check_commit(file, reference)
    check_architecture(subject, "reference", reference)
    subject = conform(subject, reference)
    skipped: list[str] = []
    unmatched: list[str] = []
    compared: list[TensorRole] = []
    for role in classify(reference).values():
        if not _matches(role, reference, subject):
            unmatched.append(role.name)
        elif role.kind in ("router", "buffer", "other"):
            skipped.append(f"{role.name}: {role.kind}")
        else:
            compared.append(role)
    unmatched += sorted(set(subject.tensors) - set(reference.tensors))
    _require_some(file, reference, subject, compared, unmatched)
    rows = _measure(file, reference, subject, compared, progress)
    unknown = [key for key in file.rows if key not in {row.key for row in rows}]
    unmatched += [key for key in unknown if file.rows[key].tensor not in unmatched]
    return _tables(rows, skipped, unmatched, reference, subject)


def _measure(
    file: SubspaceFile,
    reference: Checkpoint,
    subject: Checkpoint,
    compared: Sequence[TensorRole],
    progress: Progress,
) -> list[FamilyRow]:
    rows: list[FamilyRow] = []
    chunks = [chunk for role in compared for chunk in _chunks(role, reference, subject)]
    total = sum(2 * _nbytes(chunk, reference) for chunk in chunks)
    scratch = Scratch()

    def work(chunk: _Chunk, parts: Sequence[_Part]) -> list[BlockSums]:
        sums = [part.meter.block(part.width, scratch) for part in parts]
        for rows in _pieces(chunk, reference):
            ref, sub = (_read(each, chunk.role.name, rows) for each in (reference, subject))
            for part, block in zip(parts, sums, strict=True):
                _add(block, part, chunk, rows, (ref, sub))
        return sums

    with progress.task("scanning", total=total, unit="B") as task:
        planned = _planned(file, chunks, reference)
        for (chunk, parts), found in _some_ahead(planned, work):
            for part, sums in zip(parts, found, strict=True):
                part.meter.take(sums, column=part.column)
                if part.last:
                    terms = part.meter.terms()
                    slot = part.slot
                    rows.append(FamilyRow(slot.key, _module(chunk.role, slot), slot.layer, terms))
                    _require_finite(rows[-1], reference, subject)
                    _require_same(file.rows.get(slot.key), rows[-1], file, reference)
            task.advance(2 * _nbytes(chunk, reference))
    return rows


def _planned(
    file: SubspaceFile, chunks: Iterable[_Chunk], reference: Checkpoint
) -> Iterator[tuple[_Chunk, list[_Part]]]:
    """What each chunk holds; the factors of a matrix are read when its first rows come up."""
    meters: dict[str, FamilyMeter] = {}
    for chunk in chunks:
        parts: list[_Part] = []
        for slot, (start, stop) in _slots(chunk.role, reference):
            low, high = max(start, chunk.start), min(stop, chunk.stop)
            if low >= high:
                continue
            meter = meters.pop(slot.key, None) or _meter(file, slot, chunk.role, reference)
            last = stop <= chunk.stop or chunk.last
            if not last:
                meters[slot.key] = meter
            at = 0 if slot.expert is not None else low - start
            row, column = (0, at) if slot.transposed else (at, 0)
            width = high - low if slot.transposed and slot.expert is None else None
            parts.append(_Part(slot, meter, low, high, row, column, width, last=last))
        yield chunk, parts


def _some_ahead(
    planned: Iterable[tuple[_Chunk, list[_Part]]],
    work: Callable[[_Chunk, Sequence[_Part]], list[BlockSums]],
) -> Iterator[tuple[tuple[_Chunk, list[_Part]], list[BlockSums]]]:
    """Read and work on a few chunks at once; results come in the order of the chunks."""
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    with (
        torch_threads(1),
        ThreadPoolExecutor(workers, thread_name_prefix="realign-scan") as pool,
    ):
        waiting: deque[tuple[tuple[_Chunk, list[_Part]], Future[list[BlockSums]]]] = deque()
        try:
            for each in planned:
                waiting.append((each, pool.submit(work, *each)))
                if len(waiting) > 2 * workers:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _pieces(chunk: _Chunk, reference: Checkpoint) -> Iterator[tuple[int, int]]:
    """The stored rows of a chunk, as many at once as are read together."""
    info = reference.tensors[chunk.role.name]
    step = _rows(info, READ_BYTES)
    if len(info.shape) == 2:
        step = max(step, FEWEST_ROWS)
    for start in range(chunk.start, chunk.stop, step):
        yield start, min(start + step, chunk.stop)


def _read(checkpoint: Checkpoint, name: str, rows: tuple[int, int]) -> Tensor:
    if not checkpoint.tensors[name].shape:
        return checkpoint.read(name).reshape(1)
    return checkpoint.read(name, rows)


def _add(
    sums: BlockSums,
    part: _Part,
    chunk: _Chunk,
    rows: tuple[int, int],
    both: tuple[Tensor, Tensor],
) -> None:
    """Add what stored rows [start, stop) hold of one matrix to the sums of its part of a chunk."""
    start, stop = rows
    low, high = max(part.low, start), min(part.high, stop)
    if low >= high:
        return
    ref, sub = (each[low - start : high - start] for each in both)
    if not _is_matrix(chunk.role, tuple(ref.shape)):
        sums.add(ref.reshape(1, -1), sub.reshape(1, -1))
        return
    at = low - part.low
    row, column = (0, at) if part.slot.transposed else (at, 0)
    ref, sub = logical_matrix(ref, part.slot), logical_matrix(sub, part.slot)
    sums.add(ref, sub, row=part.row + row, column=column)


def _chunks(role: TensorRole, reference: Checkpoint, subject: Checkpoint) -> Iterator[_Chunk]:
    """The rows that both have; whole experts where they are stacked."""
    info = reference.tensors[role.name]
    there = subject.tensors[role.name].shape
    total = min(info.shape[0], there[0]) if info.shape else 1
    step = _rows(info, CHUNK_BYTES)
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield _Chunk(role, start, stop, last=stop == total)


def _rows(info: TensorInfo, nbytes: int) -> int:
    """How many rows make so many bytes, at least one."""
    row_bytes = info.nbytes // max(1, info.shape[0] if info.shape else 1)
    return max(1, nbytes // max(1, row_bytes))


def _nbytes(chunk: _Chunk, reference: Checkpoint) -> int:
    info = reference.tensors[chunk.role.name]
    return info.nbytes * (chunk.stop - chunk.start) // max(1, info.shape[0] if info.shape else 1)


def _slots(role: TensorRole, reference: Checkpoint) -> Iterator[tuple[Slot, tuple[int, int]]]:
    """The matrices of a tensor, each with the stored rows in which it lies."""
    shape = reference.tensors[role.name].shape
    if role.kind != "block_linear":
        yield Slot(role.name, role.name, role.module, role.layer), (0, shape[0] if shape else 1)
        return
    for slot in slots_of(reference, role.name):
        yield slot, stored_rows(slot, shape)


def _module(role: TensorRole, slot: Slot) -> str:
    if role.kind in ("norm", "bias"):
        return NORM
    return _VOCABULARY.get(role.kind, slot.module)


def _meter(file: SubspaceFile, slot: Slot, role: TensorRole, reference: Checkpoint) -> FamilyMeter:
    shape = reference.tensors[slot.tensor].shape
    if not _is_matrix(role, shape):
        return FamilyMeter(0)
    d_out, d_in = slot_shape(shape, slot)
    known = file.rows.get(slot.key)
    if known is None:
        return FamilyMeter(d_in)
    if known.shape != (d_out, d_in):
        raise _wrong(
            file, reference, f"{slot.key} is {list(known.shape)} in it, not {[d_out, d_in]}"
        )
    return FamilyMeter(d_in, file.triplets(slot.key))


def _is_matrix(role: TensorRole, shape: tuple[int, ...]) -> bool:
    return role.kind not in ("norm", "bias") and len(shape) in (2, 3)


def _matches(role: TensorRole, reference: Checkpoint, subject: Checkpoint) -> bool:
    """Whether the subject has the same tensor; vocabularies may differ in length."""
    here, there = reference.tensors[role.name], subject.tensors.get(role.name)
    if there is None or (here.dtype in FLOATS) != (there.dtype in FLOATS):
        return False
    first = 1 if role.kind in _VOCABULARY else 0
    return len(here.shape) == len(there.shape) and here.shape[first:] == there.shape[first:]


def _check_commit(file: SubspaceFile, reference: Checkpoint) -> None:
    known = file.aligned.commit
    if known is not None and reference.commit is not None and known != reference.commit:
        raise _wrong(
            file, reference, f"it was made from commit {known}, this is commit {reference.commit}"
        )


def _require_some(
    file: SubspaceFile,
    reference: Checkpoint,
    subject: Checkpoint,
    compared: Sequence[TensorRole],
    unmatched: Sequence[str],
) -> None:
    """Without one matrix of the file in both models there is nothing to say."""
    named = {row.tensor for row in file.rows.values()}
    if named & {role.name for role in compared}:
        return
    if not named & set(reference.tensors):
        first = next(iter(sorted(named)), "it names none")
        raise _wrong(file, reference, f"the model has none of its matrices ({first})")
    raise MismatchError(
        f"{subject.source} has none of the {len(file.rows)} matrices of {file.path} in the shapes "
        f"of the reference model {reference.source} (first: {unmatched[0]})",
        f"give a fine-tune of {file.aligned.address}, or the subspace file of its own family",
    )


def _require_same(
    known: SubspaceRow | None, row: FamilyRow, file: SubspaceFile, reference: Checkpoint
) -> None:
    """The file tells norm(W_aligned) of every matrix: the wrong reference is seen at once."""
    if known is None or not known.relative_norm:
        return
    expected, found = known.norm / known.relative_norm, math.sqrt(row.terms.reference)
    if abs(found - expected) > SAME_NORM * expected:
        raise _wrong(
            file, reference, f"norm of {row.key}: {expected:.9g} in it, {found:.9g} in the model"
        )


def _wrong(file: SubspaceFile, reference: Checkpoint, how: str) -> MismatchError:
    return MismatchError(
        f"{file.path} was not made from {reference.source}: {how}",
        f"give the aligned model that it was made from ({file.aligned.address}), or make a "
        "subspace file of this one",
    )


def _require_finite(row: FamilyRow, reference: Checkpoint, subject: Checkpoint) -> None:
    """Sums of squares are finite exactly where all entries are (and do not overflow)."""
    for value, whose in ((row.terms.reference, reference), (row.terms.task, subject)):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{row.key} of {whose.source} holds NaN or infinity",
                "the checkpoint is damaged: copy or train it again",
            )


def _tables(
    rows: Sequence[FamilyRow],
    skipped: Sequence[str],
    unmatched: Sequence[str],
    reference: Checkpoint,
    subject: Checkpoint,
) -> FamilyScan:
    sizes = {
        name: info.numel for each in (reference, subject) for name, info in each.tensors.items()
    }
    share = sum(sizes.get(name, 0) for name in unmatched) / max(1, sum(sizes.values()))
    counted = [row for row in rows if row.module not in _VOCABULARY.values()]
    complete = share <= MOST_UNMATCHED and bool(counted)
    layers = sorted({row.layer for row in counted if row.layer is not None})
    reason = f"{share:.1%} of the parameters do not match by name and shape"
    return FamilyScan(
        line=NOT_VALIDATED,
        total=merge_family(row.terms for row in counted).metrics() if complete else None,
        total_reason=None if complete else reason if unmatched else "there are no matrices",
        per_module={
            name: merge_family(row.terms for row in rows if row.module == name).metrics()
            for name in dict.fromkeys(row.module for row in rows)
        },
        per_layer={
            layer: merge_family(row.terms for row in counted if row.layer == layer).metrics()
            for layer in layers
        },
        rows=tuple(rows),
        skipped=tuple(skipped),
        unmatched=tuple(unmatched),
    )
