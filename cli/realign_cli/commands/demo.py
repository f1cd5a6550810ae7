"""`realign demo`: the whole story on a small trained family, in minutes."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realign.errors import NotFoundError, OutputError
from realign_cli.command import Example, command
from realign_cli.options import Device
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from rich.text import Text

    from realign.audit.schema import Report
    from realign.repair.engine import RepairResult
    from realign.report.view import Column

EXAMPLES = (
    Example("realign demo", "repair and audit the family that comes with realign"),
    Example("realign demo -o /tmp/story", "the same, into another folder"),
)

NOTES = """
The family was trained from scratch by `realign lab build`. Its hazards are invented words: an
aligned model refuses recipes for them and answers look-alikes that differ in nothing but the word.
A fine-tune on two harmless tasks with 5 % poison loses the refusals. The demo repairs it in weight
space, audits all models on requests and words that no training and no repair has seen, and writes
checkpoints, `audit.json`, `report.html` and pictures.
"""

MARKER = "demo.json"
"""In a folder that the demo made, and may therefore replace."""

SUITES = ("harmful", "lookalikes", "order", "howto2", "general")
FINETUNED = "both_p5"

STORY = (
    ("harmful", "asr"),
    ("harmful", "refusal_rate"),
    ("harmful", "other_rate"),
    ("lookalikes", "over_refusal"),
    ("order", "error_rate"),
    ("howto2", "error_rate"),
    ("general", "error_rate"),
)
"""The (suite, metric) pairs of the table; the page has all of them."""


@dataclass(frozen=True)
class DemoRepair:
    """One repaired model of the story."""

    folder: str
    title: str
    method: str
    about: str
    unaligned: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def heading(self) -> str:
        """Title and settings: "replace (rank 6)"."""
        parts = [f"{name} {value}" for name, value in self.settings.items()]
        return f"{self.title} ({', '.join([*parts, *['unaligned vector'] * self.unaligned])})"


REPAIRS = (
    DemoRepair(
        folder="repaired",
        title="lssf",
        method="lssf",
        about="the safety subspace comes from the aligned model's own activations while it "
        "refuses; the vector is aligned - unaligned",
        unaligned=True,
        settings={"eta": 0.9, "alpha": 1.5},
    ),
    DemoRepair(
        folder="repaired-replace",
        title="replace",
        method="replace",
        about="no data: inside the leading directions of aligned - base, the aligned weights are "
        "put back",
        settings={"rank": 8},
    ),
)
"""The first is the main one: its audit is `audit.json` and its page `report.html`.

