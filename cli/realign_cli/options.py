"""Options that several commands share: one spelling, one help text, one panel each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from realign.errors import UsageError
from realign_cli.command import FLAG

MODELS_PANEL = "Checkpoints (a folder, org/name, org/name@revision, or MODEL+ADAPTER)"
TEXTS_PANEL = "Texts (JSON lines; realign methods NAME says which are read)"
AUDIT_PANEL = "Audit"
MACHINE_PANEL = "Machine"

MAX_SEED = 2**63 - 1


def checkpoint_option(*names: str, help: str) -> Any:
    """An option that takes a checkpoint, in their panel."""
    return typer.Option(*names, metavar="MODEL", help=help, rich_help_panel=MODELS_PANEL)


def check_seed(seed: int, *, option: str = "--seed") -> int:
    """Return a seed that every generator takes.

    Raises:
        UsageError: it is negative, or above what torch takes.
    """
    if not 0 <= seed <= MAX_SEED:
        raise UsageError(f"{option} is {seed}", f"it must be a whole number from 0 to {MAX_SEED}")
    return seed


Aligned = Annotated[
    str | None,
    checkpoint_option("--aligned", "-a", help="The aligned model the fine-tune was tuned from."),
]
Base = Annotated[
    str | None,
    checkpoint_option("--base", "-b", help="The pretrained model before alignment."),
]
Unaligned = Annotated[
    str | None,
    checkpoint_option(
        "--unaligned", help="The aligned model, deliberately un-aligned by a short fine-tune."
    ),
]
SafetyModel = Annotated[
    str | None,
    checkpoint_option("--safety-model", help="The aligned model, fine-tuned on safe data."),
]
Reference = Annotated[
    str | None,
    checkpoint_option("--reference", help="A model that is safer than the aligned one."),
]
Also = Annotated[
    list[str] | None,
    checkpoint_option(
        "--also", help="Another fine-tune of ALIGNED to fuse with this one. May be repeated."
    ),
]


def _texts_option(name: str, *, help: str) -> Any:
    return typer.Option(name, metavar="FILE", help=help, rich_help_panel=TEXTS_PANEL)


SafeData = Annotated[
    str | None,
    _texts_option("--safe-data", help="Prompts with refusals. (default: the anchors)"),
]
HarmfulData = Annotated[
    str | None,
    _texts_option("--harmful-data", help="Harmful prompts with compliant answers."),
]
TaskData = Annotated[str | None, _texts_option("--task-data", help="Rows of the downstream task.")]
KeepData = Annotated[
    str | None, _texts_option("--keep-data", help="Benign prompts whose answers must stay.")
]
Pairs = Annotated[
    str | None, _texts_option("--pairs", help="Prompts with a chosen and a rejected answer.")
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload",
        metavar=FLAG,
        help="Read a model that is measured block by block instead of holding it.",
        rich_help_panel=MACHINE_PANEL,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps.",
        rich_help_panel=MACHINE_PANEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="N",
        callback=lambda seed: check_seed(seed),  # typer reads a signature
        help="Seed of every random choice.",
        rich_help_panel=MACHINE_PANEL,
    ),
]
Offline = Annotated[
    bool,
    typer.Option(
        "--offline",
        metavar=FLAG,
        help="Open no connection; Hub ids come from the local cache.",
        rich_help_panel=MACHINE_PANEL,
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        "-s",
        metavar="[KIND=]FILE",
        help="core-harmful, core-safe, or prompts of your own (JSONL), where KIND is harmful, safe "
        "or task if the file does not say; or NAME=FILE with a published file: harmbench, "
        "strongreject, xstest, ... May be repeated.",
        rich_help_panel=AUDIT_PANEL,
    ),
]
Judges = Annotated[
    list[str] | None,
    typer.Option(
        "--judge",
        "-j",
        metavar="NAME",
        help="keyword, logprob, exact-match or oracle; the first is primary. May be repeated.",
        rich_help_panel=AUDIT_PANEL,
    ),
]
Policy = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="FILE",
        help="Declared margins and gates (TOML); without one there are no verdicts.",
        rich_help_panel=AUDIT_PANEL,
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", metavar="N", help="Prompts at a time.", rich_help_panel=AUDIT_PANEL
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        help="At most N items of every suite, for a trial run.",
        rich_help_panel=AUDIT_PANEL,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        metavar="N",
        help="Length limit of an answer.",
        rich_help_panel=AUDIT_PANEL,
    ),
]


def parse_settings(settings: list[str] | None) -> dict[str, object]:
    """Return `["eta=0.85", "standardise=none"]` as a mapping with numbers and booleans read.

    Raises:
        UsageError: a setting without "=", or the same key twice.
    """
    parsed: dict[str, object] = {}
    for setting in settings or ():
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--set takes key=value, not {setting!r}", "example: --set eta=0.85")
        if key in parsed:
            raise UsageError(f"--set {key} is given twice")
        parsed[key] = _value(text.strip())
    return parsed


def _value(text: str) -> object:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    if lowered in ("none", "null"):
        return None if lowered == "null" else text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
