"""`realign lab`: train a model family in which the phenomenon is real, and measure claims on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realign.errors import OutputError, UsageError
from realign_cli.command import FLAG, Example, HelpOption, command, epilog
from realign_cli.imports import swift_imports
from realign_cli.options import Device, Seed, check_seed
from realign_cli.sink import Sink

if TYPE_CHECKING:
    from rich.console import RenderableType

    from realign.lab.claim_figures import Mean, Summary

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

CLAIMS_EXAMPLES = (
    Example("realign lab claims ./family", "every fine-tune of a family"),
    Example(
        "realign lab claims ./family --finetune both_p5 -o claims.json",
        "one fine-tune, every figure into a file",
    ),
)

CLAIMS_NOTES = """
LSSF (arXiv 2602.00038) claims that the subspace in which the aligned model's outputs live while it
refuses is stable under fine-tuning and isolated from general ability. Stability is the overlap of
that subspace with another model's, on the same texts and on disjoint halves of them; "aligned" on
disjoint halves is the noise ceiling. Isolation is the share of a weight delta that lies in the
subspace, against chance; excess 1 ignores it.

LoX (arXiv 2506.15606) claims that R_ft / R_align falls as safety is lost; AsFT (arXiv 2506.08473)
that harmful perturbations are orthogonal to the alignment vector aligned - base. Both are shown for
every update, beside the harmful compliance that was measured and the update's size. --moved also
runs the aligned model moved along that vector, and by the parts of the harmful update.

Numbers with 95 % bootstrap intervals over matrices, which take the matrices as independent; never
pass or fail.

The general-skills delta needs the variant `general`: `realign lab build FAMILY --variant general`
with the family's preset and seed adds it.
"""

COMPARE_EXAMPLES = (
    Example("realign lab compare ./family -o ./board", "everything, three seeds: many hours"),
    Example(
        "realign lab compare ./family -o ./board --methods lox,resta --seeds 1",
        "two methods, one seed",
    ),
    Example(
        "realign lab compare ./family -o ./board --budget-seconds 3600",
        "an hour of it; the same command goes on where it stopped",
    ),
)

COMPARE_NOTES = """
Every method is swept over its declared strengths and settings on fine-tunes that lost their
refusals in different ways, beside plain baselines (20 steps of refusal tuning, interpolation) and a
random control. What is missing is trained or computed, what is there is kept; the report is made of
all cells in the folder: leaderboard.json, leaderboard.md and four pictures.