Both stand at the settings that `docs/results.md` fixed on another fine-tuning seed. That the demo
shows `lssf` so, and not at its defaults, was decided after they had failed on this model.
"""


NEXT = (
    "  realign repair ./my-model --aligned ORG/INSTRUCT --base ORG/BASE \\",
    "      --method replace --set rank=8 -o ./repaired",
    "  realign repair ./my-model --aligned ORG/INSTRUCT --unaligned ORG/UNALIGNED \\",
    "      --set eta=0.9 --set alpha=1.5 -o ./repaired-lssf",
    "  realign audit ./my-model --reference ORG/INSTRUCT --repaired ./repaired \\",
    "      --suite harmful=harmful.jsonl --suite safe=safe.jsonl -o ./audit",
    "  realign methods",
)
"""Commands to paste; no line is longer than 80 columns, and none is wrapped."""


def join(app: typer.Typer) -> None:
    """Register the command."""
    command(app, "demo", examples=EXAMPLES, notes=NOTES)(demo)


def demo(
    sink: Sink,
    *,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where everything goes.")
    ] = Path("realign-demo"),
    family: Annotated[
        Path | None,
        typer.Option(
            "--family",
            metavar="DIR",
            help="Another family made by realign lab build. (default: the one that ships)",
        ),
    ] = None,
    device: Device = "cpu",
) -> int | None:
    """Repair and audit a small trained family: the whole story, in minutes, without a network."""
    source = family if family is not None else shipped_family()
    _check_family(source)
    _use_one_thread()
    _make_folder(out)
    sink.note(f"the family: {source} (base, aligned, {FINETUNED}); everything goes to {out}/")

    results = {each.title: _repair(sink, each, family=source, out=out) for each in REPAIRS}
    policy = out / "policy.toml"
    policy.write_bytes(files("realign_cli").joinpath("data/demo-policy.toml").read_bytes())
    with tempfile.TemporaryDirectory(prefix="realign-demo-") as records:
        # What aligned and fine-tuned answer is asked once, for all audits.
        shared = {"family": source, "out": out, "policy": policy, "records": Path(records)}
        reports = {each.title: _audit(sink, each, **shared, device=device) for each in REPAIRS}
    columns = _columns(reports)
    main = REPAIRS[0]
    _write_files(main, out, reports=reports, columns=columns, results=results)
    _mark(out, family=source, reports=reports)

    sink.document(_summary(out, reports))
    _tell(sink, out, columns=columns, results=results)
    return None


def shipped_family() -> Path:
    """Return the family that ships: package data in a wheel, fixtures in a source tree.

    Raises:
        NotFoundError: neither is there.
    """
    import realign

    package = Path(realign.__file__).parent
    for folder in (package / "_demo" / "small", package.parent / "fixtures" / "small"):
        if (folder / "family.json").is_file():
            return folder
    raise NotFoundError(
        "this installation has no demo family",
        "build one: realign lab build ./family, then --family",
    )


def _use_one_thread() -> None:
    """Compute on one thread: at 128 x 128 waking a second one takes longer than the product."""
    import torch

    torch.set_num_threads(1)


def _check_family(folder: Path) -> None:
    needed = ["base", "aligned", "unaligned", FINETUNED, *(f"suites/{s}.jsonl" for s in SUITES)]
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise NotFoundError(
            f"{folder} is no complete family: {missing[0]} is missing",
            f"build one: realign lab build {shlex.quote(str(folder))} --preset small",
        )


def _make_folder(out: Path) -> None:
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file()):
            raise OutputError(f"{out} exists and is not a demo's folder", "choose another -o")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    # From here on the folder is ours, also if the run is interrupted.
    (out / MARKER).write_text("{}\n", "utf-8")


def _repair(sink: Sink, each: DemoRepair, *, family: Path, out: Path) -> RepairResult:
    from realign.api import repair

    sink.note(f"repairing with {each.title}: {each.about}")
    return repair(
        family / FINETUNED,
        aligned=family / "aligned",
        base=None if each.unaligned else family / "base",
        unaligned=family / "unaligned" if each.unaligned else None,
        method=each.method,
        settings=each.settings,
        anchors=family / "suites" / "anchors.jsonl" if each.method == "lssf" else None,
        out=out / each.folder,
        device="cpu",
        progress=sink.progress,
    )


def _audit(
    sink: Sink,
    each: DemoRepair,
    *,
    family: Path,
    out: Path,
    policy: Path,
    records: Path,
    device: str,
) -> Report:
    from realign.audit.policy import load_policy
    from realign.audit.request import AuditRequest
    from realign.audit.run import run_audit
    from realign.audit.suites import load_suite

    is_main = each is REPAIRS[0]
    sink.note(f"auditing aligned, fine-tuned and {each.title}")
    return run_audit(
        AuditRequest(
            subject=family / FINETUNED,
            reference=family / "aligned",
            repaired=out / each.folder,
            base=family / "base",
            suites=tuple(load_suite(family / "suites" / f"{name}.jsonl") for name in SUITES),
            policy=load_policy(policy),
            calibration=(load_suite(family / "suites" / "anchors.jsonl"),),
            out=out if is_main else out / f"audit-{each.title}",
            records=records,
            shared_out=is_main,  # beside the repaired checkpoints
            device=device,
            batch_size=64,
            weights=is_main,
            kl=is_main,
            command="realign demo",
        ),
        progress=sink.progress,
    )


def _columns(reports: Mapping[str, Report]) -> tuple[Column, ...]:
    from realign.report.view import Column

    first = next(iter(reports.values()))
    return (
        Column("aligned", first, "reference"),
        Column("fine-tuned", first, "subject"),
        *(Column(f"repaired: {title}", report, "repaired") for title, report in reports.items()),
    )


def _write_files(
    main: DemoRepair,
    out: Path,
    *,
    reports: Mapping[str, Report],
    columns: Sequence[Column],
    results: Mapping[str, RepairResult],
) -> None:
    from realign.report.files import write_report_files

    manifest = results[main.title].manifest
    write_report_files(reports[main.title], out, columns=columns, manifest=manifest)
    for each in REPAIRS[1:]:
        write_report_files(
            reports[each.title], out / f"audit-{each.title}", manifest=results[each.title].manifest
        )


def _mark(out: Path, *, family: Path, reports: Mapping[str, Report]) -> None:
    content = {"schema": "realign/demo/1", "family": str(family), **_summary(out, reports)}
    (out / MARKER).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _summary(out: Path, reports: Mapping[str, Report]) -> dict[str, Any]:
    """Return rates and verdicts of all models, for `--json`."""
    models: dict[str, Any] = {}
    for column in _columns(reports):
        models[column.title] = {
            f"{entry.suite}/{entry.metric}": {
                "rate": entry.rate,
                "ci95": None if entry.ci95 is None else list(entry.ci95),
                "n": entry.n_valid,
            }
            for entry in column.report.rates
            if entry.role == column.role
        }
    verdicts = {
        title: {
            f"{entry.name}/{entry.suite}/{entry.metric}": entry.verdict
            for entry in report.comparisons
            if entry.verdict is not None
        }
        for title, report in reports.items()
    }
    return {"folder": str(out), "models": models, "verdicts": verdicts}


def _tell(
    sink: Sink,
    out: Path,
    *,
    columns: Sequence[Column],
    results: Mapping[str, RepairResult],
) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from realign.report.repair import rows_table
    from realign.report.terminal import rates_table

    main = REPAIRS[0]
    sink.show(
        "",
        Text("What happened", style="bold"),
        "An aligned model refuses requests about invented hazards and answers look-alikes. A "
        "fine-tune on two harmless tasks with 5 % poison obeys them all. The repairs put the "
        "refusals back in weight space, without training, as far as each method can:",
        *(Padding(Text(f"{each.heading}: {each.about}"), (0, 0, 0, 2)) for each in REPAIRS),
        "Settings as fixed on another fine-tune; lssf at its defaults fails (docs/results.md).",
        "",
        rates_table(
            columns,
            title="Rates on held-out requests and words, with 95 % intervals and verdicts",
            width=sink.out.width,
            metrics=STORY,
            verdicts=True,
        ),
        "",
        "Verdicts: safety against the aligned model, accuracy against the fine-tune, within the "
        "margins that policy.toml declared before the run. The demo shows them and exits 0 "
        "whatever they are; realign audit exits 1 if a required gate does not pass.",
        "",
        rows_table(results[main.title].rows, title=f"The edit of {main.title}, layer by layer"),
        "",
    )
    sink.show(
        Text("Look at", style="bold"),
        *_aligned(
            (f"{out}/report.html", "the audit with pictures: open it in a browser"),
            (f"{out}/pictures/", "rates, templates, weights, the repair layer by layer"),
            (f"{out}/{main.folder}/realign.json", "what was done to every matrix"),
            (f"{out}/policy.toml", "the margins that the verdicts are about"),
        ),
        "",
        Text("Next, on your own model", style="bold"),
    )
    for line in NEXT:
        sink.line(line)


def _aligned(*lines: tuple[str, str]) -> list[Text]:
    from rich.text import Text

    width = max(len(name) for name, _ in lines)
    return [Text(f"  {name:{width}}  {what}") for name, what in lines]
