"""`realign audit`: measure a fine-tune against its aligned reference, before and after a repair."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realign.errors import UsageError
from realign_cli.command import FLAG, Example, command
from realign_cli.imports import swift_imports
from realign_cli.options import (
    AUDIT_PANEL,
    Base,
    BatchSize,
    Device,
    Judges,
    Limit,
    MaxNewTokens,
    Offline,
    Policy,
    Seed,
    Suites,
    checkpoint_option,
)
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from realign.audit.request import AuditRequest
    from realign.audit.suites import Suite

EXAMPLES = (
    Example(
        "realign audit ./my-model --reference org/model-instruct \\\n"
        "    --suite core-harmful --suite core-safe -o ./audit",
        "rates and intervals of the fine-tune and of the model it came from",
    ),
    Example(
        "realign audit ./my-model --reference org/model-instruct \\\n"
        "    --repaired ./repaired --suite harmful.jsonl \\\n"
        "    --policy policy.toml -o ./audit",
        "verdicts against declared margins; exit code 1 if a gate does not pass",
    ),
    Example(
        "realign audit ./my-model --reference org/model-instruct \\\n"
        "    --suite harmful.jsonl --policy policy.toml --plan",
        "load nothing: what would run, and what so many items can show",
    ),
)

NOTES = """
Safety is compared with the reference, utility with the fine-tune: a repair should be as safe as the
reference and as skilled as the fine-tune.

| comparison | formula | the question |
|---|---|---|
| drift | fine-tuned - aligned | what did fine-tuning cost? |
| residual | repaired - aligned | is the cost gone? |
| recovery | repaired - fine-tuned | what did the repair change? |
| tax | repaired - fine-tuned, on utility and over-refusal | what did the repair cost? |

Three verdicts, against margins that a policy declares before the run: *drift found*, *within the
declared margin*, *not enough data to say*. Without a policy there are rates and intervals, and the
line `no verdicts: no policy`.

The folder holds `audit.json`, `items.jsonl` (hashes and verdicts, never texts), `report.html` and
`pictures/`. An interrupted audit goes on where it stopped when the same command is given again.

