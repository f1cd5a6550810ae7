"""What `realign subspace --measure` does and shows: a fine-tune against its family's subspace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from realign_cli.imports import swift_imports
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from rich.table import Table

    from realign.audit.family_scan import FamilyScan
    from realign.subspace.family import FamilyMetrics


def measure_subject(
    sink: Sink, subject: str, file: Path, *, reference: str | None, offline: bool
) -> int | None:
    """Measure a fine-tune and show it; returns the exit code, None for 0."""
    with swift_imports():
        from realign.audit.family_scan import scan_family
        from realign.audit.subspace_file import read_subspace
        from realign.checkpoint.reader import open_checkpoint

    known = read_subspace(file)
    aligned = known.aligned.address if reference is None else reference
    with (
        open_checkpoint(aligned, offline=offline, progress=sink.progress) as one,
        open_checkpoint(subject, offline=offline, progress=sink.progress) as two,
    ):
        found = scan_family(known, reference=one, subject=two, progress=sink.progress)
    sink.document(
        {
            "file": str(file),
            "reference": aligned,
            "subject": subject,
            "line": found.line,
            "total": None if found.total is None else asdict(found.total),
            "total_reason": found.total_reason,
            "per_module": {name: asdict(each) for name, each in found.per_module.items()},
            "per_layer": {str(index): asdict(each) for index, each in found.per_layer.items()},
            "per_matrix": {row.key: asdict(row.terms.metrics()) for row in found.rows},
            "skipped": list(found.skipped),
            "unmatched": list(found.unmatched),
        }
    )
    sink.show(_table(found), "")
    sink.line(found.line)
    if found.unmatched:
        count, more = len(found.unmatched), "" if len(found.unmatched) == 1 else ", ..."
        sink.note(
            f"not measured, in one of the models only or of another shape: {count} "
            f"tensor{'' if count == 1 else 's'} ({found.unmatched[0]}{more}); --json names all"
        )
    return None


def _table(found: FamilyScan) -> Table:
    from realign.report.tables import plain_table

    table = plain_table(
        "The fine-tune against the alignment subspace of its family",
        left=[""],
        right=["distance", "energy", "excess", "retained_k", "directions"],
    )
    table.caption = found.total_reason
    for name, metrics in _lines(found):
        values = (
            metrics.relative_distance,
            metrics.energy,
            metrics.excess,
            metrics.retained_k,
        )
        cells = ["-" if value is None else f"{value:.4g}" for value in values]
        table.add_row(name, *cells, str(metrics.k) if metrics.known else "-")
    return table


def _lines(found: FamilyScan) -> Iterator[tuple[str, FamilyMetrics]]:
    if found.total is not None:
        yield "all", found.total
    yield from found.per_module.items()
    for layer, metrics in found.per_layer.items():
        yield f"layer {layer}", metrics
