"""How a command joins the application: its examples, its sink, its errors.

`command(app, "repair", examples=EXAMPLES)` registers a function; the examples feed both `--help`
and docs/commands. A command function takes a `Sink` and its options, and returns an exit code or
None.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from realign_cli.config import load_config
from realign_cli.errors import report
from realign_cli.option_groups import gathering, spread
from realign_cli.sink import Sink

OUTPUT_PANEL = "Output"
FLAG = ""
"""The metavar of an option without a value: typer would print "<bool>"."""


def _show_help(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(context.get_help())
        raise typer.Exit


HelpOption = Annotated[
    bool,
    typer.Option(
        "--help",
        metavar=FLAG,
        help="Show this message and exit.",
        callback=_show_help,
        is_eager=True,
        rich_help_panel=OUTPUT_PANEL,
    ),
]
"""`--help` as an option of our own, so that its line looks like the others."""


@dataclass(frozen=True)
class Example:
    """One line to type, and what it does."""

    line: str
    does: str


@dataclass(frozen=True)
class Page:
    """What the documentation knows about a command beyond its options."""

    name: str
    examples: tuple[Example, ...]
    notes: str


PAGES: dict[str, Page] = {}
"""Filled as the command modules register; read by `pages.py`."""

_COMMON = (
    inspect.Parameter(
        "as_json",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool,
            typer.Option(
                "--json",
                metavar=FLAG,
                help="One JSON document on standard output.",
                rich_help_panel=OUTPUT_PANEL,
            ),
        ],
    ),
    inspect.Parameter(
        "quiet",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[
            bool,
            typer.Option(
                "--quiet",
                "-q",
                metavar=FLAG,
                help="No progress, no remarks.",
                rich_help_panel=OUTPUT_PANEL,
            ),
        ],
    ),
    inspect.Parameter(
        "config",
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[
            Path | None,
            typer.Option(
                "--config",
                metavar="FILE",
                help="Options from a TOML file; an unknown key is an error.",
                callback=load_config,
                is_eager=True,
                rich_help_panel=OUTPUT_PANEL,
            ),
        ],
    ),
    inspect.Parameter(
        "_help",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=HelpOption,
    ),
)


def command(
    app: typer.Typer, name: str, *, examples: Sequence[Example], notes: str = "", group: str = ""
) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Register a function as the command `name` of `app`.

    The function's first parameter is the `Sink`; the others are its typer options, or groups of
    them (`option_groups`). `--json`,
    `--quiet`, `--config` and `--help` are added to every command. Every exception becomes a message
    and an exit code.

    Args:
        app: the application or group to join.
        name: the command's name.
        examples: shown at the end of `--help` and in the documentation.
        notes: Markdown that only the documentation page shows.
        group: the name of the group of commands, for the documentation.
    """

    def register(function: Callable[..., int | None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        _, *given = signature.parameters.values()
        own, gather = spread(given), gathering(given)

        @functools.wraps(function)
        def run(
            *args: Any,
            as_json: bool = False,
            quiet: bool = False,
            config: Path | None = None,
            _help: bool = False,
            **options: Any,
        ) -> None:
            sink = Sink(as_json=as_json, quiet=quiet)
            try:
                code = function(sink, *args, **gather(options)) or 0
            except (typer.Exit, typer.Abort):
                raise
            except (Exception, KeyboardInterrupt) as error:
                code = report(error, sink.fail)
            raise typer.Exit(code)

        parameters = [*own, *_COMMON]
        run.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        del run.__wrapped__  # typer would look through the wrapper and see the sink
        full = f"{group} {name}".strip()
        PAGES[full] = Page(name=full, examples=tuple(examples), notes=notes)
        app.command(name, epilog=epilog(examples), add_help_option=False)(run)
        return run

    return register


def epilog(examples: Sequence[Example], *, after: str = "") -> str:
    """Return the examples as the end of a help text, and what follows them."""
    # A "\b" paragraph keeps its line breaks.
    lines = ["[bold]Examples[/bold]"]
    for example in examples:
        lines += [f"[dim]# {_escape(example.does)}[/dim]", _escape(example.line)]
    if after:
        lines += ["", after]
    return "\b\n" + "\n".join(lines)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)
