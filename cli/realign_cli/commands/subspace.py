"""`realign subspace`: decompose the alignment vector of a family once; measure fine-tunes on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer

from realign.errors import OutputError, UsageError
from realign_cli.command import Example, command
from realign_cli.imports import swift_imports
from realign_cli.options import Base, Device, Offline, checkpoint_option
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from rich.table import Table

    from realign.audit.subspace_file import SubspaceRow

EXAMPLES = (
    Example(
        "realign subspace org/model-instruct --base org/model \\\n    -o safety.safetensors",
        "the leading 32 directions of every matrix",
    ),
    Example(
        "realign subspace ./aligned --base ./base --rank entropy \\\n    -o safety.safetensors",
        "as many directions as the entropy rule keeps",
    ),
    Example(
        "realign subspace ./tuned --measure safety.safetensors \\\n    --reference ./aligned",
        "what a fine-tune did to these directions",
    ),
)

NOTES = """
The alignment vector a = W_aligned - W_base belongs to the model family, not to any fine-tune. The
file holds U_k, S_k and V_k of every matrix in float32 and, in its metadata, the commits and digests
of both checkpoints, the rank rule, and per matrix its entropy and ranks. A picture of rank and
entropy per layer is written beside it.

With --measure the model is a fine-tune of the family, and nothing is written: one pass over it and
its reference, without the base, gives its relative distance, the share of its task vector inside
the subspace (energy; excess over chance) and retained_k, which is 1 where alignment is as it was
within these directions and 0 where it is undone. The numbers are not validated and decide nothing.
"""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "subspace", examples=EXAMPLES, notes=NOTES)(subspace)


def subspace(
    sink: Sink,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The aligned model; with --measure, a fine-tune."),
    ],
    *,
    base: Base = None,
    measure: Annotated[
        Path | None,
        typer.Option(
            "--measure", metavar="FILE", help="Measure MODEL against this subspace file instead."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        checkpoint_option(
            "--reference",
            help="With --measure: the aligned model; as recorded in the file by default.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The file to write (safetensors)."),
    ] = None,
    rank: Annotated[
        str,
        typer.Option(
            "--rank", metavar="RULE", help="Directions kept: a number, stable, energy or entropy."
        ),
    ] = "32",
    eta: Annotated[
        float,
        typer.Option("--eta", metavar="E", help="Threshold of the rules energy and entropy."),
    ] = 0.85,
    picture: Annotated[
        str, typer.Option("--picture", metavar="KIND", help="png, svg or none.")
    ] = "png",
    device: Device = "auto",
    offline: Offline = False,
) -> int | None:
    """Write the safety subspace of a model family, or measure a fine-tune against one."""
    if measure is not None:
        if base is not None or out is not None:
            raise UsageError(
                "--measure needs no base and writes no file", "leave --base and --out out"
            )
        from realign_cli.family_scan import measure_subject

        return measure_subject(sink, model, measure, reference=reference, offline=offline)
    if base is None or out is None or reference is not None:
        raise UsageError(
            "a subspace file needs --base and --out; --reference belongs to --measure",
            "realign subspace ALIGNED --base BASE -o FILE",
        )
    if picture not in ("png", "svg", "none"):
        raise UsageError(f"there is no picture kind {picture!r}", "kinds: png, svg, none")
    drawing = out.with_suffix(f".{picture}")
    if picture != "none" and drawing == out:
        raise UsageError(
            f"{out} would be the subspace file and its picture",
            "choose another -o, as X.safetensors",
        )
    if out.exists():
        raise OutputError(f"{out} exists already", "choose another -o, or remove it first")
    if picture != "none" and drawing.exists():
        raise OutputError(f"{drawing} exists already", "remove it, or use --picture none")

    with swift_imports():
        from realign.repair.subspace_file import SubspaceRequest, write_subspace

    request = SubspaceRequest(
        aligned=model,
        base=base,
        output=out,
        rank=int(rank) if rank.lstrip("+-").isdigit() else rank,
        eta=eta,
        device=device,
        offline=offline,
    )
    written = write_subspace(request, progress=sink.progress)
    rows = tuple(written.rows.values())
    if picture != "none":
        try:
            _draw(rows, drawing, eta=eta)
        except BaseException:
            # Both or none: the message will say that nothing was committed.
            out.unlink(missing_ok=True)
            drawing.unlink(missing_ok=True)
            raise
    sink.document(
        {
            "file": str(out),
            "picture": None if picture == "none" else str(drawing),
            "rank_rule": written.rank_rule,
            "aligned": asdict(written.aligned),
            "base": asdict(written.base),
            "matrices": [asdict(row) for row in rows],
        }
    )
    sink.show(_table(rows, eta=eta), "")
    sink.line(str(out))
    if picture != "none":
        sink.line(str(drawing))
    return None


def _draw(rows: Sequence[SubspaceRow], file: Path, *, eta: float) -> None:
    from realign.report.pictures import Line, Panel, layer_panels, save

    def lines(name: str) -> tuple[Line, ...]:
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row.layer is not None:
                curves.setdefault(row.module, []).append((row.layer, _value(row, name)))
        return tuple(Line(key, tuple(sorted(points))) for key, points in curves.items())

    save(
        layer_panels(
            [
                Panel(f"entropy rank at eta {eta:g}", lines("entropy_rank")),
                Panel("entropy H (nats)", lines("entropy")),
                Panel("stable rank", lines("stable_rank")),
                Panel("energy in the directions kept", lines("kept_energy")),
            ]
        ),
        file,
    )


def _table(rows: Sequence[SubspaceRow], *, eta: float) -> Table:
    from realign.report.tables import plain_table

    titles = ("layer", "matrices", "kept", f"rank({eta:g})", "entropy", "stable rank", "energy")
    table = plain_table("The alignment vector, layer by layer (means over matrices)", right=titles)
    layers: dict[int | None, list[SubspaceRow]] = {}
    for row in rows:
        layers.setdefault(row.layer, []).append(row)

    def mean(members: Iterable[SubspaceRow], name: str, digits: int) -> str:
        return f"{fmean(_value(row, name) for row in members):.{digits}f}"

    for layer, members in layers.items():
        table.add_row(
            str(layer),
            str(len(members)),
            mean(members, "rank", 1),
            mean(members, "entropy_rank", 1),
            mean(members, "entropy", 2),
            mean(members, "stable_rank", 1),
            mean(members, "kept_energy", 3),
        )
    return table


def _value(row: SubspaceRow, name: str) -> float:
    """Return a field of the row or one of its facts; 0 where there is no vector to speak of."""
    value = getattr(row, name) if hasattr(row, name) else row.facts.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