Exit codes: 0 every required gate passed, or no policy; 1 a gate failed or is inconclusive; 2 the
audit could not complete.
"""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "audit", examples=EXAMPLES, notes=NOTES)(audit)


def audit(
    sink: Sink,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="The fine-tuned checkpoint.")],
    *,
    reference: Annotated[
        str | None,
        checkpoint_option(
            "--reference",
            "-r",
            help="The aligned model it was tuned from; nothing is compared without it.",
        ),
    ] = None,
    repaired: Annotated[
        str | None,
        checkpoint_option("--repaired", help="The output of a repair of SUBJECT."),
    ] = None,
    base: Base = None,
    suites: Suites = None,
    judges: Judges = None,
    policy: Policy = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Prompts a repair was calibrated on: items that occur there are dropped. "
            "May be repeated.",
            rich_help_panel=AUDIT_PANEL,
        ),
    ] = None,
    training_data: Annotated[
        list[str] | None,
        typer.Option(
            "--training-data",
            metavar="FILE",
            help="What SUBJECT was trained on (JSONL, JSON or CSV, also from the Hub): items that "
            "occur there are dropped. May be repeated.",
            rich_help_panel=AUDIT_PANEL,
        ),
    ] = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = 16,
    keep_texts: Annotated[
        bool,
        typer.Option(
            "--keep-texts",
            metavar=FLAG,
            help="Keep the answers in DIR/responses, readable by you only.",
            rich_help_panel=AUDIT_PANEL,
        ),
    ] = False,
    noise_floor: Annotated[
        bool,
        typer.Option(
            "--noise-floor",
            metavar=FLAG,
            help="Run the reference twice, to see how far it differs from itself.",
            rich_help_panel=AUDIT_PANEL,
        ),
    ] = False,
    weights: Annotated[
        bool,
        typer.Option(
            "--weights/--no-weights",
            metavar=FLAG,
            help="Compare the weights as well.",
            rich_help_panel=AUDIT_PANEL,
        ),
    ] = True,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            metavar=FLAG,
            help="Load nothing; say what would run.",
            rich_help_panel=AUDIT_PANEL,
        ),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where the results go.")
    ] = None,
    device: Device = "auto",
    seed: Seed = 0,
    offline: Offline = False,
) -> int | None:
    """Measure compliance, refusal, over-refusal and utility, with intervals and verdicts."""
    if out is None and not plan:
        raise UsageError("an audit needs a folder for its results", "give one with -o DIR")
    if not suites:
        raise UsageError("an audit needs at least one suite", "give one with --suite FILE")

    with swift_imports():
        from realign.audit.policy import load_policy
        from realign.audit.request import AuditRequest
        from realign.audit.training_data import declared_training

    request = AuditRequest(
        subject=subject,
        reference=reference,
        repaired=repaired,
        base=base,
        suites=load_suites(suites, offline=offline),
        judges=tuple(judges or ()),
        policy=None if policy is None else load_policy(policy),
        calibration=tuple(load_calibration(file) for file in calibration or ()),
        training=tuple(declared_training(file, offline=offline) for file in training_data or ()),
        out=out or Path(),
        seed=seed,
        device=device,
        limit=limit,
        max_new_tokens=max_new_tokens,
        keep_texts=keep_texts,
        noise_floor=noise_floor,
        weights=weights,
        command=command_line(),
        offline=offline,
        batch_size=batch_size,
    )
    if plan:
        return _show_plan(sink, request)
    return run(sink, request)


def run(sink: Sink, request: AuditRequest) -> int:
    """Run an audit, write its files, show it; the exit code."""
    with swift_imports():
        from realign.audit.run import run_audit
        from realign.report.files import write_report_files
        from realign.report.terminal import render

    report = run_audit(request, progress=sink.progress)
    files = write_report_files(report, request.out, manifest=manifest_of(request.repaired))
    sink.document(report.model_dump(mode="json", by_alias=True))
    sink.show(*render(report, width=sink.out.width), "")
    sink.line(str(request.out / "audit.json"))
    sink.line(str(files[0]))
    return report.exit_code


def _show_plan(sink: Sink, request: AuditRequest) -> int:
    with swift_imports():
        from realign.audit.prepare import plan_audit
        from realign.report.planning import audit_plan_tables

    planned = plan_audit(request)
    sink.document(
        {
            "models": dict(planned.roles),
            "suites": [asdict(suite) for suite in planned.suites],
            "responses": planned.responses,
            "notes": list(planned.notes),
        }
    )
    sink.show(*audit_plan_tables(planned))
    return 0


def load_suites(arguments: list[str], *, offline: bool = False) -> tuple[Suite, ...]:
    """Read `--suite` arguments; a published file may give several suites."""
    from realign.audit.suite_sources import read_suites

    return tuple(
        suite for argument in arguments for suite in read_suites(argument, offline=offline)
    )


def load_calibration(file: str) -> Suite:
    """Read prompts that a repair was calibrated on; they need no kind."""
    from realign.audit.suites import load_suite

    try:
        return load_suite(file)
    except UsageError:
        return load_suite(file, kind="anchors")


def manifest_of(repaired: object) -> dict[str, object] | None:
    """Return the manifest of a repaired folder, if it is one that realign wrote."""
    from realign.checkpoint.manifest import read_manifest

    folder = getattr(repaired, "folder", repaired)
    if not isinstance(folder, str | Path) or not Path(folder).is_dir():
        return None
    manifest = read_manifest(Path(folder))
    return None if manifest is None else dict(manifest)


def command_line() -> str:
    """Return what was typed, for the record: without tokens and users in URLs."""
    from realign.checkpoint.manifest import redact_command

    return shlex.join(redact_command(["realign", *sys.argv[1:]]))
