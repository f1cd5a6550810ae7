"""`realign patch`: merge, scale and inspect the LoRA patches of `realign repair --patch`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from realign_cli.command import FLAG, Example, HelpOption, command, epilog
from realign_cli.imports import swift_imports
from realign_cli.options import Offline
from realign_cli.sink import Sink

APPLY_EXAMPLES = (
    Example(
        "realign patch apply ./patch --to ./my-model -o ./repaired",
        "merge a patch into the model it was made for",
    ),
    Example(
        "realign patch apply ./patch --to ./my-model --strength 0.5 -o ./half",
        "with half of its edit",
    ),
)
SCALE_EXAMPLES = (
    Example(
        "realign patch scale ./patch --strength 0.5 -o ./half-patch",
        "the same patch at half strength, still an adapter",
    ),
)
INSPECT_EXAMPLES = (
    Example("realign patch inspect ./patch", "what it holds, and whether its model is the one"),
    Example("realign patch inspect ./patch --json", "the same as JSON"),
)

APPLY_NOTES = """
`W(t) = W_f + t B A`: the factors are multiplied and added in float32, and the sum is rounded once
to the type of the model's weights. How much of the edit survives that rounding is shown per layer
and recorded per tensor. The output is an ordinary checkpoint in the layout of the model, with
`realign.json`; it appears as a whole or not at all, and `realign verify` checks it.

A patch that realign wrote records the hashes of the model it was made for. Any other model is
refused, unless `--force` is given, and so is the same patch a second time. Any other LoRA adapter
can be merged as well; which model it belongs to is then not checked.
"""
SCALE_NOTES = """
The factors stay as they are, bit for bit; the dial is `lora_alpha` in the adapter's config, which
peft reads. The strength is that of the repair, whatever the patch had before: scaling to 0.5 and
then to 1 gives the patch as it was made. A repaired adapter also holds the fine-tune's own factors;
there only the repair's part is scaled.
"""
INSPECT_NOTES = """
Norms are those of the product `t B A`, Frobenius. The error is norm(E - patch) / norm(E) of a
matrix whose edit E was truncated with `--max-patch-rank`; exact patches show none.
"""

group = typer.Typer(
    help="Merge, scale and inspect LoRA patches.",
    no_args_is_help=True,
    add_help_option=False,
    epilog=epilog((*APPLY_EXAMPLES[:1], *SCALE_EXAMPLES, *INSPECT_EXAMPLES[:1])),
)

Patch = Annotated[
    str,
    typer.Argument(metavar="PATCH", help="What repair --patch wrote, or any LoRA adapter."),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to write.")]


@group.callback()
def patch_group(*, _help: HelpOption = False) -> None:
    """Merge, scale and inspect LoRA patches."""


@command(group, "apply", examples=APPLY_EXAMPLES, notes=APPLY_NOTES, group="patch")
def apply(
    sink: Sink,
    patch: Patch,
    *,
    to: Annotated[
        str,
        typer.Option("--to", metavar="MODEL", help="The model to merge it into; never changed."),
    ],
    out: Out,
    strength: Annotated[
        float | None,
        typer.Option(
            "--strength",
            "-t",
            metavar="T",
            help="How much of the edit is applied. (default: the patch's own)",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", metavar=FLAG, help="Also to another model than its own, or a second time."
        ),
    ] = False,
    offline: Offline = False,
) -> int | None:
    """Merge a patch into its model and write the checkpoint."""
    with swift_imports():
        from realign.repair.patch_apply import ApplyRequest, apply_patch
        from realign.report.repair import rows_table

    result = apply_patch(
        ApplyRequest(
            patch=patch,
            model=to,
            output=out,
            strength=strength,
            force=force,
            offline=offline,
            command=("realign", *sys.argv[1:]),
        ),
        progress=sink.progress,
    )
    sink.document(
        {
            "output": str(out),
            "strength": result.strength,
            "notes": list(result.notes),
            "manifest": dict(result.manifest),
        }
    )
    sink.show(rows_table(result.rows, title="The patch, layer by layer"), "")
    sink.line(str(out))
    return None


@command(group, "scale", examples=SCALE_EXAMPLES, notes=SCALE_NOTES, group="patch")
def scale(
    sink: Sink,
    patch: Patch,
    *,
    strength: Annotated[
        float,
        typer.Option("--strength", "-t", metavar="T", help="The new dial; 1 is the full repair."),
    ],
    out: Out,
    offline: Offline = False,
) -> int | None:
    """Write the patch with another strength."""
    with swift_imports():
        from realign.repair.patch_file import open_patch
        from realign.repair.patch_scale import scale_patch

    opened = open_patch(patch, offline=offline, progress=sink.progress)
    scale_patch(
        opened,
        out,
        strength=strength,
        command=("realign", *sys.argv[1:]),
        progress=sink.progress,
    )
    sink.document({"output": str(out), "strength": strength, "was": opened.strength})
    sink.line(str(out))
    return None


@command(group, "inspect", examples=INSPECT_EXAMPLES, notes=INSPECT_NOTES, group="patch")
def inspect(sink: Sink, patch: Patch, *, offline: Offline = False) -> int | None:
    """Show what a patch holds and which model it belongs to."""
    with swift_imports():
        from realign.repair.patch_inspect import inspect_patch
        from realign.report.patch import patch_tables

    found = inspect_patch(patch, offline=offline, progress=sink.progress)
    sink.document(found.to_json())
    sink.show(*patch_tables(found))
    return None
