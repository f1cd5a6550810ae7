"""`realign verify`: is a folder still what realign wrote?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realign_cli.command import Example, command
from realign_cli.imports import swift_imports
from realign_cli.sink import Sink

EXAMPLES = (
    Example("realign verify ./repaired", "after a copy, a download or an interrupted run"),
    Example("realign verify ./repaired --json | jq '.problems[].where'", "the files to copy again"),
)

NOTES = """
A repair leaves `realign.json` beside the weights. `verify` reads every byte that it lists once and
checks

- the SHA-256 of every file: weights, index, config, tokenizer, templates;
- the list of tensors, with type and shape;
- that every floating-point number is finite (buffers may hold infinity: stored masks do);
- that the index leads to every tensor where it is;
- that nothing was added which a loader takes up by its name: weights in any format, configs,
  tokenizer files, chat templates, code, links to folders. A model card, an audit report or a
  picture may be added.

It works on repaired checkpoints and on LoRA patches (`realign repair --patch`). The manifest itself
is trusted: who can rewrite it can rewrite the hashes in it, so compare it with a copy of your own
where that matters.

Exit codes: 0 intact; 1 problems, one line each; 2 not verifiable (no folder, no manifest, an
unfinished repair).
"""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "verify", examples=EXAMPLES, notes=NOTES)(verify)


def verify(
    sink: Sink,
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="What realign repair wrote.", show_default=False),
    ],
) -> int | None:
    """Check a repaired checkpoint or a LoRA patch against its manifest: is it intact?"""
    with swift_imports():
        from realign.checkpoint.space import size_text
        from realign.checkpoint.verification import verify_output

    report = verify_output(folder, sink.progress)
    sink.document(report.to_json())
    if report.intact:
        sink.line(
            f"intact: {folder} ({report.kind}, {report.checked} files, {report.tensors} tensors, "
            f"{size_text(report.nbytes)})"
        )
        return 0
    for problem in report.problems:
        sink.line(f"{problem}: {problem.advice}")
    count = len(report.problems)
    sink.line(f"not intact: {folder} ({count} problem{'' if count == 1 else 's'})")
    return 1
