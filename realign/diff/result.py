"""The result of a comparison: a row per tensor, sums over layers, modules and everything.

Here: the data and its JSON. Not here: how it comes about (`compare`), how it is shown (the report
room).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from realign._version import __version__
from realign.checkpoint.headers import FLOATS
from realign.checkpoint.reader import Checkpoint
from realign.diff.files import FileChange
from realign.diff.pairs import Status
from realign.diff.spectra import MatrixSpectrum
from realign.diff.terms import Figures, Terms

DIFF_SCHEMA = "realign/diff/1"

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
    def one_sided(self) -> bool:
        """Whether only one of the checkpoints has it."""
        return self.status in ("only_a", "only_b")

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


def _group(key: str, rows: Iterable[Row]) -> Group:
    members = [row for row in rows if row.floating and row.terms and row.terms.finite]
    total, changed = Terms(), 0
    for row in members:
        if row.terms is not None:
            # One bad tensor of the reference must not take the cosine from all others.
            fits = row.terms.reference_finite
            total += row.terms if fits else row.terms.without_reference()
        changed += row.status != "identical"
    return Group(key, len(members), changed, total.figures())
