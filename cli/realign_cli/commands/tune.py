"""`realign tune`: find the strength of a repair within declared limits, and prove it elsewhere."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from realign.errors import UsageError
from realign_cli.command import Example, command
from realign_cli.imports import swift_imports
from realign_cli.options import (
    AUDIT_PANEL,
    BatchSize,
    Judges,
    Limit,
    MaxNewTokens,
    Suites,
)
from realign_cli.repair_options import AsPatch, MachineOptions, MaxPatchRank, Out, RepairOptions
from realign_cli.sink import Sink

SEARCH_PANEL = "Search"

EXAMPLES = (
    Example(
        "realign tune ./my-model --aligned org/model-instruct --base org/model \\\n"
        "    --method replace --suite harmful=harmful.jsonl --suite safe=safe.jsonl \\\n"
        "    --suite task=task.jsonl -o ./tuned",
        "one strength for all layers, within 1 point of accuracy and 2 of over-refusal",
    ),
    Example(
        "realign tune ./my-model --aligned org/model-instruct --base org/model \\\n"
        "    --method lox --groups 4 --trials 60 --minutes 90 \\\n"
        "    --suite harmful=harmful.jsonl --suite safe=safe.jsonl \\\n"
        "    --suite task=task.jsonl -o ./tuned",
        "four groups of layers, an hour and a half at most; the same command goes on later",
    ),
)

NOTES = """
The edits are computed once. Then the fine-tune stands in memory, and every point of the search is
that model with the edits scaled, bit for bit the checkpoint that `realign repair --strength` would
write. A point is scored first (refusal log-odds on harmful prompts, KL from the fine-tune on the
others); answers are generated and judged only where the scores leave something to hope for.

Chosen is the safest point within the limits, which are counted against the fine-tune on the same
prompts and must be kept with `--confidence`, not by the figure alone; a suite that is too small to
show its limit is refused before anything runs. Then the checkpoint, or with `--patch` the LoRA
adapter, is written and audited on prompts that chose nothing: a part of every suite, divided by
cluster, or those of `--final-suite`. Where a limit is broken there, or harm did not fall, it is not
kept. See [tuning](../tune.md).

`DIR` holds `tune.json`, `tune.html`, `tune.md`, the study (`study.journal`, which the same command
goes on with), the audit of the held-out prompts (`held-out/`) and the result (`repaired/` or
`patch/`).

Exit codes: 0 held-out prompts confirm every limit; 1 they do not: the result is written where every
figure keeps its limit, and not where one is broken or no point was within the limits; 2 could not
complete.
"""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "tune", examples=EXAMPLES, notes=NOTES)(tune)


def tune(
    sink: Sink,
    finetuned: Annotated[
        str, typer.Argument(metavar="FINETUNED", help="The checkpoint to repair.")
    ],
    *,
    options: RepairOptions,
    out: Out = None,
    patch: AsPatch = False,
    max_patch_rank: MaxPatchRank = None,
    max_utility_drop: Annotated[
        float,
        typer.Option(
            "--max-utility-drop",
            metavar="X",
            help="Accuracy that any task suite may lose, as a share; 1: no limit.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = 0.01,
    max_over_refusal_rise: Annotated[
        float,
        typer.Option(
            "--max-over-refusal-rise",
            metavar="X",
            help="Refusals that any safe suite may gain, as a share; 1: no limit.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = 0.02,
    confidence: Annotated[
        float,
        typer.Option(
            "--confidence",
            metavar="C",
            help="How sure it must be that a limit is kept; 0.5 takes figures as they are.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = 0.9,
    groups: Annotated[
        int,
        typer.Option(
            "--groups",
            metavar="N",
            help="Groups of neighbouring layers with a strength of their own.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = 1,
    max_strength: Annotated[
        float | None,
        typer.Option(
            "--max-strength",
            metavar="T",
            help="Largest strength tried. (default: 1.5, or the method's bound)",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None,
    trials: Annotated[
        int,
        typer.Option(
            "--trials",
            metavar="N",
            help="Points looked at, in all runs together.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = 30,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            metavar="M",
            help="Time for the search in this run. (default: no bound)",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out",
            metavar="X",
            help="Share of the prompts kept for the final run.",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = 0.5,
    suites: Suites = None,
    final_suites: Annotated[
        list[str] | None,
        typer.Option(
            "--final-suite",
            metavar="[KIND=]FILE",
            help="Prompts of the final run, instead of a part of every suite. May be repeated.",
            rich_help_panel=AUDIT_PANEL,
        ),
    ] = None,
    judges: Judges = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 16,
    machine: MachineOptions,
) -> int | None:
    """Find the strength that restores the most safety within limits on what it may cost."""
    if out is None:
        raise UsageError("a tuning needs a folder for its study and output", "give one with -o DIR")
    with swift_imports():
        from realign.report.tune import tune_tables, write_tune_files
        from realign.tune.request import Limits, TuneRequest
        from realign.tune.run import tune as find
    from realign_cli.commands.audit import command_line, load_suites

    given = [each.limited(limit) for each in load_suites(suites or [])]
    final = [each.limited(limit) for each in load_suites(final_suites or [])]
    request = TuneRequest(
        repair=options.request(finetuned, machine, patch=patch, max_patch_rank=max_patch_rank),
        out=out,
        suites=tuple(given),
        final_suites=tuple(final),
        limits=Limits(
            utility_drop=max_utility_drop,
            over_refusal_rise=max_over_refusal_rise,
            confidence=confidence,
        ),
        groups=groups,
        max_strength=max_strength,
        trials=trials,
        minutes=minutes,
        held_out=held_out,
        judges=tuple(judges or ()),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        command=command_line(),
    )
    result = find(request, progress=sink.progress)
    document: dict[str, Any] = dict(result.document)
    if result.audit is not None:
        from realign.report.files import write_report_files

        write_report_files(result.audit, out / "held-out")
    page, *_ = write_tune_files(document, out)
    sink.document(document | {"exit": {"code": result.exit_code, "reason": result.status}})
    sink.show(*tune_tables(document, width=sink.out.width), "")
    sink.line(str(page))
    if document["output"] is not None:
        sink.line(str(out / document["output"]))
    return result.exit_code
