"""What changed between two checkpoints, tensor by tensor, with sums per layer and module.

Here: the order of things and the result as data. Not here: pairing (`pairs`), reading in step
(`reading`), sums (`terms`), decompositions (`spectra`), small files (`files`), tables and pictures
(the report room).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from realign._version import __version__
from realign.checkpoint.headers import FLOATS
from realign.checkpoint.layouts import conform
from realign.checkpoint.reader import Checkpoint
from realign.diff.files import FileChange, compare_files
from realign.diff.pairs import Pair, Status, pair_tensors, require_one_architecture
from realign.diff.reading import PIECE_BYTES, measure_pieces
from realign.diff.spectra import MatrixSpectrum, matrices_of, spectra_of_change
from realign.diff.terms import Figures, Terms
from realign.progress import SILENT, Progress

DIFF_SCHEMA = "realign/diff/1"
SMALL = 256
"""Matrices whose smaller side is at most this long are decomposed without being asked for."""

Spectra = Literal["small", "all", "none"]


@dataclass(frozen=True)
class Side:
    """One of the checkpoints."""

    source: str
    commit: str | None
    kind: Literal["full", "adapter"]
    tensors: int
    parameters: int

    @staticmethod
    def of(checkpoint: Checkpoint) -> Side:
        """Describe a checkpoint."""
        return Side(
            source=checkpoint.source,
            commit=checkpoint.commit,
            kind=checkpoint.kind,
            tensors=len(checkpoint.tensors),
            parameters=sum(info.numel for info in checkpoint.tensors.values()),
        )


@dataclass(frozen=True)
class Row:
    """What is to be said of one tensor."""

    name: str
    kind: str
    """The kind of tensor: "block_linear", "embedding", "norm", ..."""
    module: str
    layer: int | None
    status: Status
    name_a: str | None
    """A's name for it: that of the embeddings, where A ties its head to them."""
    name_b: str | None
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    dtype_a: str | None
    dtype_b: str | None
    rows_compared: int | None
    """Leading rows, where the vocabulary was extended."""
    terms: Terms | None
    """None where nothing could be compared."""
    spectra: tuple[MatrixSpectrum, ...] = ()

    @property
    def figures(self) -> Figures | None:
        """The figures; None where nothing could be compared."""
        return None if self.terms is None else self.terms.figures()

    @property
    def floating(self) -> bool:
        """Whether both sides hold floating-point numbers."""
        return self.dtype_a in FLOATS and self.dtype_b in FLOATS

    def to_json(self) -> dict[str, Any]:
        """The row as JSON."""
        figures = self.figures
        return {
            "name": self.name,
            "name_a": self.name_a,
            "name_b": self.name_b,
            "kind": self.kind,
            "module": self.module,
            "layer": self.layer,
            "status": self.status,
            "shape_a": None if self.shape_a is None else list(self.shape_a),
            "shape_b": None if self.shape_b is None else list(self.shape_b),
            "dtype_a": self.dtype_a,
            "dtype_b": self.dtype_b,
            "rows_compared": self.rows_compared,
            "figures": None if figures is None else asdict(figures),
            "spectra": [each.to_json() for each in self.spectra],
        }


@dataclass(frozen=True)
class Group:
    """The floating-point tensors of a layer, of a module kind, or of all, as one long vector."""

    key: str
    tensors: int
    changed: int
    """Tensors that are not identical."""
    figures: Figures

    def to_json(self) -> dict[str, Any]:
        """The group as JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """The comparison of two checkpoints."""

    a: Side
    b: Side
    reference: Side | None
    rows: tuple[Row, ...]
    files: tuple[FileChange, ...]
    """Small files that differ."""
    spectra: Spectra
    only: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def same_weights(self) -> bool:
        """Whether every tensor is identical."""
        return all(row.status == "identical" for row in self.rows)

    @property
    def identical(self) -> bool:
        """Whether nothing differs: no tensor, no config, no tokenizer file."""
        return self.same_weights and not self.files

    @property
    def counts(self) -> dict[Status, int]:
        """Tensors by status."""
        found: dict[Status, int] = {}
        for row in self.rows:
            found[row.status] = found.get(row.status, 0) + 1
        return found

    @property
    def total(self) -> Group:
        """All tensors together."""
        return _group("total", self.rows)

    @property
    def layers(self) -> tuple[Group, ...]:
        """One group per decoder block."""
        layers = sorted({row.layer for row in self.rows if row.layer is not None})
        return tuple(
            _group(str(layer), [row for row in self.rows if row.layer == layer]) for layer in layers
        )

    @property
    def modules(self) -> tuple[Group, ...]:
        """One group per kind of module, over all layers."""
        modules = dict.fromkeys(row.module for row in self.rows)
        return tuple(
            _group(module, [row for row in self.rows if row.module == module]) for module in modules
        )

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON, schema realign/diff/1."""
        return {
            "schema": DIFF_SCHEMA,
            "version": __version__,
            "a": asdict(self.a),
            "b": asdict(self.b),
            "reference": None if self.reference is None else asdict(self.reference),
            "identical": self.identical,
            "same_weights": self.same_weights,
            "only": list(self.only),
            "counts": dict(self.counts),
            "total": self.total.to_json(),
            "layers": [group.to_json() for group in self.layers],
            "modules": [group.to_json() for group in self.modules],
            "tensors": [row.to_json() for row in self.rows],
            "spectra": self.spectra,
            "files": [change.to_json() for change in self.files],
            "remarks": list(self.remarks),
        }


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
        reference: a third one R, usually an ancestor of A: also give cos(B - A, A - R).
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
        remarks=tuple(dict.fromkeys(_remarks(a, shown, rows))),
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


def _group(key: str, rows: Iterable[Row]) -> Group:
    members = [row for row in rows if row.floating and row.terms and row.terms.finite]
    total = sum((row.terms for row in members if row.terms is not None), start=Terms())
    changed = sum(row.status != "identical" for row in members)
    return Group(key, len(members), changed, total.figures())
