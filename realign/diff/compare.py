"""What changed between two checkpoints, tensor by tensor, with sums per layer and module.

Here: the order of things. Not here: the result (`result`), pairing (`pairs`), reading in step
(`reading`), sums (`terms`), decompositions (`spectra`), small files (`files`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from realign.checkpoint.layouts import conform
from realign.checkpoint.reader import Checkpoint
from realign.diff.files import compare_files
from realign.diff.pairs import Pair, pair_tensors, require_one_architecture
from realign.diff.reading import PIECE_BYTES, measure_pieces
from realign.diff.result import Difference, Row, Side, Spectra
from realign.diff.spectra import MatrixSpectrum, matrices_of, spectra_of_change
from realign.diff.terms import Terms
from realign.progress import SILENT, Progress

SMALL = 256
"""Matrices whose smaller side is at most this long are decomposed without being asked for."""


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    reference: Checkpoint | None = None,
    spectra: Spectra = "small",
    directions: int = 8,
    only: Sequence[str] = (),
    piece_bytes: int = PIECE_BYTES,
    progress: Progress = SILENT,
) -> Difference:
    """Compare two checkpoints tensor by tensor.

    Memory holds a few pieces of each checkpoint; for spectra one logical matrix of each and a
    square of its smaller side in float64.

    Args:
        a: the first checkpoint; relative change is relative to it.
        b: the second.
        reference: a third one R, usually an ancestor of A: also give cos(B - A, A - R), over the
            tensors that R holds in A's shape (or with more rows of a vocabulary).
        spectra: decompose the change of every matrix, of none, or of those whose smaller side is
            at most 256.
        directions: singular values to keep of each.
        only: patterns of tensor names with * and ?; empty takes all.
        piece_bytes: about so much of one tensor is read at a time.
        progress: shows bytes compared.

    Raises:
        MismatchError: the configs name different architectures; names the key and both values.
        UsageError: no tensor is named like `only`.
        HeaderError: a file ended early.
    """
    require_one_architecture(a, b)
    shown = conform(b, a)  # fused as A is fused, split as A is split
    ancestor = reference
    if reference is not None:
        require_one_architecture(a, reference)
        ancestor = conform(reference, a)
    pairs = pair_tensors(a, shown, only=only)
    terms = _measure(pairs, a, shown, ancestor, piece_bytes, progress)
    rows = [_row(pair, terms.get(pair.name)) for pair in pairs]
    if spectra != "none":
        rows = _with_spectra(
            rows, a, shown, SMALL if spectra == "small" else None, directions, progress
        )
    return Difference(
        a=Side.of(a),
        b=Side.of(b),
        reference=None if reference is None else Side.of(reference),
        rows=tuple(rows),
        files=compare_files(a, b),
        spectra=spectra,
        only=tuple(only),
        remarks=tuple(
            dict.fromkeys((*_remarks(a, shown, rows), *_reference_remarks(ancestor, rows)))
        ),
    )


def _measure(
    pairs: Sequence[Pair],
    a: Checkpoint,
    b: Checkpoint,
    reference: Checkpoint | None,
    piece_bytes: int,
    progress: Progress,
) -> dict[str, Terms]:
    found: dict[str, Terms] = {}
    total = sum(
        pair.a.nbytes + pair.b.nbytes
        for pair in pairs
        if pair.a is not None and pair.b is not None and pair.comparable
    )
    with progress.task("comparing", total=total, unit="B") as task:
        for pair, terms, nbytes in measure_pieces(
            pairs, a, b, reference=reference, piece_bytes=piece_bytes
        ):
            found[pair.name] = found.get(pair.name, Terms()) + terms
            task.advance(nbytes)
    return found


def _row(pair: Pair, terms: Terms | None) -> Row:
    a, b = pair.a, pair.b
    return Row(
        name=pair.name,
        kind=pair.role.kind,
        module=pair.role.module,
        layer=pair.role.layer,
        status=pair.status(changed=0 if terms is None else terms.changed),
        name_a=None if a is None else a.name,
        name_b=None if b is None else b.name,
        shape_a=None if a is None else a.shape,
        shape_b=None if b is None else b.shape,
        dtype_a=None if a is None else a.dtype,
        dtype_b=None if b is None else b.dtype,
        rows_compared=pair.rows,
        terms=terms,
    )


def _with_spectra(
    rows: Sequence[Row],
    a: Checkpoint,
    b: Checkpoint,
    widest: int | None,
    directions: int,
    progress: Progress,
) -> list[Row]:
    wanted = {
        row.name: matrices_of(a, row.name, widest=widest)
        for row in rows
        if row.terms is not None
        and row.terms.finite
        and row.terms.delta > 0.0
        and row.floating
        and row.shape_a == row.shape_b
        and row.name_a == row.name_b
    }
    slots = [slot for row in rows for slot in wanted.get(row.name, ())]
    found: dict[str, list[MatrixSpectrum]] = {}
    with progress.task("decomposing", total=len(slots), unit="matrices") as task:
        spectra = spectra_of_change(a, b, slots, directions=directions)
        for slot, spectrum in zip(slots, spectra, strict=True):
            found.setdefault(slot.tensor, []).append(spectrum)
            task.advance()
    return [replace(row, spectra=tuple(found.get(row.name, ()))) for row in rows]


def _remarks(a: Checkpoint, b: Checkpoint, rows: Sequence[Row]) -> Iterator[str]:
    yield from a.remarks
    yield from b.remarks
    for row in rows:
        if row.name_a and row.name_b and row.name_a != row.name_b:
            tied, side = (row.name_a, "A") if row.name_b == row.name else (row.name_b, "B")
            yield f"{row.name} is compared with {tied}, to which {side} ties its head"
        if row.rows_compared is not None:
            yield f"{row.name}: the first {row.rows_compared} rows are compared"
        if row.terms is not None and not row.terms.finite:
            yield f"{row.name} holds NaN or infinity: left out of the sums"


def _reference_remarks(reference: Checkpoint | None, rows: Iterable[Row]) -> Iterator[str]:
    """What the cosines with the reference leave out."""
    if reference is None:
        return
    yield from reference.remarks
    missing: list[str] = []
    for row in rows:
        if not (row.floating and row.terms and row.terms.finite):
            continue
        if not row.terms.reference_finite:
            yield f"{row.name} holds NaN or infinity in the reference: left out of its cosines"
        elif row.terms.reference_entries < row.terms.entries:
            missing.append(row.name)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        yield (
            f"{missing[0]}{more}: no counterpart that fits in the reference, left out "
            "of its cosines"
        )
