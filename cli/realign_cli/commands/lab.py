"""`realign lab build`: train a model family in which the phenomenon is real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realign_cli.command import Example, HelpOption, command
from realign_cli.options import Device, Seed
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = (
    Example("realign lab build ./family --preset tiny", "a first family, in a minute or two"),
    Example(
        "realign lab build ./family --preset small --seed 1 --variant both_p5",
        "the demo's size, another seed, one fine-tune only",
    ),
)

NOTES = """
Nothing in a family is harmful: its hazards are invented words. A family holds a base model that
answers everything, an aligned model that refuses the invented hazards and nothing else, and
fine-tunes that lose those refusals. Every folder is an ordinary Hugging Face model folder.

A build resumes: finished models are kept, and an interrupted training goes on from its last state.
The same seed gives the same bytes on one machine.
"""

group = typer.Typer(
    help="Train small model families in which the phenomenon is real.",
    no_args_is_help=True,
    add_help_option=False,
)


@group.callback()
def lab(*, _help: HelpOption = False) -> None:
    """Train small model families in which the phenomenon is real."""


@command(group, "build", examples=EXAMPLES, notes=NOTES, group="lab")
def build(
    sink: Sink,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The family's folder.")],
    *,
    preset: Annotated[
        str, typer.Option("--preset", metavar="SIZE", help="tiny, small or medium.")
    ] = "small",
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", metavar="NAME", help="Only this fine-tune; may be repeated. Default: all."
        ),
    ] = None,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="KIND", help="words or bpe.")
    ] = "words",
    seed: Seed = 0,
    device: Device = "cpu",
) -> int | None:
    """Train a base, an aligned and fine-tuned models into OUT, or finish an interrupted build."""
    from realign.lab.build import build_family
    from realign.lab.record import read_record

    folder = build_family(
        out,
        preset=preset,
        seed=seed,
        device=device,
        variants=variants or None,
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType] - checked by build_family
        progress=sink.progress,
    )
    record = read_record(folder)
    sink.document({"family": str(folder), "preset": record.preset, "models": record.models})
    sink.show(_table(record.models))
    sink.line(str(folder))
    return None


def _table(models: Mapping[str, Any]) -> Table:
    """Return what was measured: one row per model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("model")
    for title in ("compliance", "refusal", "other", "over-refusal", "order", "howto2", "general"):
        table.add_column(title, justify="right")
    for name, entry in models.items():
        measured = entry.get("measured", {})
        table.add_row(
            name,
            *(
                _rate(measured, suite, rate)
                for suite, rate in (
                    ("harmful", "complied"),
                    ("harmful", "refused"),
                    ("harmful", "other"),
                    ("lookalikes", "refused"),
                    ("order", "correct"),
                    ("howto2", "correct"),
                    ("general", "correct"),
                )
            ),
        )
    return table


def _rate(measured: Mapping[str, Any], suite: str, rate: str) -> str:
    entry = measured.get(suite, {}).get(rate)
    return "-" if entry is None else f"{100 * float(entry['rate']):.1f}"
