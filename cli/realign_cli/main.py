"""The entry point of the `realign` command: the application and its commands.

Importing this module must stay fast: command modules import torch and the like when they run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from realign._version import __version__
from realign_cli.command import FLAG, Example, HelpOption, epilog
from realign_cli.commands import (
    audit,
    demo,
    diff,
    lab,
    methods,
    patch,
    repair,
    subspace,
    tune,
    unalign,
    verify,
)
from realign_cli.errors import report
from realign_cli.imports import leave_the_rest
from realign_cli.sink import Sink

_INTERRUPTED_WHILE_PARSING = 130

EXAMPLES = (
    Example("realign demo", "start here: the whole story on a small family, in minutes"),
    Example(
        "realign repair ./my-model --aligned org/instruct --base org/base \\\n"
        "    --method replace --set rank=8 -o ./repaired",
        "put back what a fine-tune took",
    ),
    Example(
        "realign audit ./my-model --reference org/instruct \\\n"
        "    --repaired ./repaired --suite harmful=harmful.jsonl -o ./audit",
        "measure what the repair did",
    ),
)

app = typer.Typer(
    name="realign",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    add_help_option=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(
    epilog=epilog(
        EXAMPLES,
        after="Exit codes: 0 done and within policy; 1 a gate failed or is inconclusive,\n"
        "or an edit that changed nothing; 2 could not complete.",
    )
)
def root(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=FLAG,
            help="Show the version and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
    _help: HelpOption = False,
) -> None:
    """Repair and audit fine-tuned language models that lost their safety training."""


for _module in (demo, repair, unalign, tune, verify, diff, audit, subspace, methods):
    _module.join(app)
app.add_typer(patch.group, name="patch")
app.add_typer(lab.group, name="lab")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: what follows `realign`; None takes the process's own.
    """
    try:
        code = app(args=arguments, prog_name="realign", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        return report(error, Sink().fail)
    if code == _INTERRUPTED_WHILE_PARSING:
        return report(KeyboardInterrupt(), Sink().fail)
    return int(code or 0)


def main() -> None:
    """Run the command line."""
    code = run()
    leave_the_rest()
    sys.exit(code)