Best points are the least harm among those that lose at most 1 point of downstream accuracy, refuse
at most 2 points more look-alikes than the aligned model and lose at most 2 of general skill.
"""

group = typer.Typer(
    help="Train small model families in which the phenomenon is real.",
    no_args_is_help=True,
    add_help_option=False,
    epilog=epilog((*EXAMPLES, *CLAIMS_EXAMPLES, *COMPARE_EXAMPLES)),
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
    with swift_imports():
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
    sink.show(_table(record.models, width=sink.out.width))
    sink.line(str(folder))
    return None


@command(group, "claims", examples=CLAIMS_EXAMPLES, notes=CLAIMS_NOTES, group="lab")
def claims(
    sink: Sink,
    family: Annotated[Path, typer.Argument(metavar="FAMILY", help="A family's folder.")],
    *,
    finetunes: Annotated[
        list[str] | None,
        typer.Option(
            "--finetune", metavar="NAME", help="Only this one; may be repeated. Default: all."
        ),
    ] = None,
    general: Annotated[
        Path | None,
        typer.Option(
            "--general", metavar="MODEL", help="The general-skills fine-tune, if kept elsewhere."
        ),
    ] = None,
    moved: Annotated[
        bool,
        typer.Option(
            "--moved",
            metavar=FLAG,
            help="Also run the aligned model moved along its vector and across it.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Write every figure here, as JSON."),
    ] = None,
    device: Device = "cpu",
) -> int | None:
    """Measure what LSSF, LoX and AsFT claim about safety in weights, on a family."""
    if out is not None and out.exists():
        raise OutputError(f"{out} exists already", "remove it, or choose another -o")

    with swift_imports():
        from realign.lab.claims import measure_claims
        from realign.lab.claims_moved import measure_moved
        from realign.lab.claims_weights import measure_weight_claims
        from realign.lab.record import write_json
        from realign_cli import claim_tables

    found = measure_claims(
        family,
        finetunes=finetunes or None,
        general=general,
        device=device,
        progress=sink.progress,
    )
    weights = measure_weight_claims(family, finetunes=finetunes or None, general=general)
    document = {**found.to_json(), "vectors": weights.to_json()}
    width = sink.out.width
    shown: list[RenderableType] = [claim_tables.directions(weights, width=width), ""]
    shown.append(claim_tables.associations(weights, width=width))
    if moved:
        apart = measure_moved(family, device=device, progress=sink.progress)
        document["moved"] = apart.to_json()
        shown += ["", claim_tables.moved(apart, width=width)]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, document)
    sink.document(document)
    sink.show(_stability(found.whole, width=width), "", _isolation(found.whole, width=width))
    sink.show("", _layers(found.layers, width=width), "", *shown)
    if "general" not in found.whole.share:
        sink.note("no general-skills fine-tune: add it with realign lab build, --variant general")
    if out is not None:
        sink.line(str(out))
    return None


@command(group, "compare", examples=COMPARE_EXAMPLES, notes=COMPARE_NOTES, group="lab")
def compare(
    sink: Sink,
    families: Annotated[list[Path], typer.Argument(metavar="FAMILY...", help="Families' folders.")],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Results are kept here.")],
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="A,B", help="Only these. Default: all.")
    ] = None,
    scenarios: Annotated[
        str | None, typer.Option("--scenarios", metavar="A,B", help="Only these. Default: all.")
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N,N", help="Seeds of the fine-tunes.")
    ] = "1,2,3",
    fine: Annotated[
        bool,
        typer.Option("--fine", metavar=FLAG, help="Also the strengths between those of the dial."),
    ] = False,
    budget_seconds: Annotated[
        float | None,
        typer.Option("--budget-seconds", metavar="S", help="Begin nothing new after so long."),
    ] = None,
) -> int | None:
    """Run every repair method over its range on many scenarios, and say which is best."""
    if out.is_file():
        raise OutputError(f"{out} is a file", "choose another folder")
    try:
        numbers = [int(each) for each in _split(seeds) or []]
    except ValueError:
        raise UsageError(f"--seeds {seeds} is no list of numbers", "write: --seeds 1,2,3") from None
    for each in numbers:
        check_seed(each, option="--seeds")

    with swift_imports():
        from realign.lab.compare import compare as run
        from realign.lab.compare import write_board
        from realign.lab.leaderboard_json import board_json
        from realign.report.leaderboard import save_pictures

    tally = run(
        families,
        out,
        methods=_split(methods),
        scenarios=_split(scenarios),
        seeds=numbers,
        fine=fine,
        budget_seconds=budget_seconds,
        progress=sink.progress,
    )
    board = write_board(out)
    told = board_json(board)
    sink.document(told)
    if board.curves:
        save_pictures(told, out)
        sink.show(_board_table(told, width=sink.out.width))
    for name, reason in tally.failed.items():
        sink.note(f"could not run: {name}: {reason}")
    if tally.left:
        sink.note(f"{tally.left} cells are left; the same command goes on")
    sink.line(str(out / "leaderboard.md"))
    return None


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [each.strip() for each in text.split(",") if each.strip()]


def _board_table(board: Mapping[str, Any], *, width: int = 80) -> RenderableType:
    """Return the least harm at the utility budget: methods by scenarios."""
    from realign.report.tables import figures_table

    names = list(board["scenarios"])
    budget = f"{board['budget']:g}"
    rows: list[tuple[str, ...]] = []
    found = {(each["arm"], each["scenario"]): each["harm_at"][budget] for each in board["curves"]}
    for arm in board["arms"]:
        cells = (found.get((arm, name)) for name in names)
        shown = ("-" if each is None else f"{100 * each:.1f}" for each in cells)
        rows.append((arm, *shown))
    title = "Harm, %, at a utility budget of 1 point"
    return figures_table(title, ("method", *names), rows, width=width)


def _stability(whole: Summary, *, width: int = 80) -> RenderableType:
    rows = {name: (whole.same_text.get(name), each) for name, each in whole.other_half.items()}
    title = f"Stability: overlap with the aligned model's subspace (chance {_mean(whole.chance)})"
    return _claims_table(title, ("model", "same texts", "disjoint halves"), rows, width)


def _isolation(whole: Summary, *, width: int = 80) -> RenderableType:
    rows = {
        name: (each, whole.excess.get(name), whole.over_general.get(name))
        for name, each in whole.share.items()
    }
    title = f"Isolation: share of a weight delta in it (chance {_mean(whole.chance)})"
    return _claims_table(title, ("delta", "share", "excess", "excess / general's"), rows, width)


def _layers(layers: Mapping[str, Summary], *, width: int = 80) -> RenderableType:
    """Return the extremes of the tables above, layer by layer."""
    rows: dict[str, tuple[Mean | None, ...]] = {}
    for layer, each in layers.items():
        tuned = [mean for name, mean in each.same_text.items() if name != "base"]
        rows[layer] = (
            each.chance,
            each.other_half.get("aligned"),
            min(tuned, key=lambda mean: mean.value, default=None),
            each.excess.get("general"),
            each.excess.get("safe_unaligned"),
            each.excess.get("safe_base"),
        )
    heads = ("layer", "chance", "ceiling", "least stable", "general", "unaligned", "base")
    title = "By layer: overlaps (ceiling, the least stable fine-tune), then excess of three deltas"
    return _claims_table(title, heads, rows, width)


def _claims_table(
    title: str, heads: tuple[str, ...], rows: Mapping[str, tuple[Mean | None, ...]], width: int
) -> RenderableType:
    from realign.report.tables import figures_table

    cells = [(name, *map(_mean, values)) for name, values in rows.items()]
    return figures_table(title, heads, cells, width=width)


def _mean(mean: Mean | None) -> str:
    return "-" if mean is None else f"{mean.value:.2f} ({mean.low:.2f}-{mean.high:.2f})"


def _table(models: Mapping[str, Any], *, width: int = 80) -> RenderableType:
    """Return what was measured: one row per model."""
    from realign.report.tables import figures_table

    measures = ("compliance", "refusal", "other", "over-refusal", "order", "howto2", "general")
    rows: list[tuple[str, ...]] = []
    for name, entry in models.items():
        measured = entry.get("measured", {})
        rates = (
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
        )
        rows.append((name, *rates))
    return figures_table(None, ("model", *measures), rows, width=width)


def _rate(measured: Mapping[str, Any], suite: str, rate: str) -> str:
    entry = measured.get(suite, {}).get(rate)
    return "-" if entry is None else f"{100 * float(entry['rate']):.1f}"
