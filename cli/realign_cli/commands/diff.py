"""`realign diff`: what changed between two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realign.errors import OutputError, UsageError
from realign_cli.command import FLAG, OUTPUT_PANEL, Example, command
from realign_cli.imports import swift_imports
from realign_cli.options import Offline, checkpoint_option
from realign_cli.sink import Sink

EXAMPLES = (
    Example("realign diff org/instruct ./my-model", "what a fine-tune has moved"),
    Example(
        "realign diff org/instruct ./my-model --spectra \\\n    -o ./difference",
        "with the spectrum of every matrix, as JSON, page and picture",
    ),
    Example(
        'realign diff ./my-model ./repaired \\\n    --only "*.q_proj.*" --sort max --top 40',
        "some tensors, in another order",
    ),
    Example("realign diff ./one ./other --exit-code --quiet", "in a script: exit 1 if they differ"),
)

NOTES = """
Both checkpoints are read piece by piece, so that models larger than memory can be compared. A
checkpoint may be sharded in any way, be an adapter (`MODEL+ADAPTER`, compared merged), or store
its projections fused where the other splits them: the second is then shown in the layout of the
first. Models of different architectures are refused.

Figures of each tensor, in float64: entries that changed (stored bits; values where the dtypes
differ), `norm(A)`, `norm(B)`, `norm(B - A)`, their ratio, the cosine of the weights and the largest
change. Sums over a layer, a kind of module or everything treat its tensors as one long vector.
`--reference R` adds cos(B - A, A - R): does the change go on where the step from R to A went (+1),
or back (-1)?

The spectrum of B - A says in how many directions a matrix moved: its effective rank (exp of the
entropy of the squared singular values), its stable rank and the share of the energy in its largest
singular values. Matrices up to 256 wide are decomposed by default; `--spectra` takes all, which
for wide ones is most of the work.

Configs, generation configs, tokenizer files and chat templates are compared by content, JSON key by
key. Model cards are not compared. Tensors that only one side has are counted in one line per side,
and listed by `--json`. With `--quiet` the result is one line. See [docs/diff.md](../diff.md) for an
example and for the schema of `diff.json`.

Exit codes: 0 compared, whatever was found; with `--exit-code` 1 if anything differs; 2 could not
compare.
"""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "diff", examples=EXAMPLES, notes=NOTES)(diff)


def diff(
    sink: Sink,
    a: Annotated[str, typer.Argument(metavar="A", help="The first checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The second checkpoint.")],
    *,
    reference: Annotated[
        str | None,
        checkpoint_option("--reference", "-r", help="A third one, R: also give cos(B - A, A - R)."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="GLOB", help="Tensors whose names fit, with * and ?. May be repeated."
        ),
    ] = None,
    spectra: Annotated[
        bool | None,
        typer.Option(
            "--spectra/--no-spectra",
            metavar=FLAG,
            help="Decompose the change of every matrix, or of none (default: up to 256 wide).",
            show_default=False,
        ),
    ] = None,
    directions: Annotated[
        int, typer.Option("--directions", metavar="K", help="Singular values kept of each matrix.")
    ] = 8,
    top: Annotated[int, typer.Option("--top", metavar="N", help="Tensors in the table.")] = 15,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            metavar="BY",
            help="relative, norm, max, changed, cosine or file (the order in the checkpoint).",
        ),
    ] = "relative",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Write diff.json, diff.html, diff.png and diff.svg.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code",
            metavar=FLAG,
            help="Exit with 1 if anything differs.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    offline: Offline = False,
) -> int | None:
    """Show what changed between two checkpoints: norms, cosines, spectra, config, tokenizer."""
    with swift_imports():
        from realign.report.diff import ORDERS, Order, diff_tables, summary

    orders: dict[str, Order] = {str(each): each for each in ORDERS}
    if sort not in orders:
        raise UsageError(f"--sort knows no {sort!r}", f"use one of {', '.join(ORDERS)}")
    if top < 0 or directions < 1:
        wrong = f"--top {top}" if top < 0 else f"--directions {directions}"
        raise UsageError(f"{wrong} is too small", "use a positive number")
    if out is not None and out.exists():
        raise OutputError(f"{out} exists already", "choose another folder, or remove it first")

    from realign.api import diff as compare

    found = compare(
        a,
        b,
        reference=reference,
        spectra=spectra,
        directions=directions,
        only=tuple(only or ()),
        offline=offline,
        progress=sink.progress,
    )
    written: tuple[Path, ...] = ()
    if out is not None:
        from realign.report.diff_files import write_diff_files

        local = [Path(each) for each in (a, b, reference) if each and Path(each).is_dir()]
        written = write_diff_files(found, out, inputs=local)
    sink.document(found.to_json())
    if sink.quiet:
        sink.line(summary(found))
    else:
        sink.show(*diff_tables(found, top=top, order=orders[sort], width=sink.out.width))
    for path in written:
        sink.line(str(path))
    return 1 if exit_code and not found.identical else 0
