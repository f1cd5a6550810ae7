"""A tuning for people: tables on a terminal, Markdown, and an HTML page with the picture.

All of it from the content of tune.json. Here: words and tables. Not here: the picture itself
(`tune_pictures`), the audit of the held-out prompts, which has a report of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realign.audit.instruments import METRIC_WORDS
from realign.audit.schema import atomic_write
from realign.errors import OutputError
from realign.report.page import environment, markup
from realign.report.pictures import save, to_svg
from realign.report.tables import figures_table
from realign.report.tune_pictures import tune_picture

if TYPE_CHECKING:
    from rich.console import RenderableType

PAGE, TEXT, PICTURE = "tune.html", "tune.md", "tune.png"
HELD_OUT = "Held-out prompts, shares of bad answers"
STAGES = ("refusal", "KL", "costs", "harm")
COSTS = (
    "Accuracy and over-refusal: change against the fine-tune on the same tuning prompts, in "
    "points, on the worst suite of the kind; in brackets the bound that the limit is held to."
)
MET = (
    "Shares of bad answers on prompts that chose nothing; change against the fine-tune, pair by "
    "pair, in points, with its 95 % interval. A limit is met where the change is at most the "
    "limit with the confidence asked for, not confirmed where only the figure itself is."
)
_ROLES = (("reference", "aligned"), ("subject", "fine-tune"), ("repaired", "repaired"))


def headline(document: Mapping[str, Any]) -> list[str]:
    """What came out, in a few sentences."""
    chosen, held_out = document["chosen"], document["held_out"]
    limits = limits_text(document)
    if chosen is None:
        return [
            f"no strength looked at is safer than the fine-tune and within the limits ({limits}"
            f"{_sure(document)})",
            *_nearest(document),
        ]
    cost = chosen["cost"]
    lines = [
        f"chosen: {strength_text(document)} (trial {chosen['trial']}); on the tuning prompts harm "
        f"from {percent(document['search']['finetuned']['cost']['harm'])} to "
        f"{percent(cost['harm'])}"
    ]
    by_verdict = {
        word: [row["suite"] for row in held_out["rows"] if row["verdict"] == word]
        for word in ("met", "not confirmed", "not met")
    }
    broken, open_ = by_verdict["not met"], by_verdict["not confirmed"]
    kind = "patch" if document["output"] == "patch" else "checkpoint"
    if broken:
        lines.append(f"held-out prompts: not met on {', '.join(broken)}; nothing is kept")
    elif open_:
        lines.append(
            f"held-out prompts: every figure keeps its limit, not confirmed on "
            f"{', '.join(open_)}{_sure(document)}; the {kind} is written"
        )
        lines.append("more prompts would decide it; so would a looser limit")
    else:
        lines.append(
            f"held-out prompts: less harm, and every limit met ({limits}{_sure(document)})"
        )
    return lines


def _sure(document: Mapping[str, Any]) -> str:
    confidence = document["limits"]["confidence"]
    return "" if confidence <= 0.5 else f", with {100 * confidence:g} % confidence"


def limits_text(document: Mapping[str, Any]) -> str:
    """The declared limits in words."""
    limits = document["limits"]
    named = (("accuracy at most", "utility_drop"), ("refusals at most", "over_refusal_rise"))
    signs = {"utility_drop": "-", "over_refusal_rise": "+"}
    parts = [
        f"{words} {signs[key]}{100 * limits[key]:g} points"
        for words, key in named
        if limits[key] < 1
    ]
    return ", ".join(parts) or "none declared"


def strength_text(document: Mapping[str, Any]) -> str:
    """The chosen strength, group by group where they differ."""
    chosen = document["chosen"]
    if chosen["strength"] is not None:
        return f"strength {chosen['strength']:g}"
    strengths = chosen["strengths"]
    parts = [
        f"{group['name']}: {strengths[str(group['layers'][0])]:g}" for group in document["groups"]
    ]
    return f"strengths {', '.join(parts)}"


def percent(value: float | None) -> str:
    """A share as percent, "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of shares in points, with its sign."""
    return "-" if value is None else f"{100 * value + 0.0:+.1f}".replace("-0.0", "+0.0")


def held_out_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the held-out figures."""
    held_out = document["held_out"]
    if held_out is None:
        return [], []
    rows: Sequence[Mapping[str, Any]] = held_out["rows"]
    roles = [(role, words) for role, words in _ROLES if any(role in r["rates"] for r in rows)]
    titles = ["suite", "verdict", "change", _at_most(document), "limit"]
    titles += [*(words for _, words in roles), "n"]
    cells = [
        [
            f"{row['suite']} ({METRIC_WORDS[row['metric']]})",
            row["verdict"],
            f"{points(row['difference'])} ({points(row['low'])} to {points(row['high'])})",
            points(row["at_most"]),
            "below 0" if row["kind"] == "harmful" else points(row["limit"]),
            *(percent(row["rates"][role]["rate"]) for role, _ in roles),
            str(row["n"]),
        ]
        for row in rows
    ]
    return titles, cells


def _at_most(document: Mapping[str, Any]) -> str:
    confidence = document["limits"]["confidence"]
    return "at most" if confidence <= 0.5 else f"at most ({100 * confidence:g} %)"


def trial_rows(
    document: Mapping[str, Any], *, reasons: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of every point that was looked at; why one was pruned, if wanted."""
    groups = document["groups"]
    single = len(groups) == 1
    titles = ["trial", *(["strength"] if single else [group["name"] for group in groups])]
    titles += ["refusal", "KL", "harm", "accuracy", "over-refusal", "outcome"]
    chosen = None if document["chosen"] is None else document["chosen"]["trial"]
    cells: list[list[str]] = []
    for trial in document["search"]["trials"]:
        cost, proxies = trial["cost"], trial["proxies"]
        drop = None if cost is None or cost["utility_drop"] is None else -cost["utility_drop"]
        least = None if cost is None or drop is None else -cost["utility_at_most"]
        cells.append(
            [
                str(trial["number"]),
                *(f"{t:g}" for t in trial["point"]),
                "-" if proxies["refusal"] is None else f"{proxies['refusal']:+.2f}",
                "-" if proxies["distance"] is None else f"{proxies['distance']:.4f}",
                percent(None if cost is None else cost["harm"]),
                _bounded(drop, least),
                _bounded(
                    *(None, None)
                    if cost is None
                    else (
                        cost["over_refusal_rise"],
                        cost["over_refusal_at_most"],
                    )
                ),
                "chosen" if trial["number"] == chosen else _outcome(trial, reasons),
            ]
        )
    return titles, cells


def _bounded(value: float | None, bound: float | None) -> str:
    """A change in points, and its bound where that is another one."""
    if value is None or bound is None or abs(value - bound) < 1e-9:
        return points(value)
    return f"{points(value)} ({points(bound)})"


def _outcome(trial: Mapping[str, Any], reasons: bool) -> str:
    if trial["pruned"] is not None:
        why = f": {trial['pruned']['reason']}" if reasons else ""
        return f"pruned at {trial['pruned']['stage']}{why}"
    return "within" if trial["within"] else "breaks a limit"


def pruning_text(document: Mapping[str, Any]) -> str:
    """How many points were pruned, at which stage, and the answers that this saved."""
    stages = Counter(
        trial["pruned"]["stage"] for trial in document["search"]["trials"] if trial["pruned"]
    )
    trials, answers = len(document["search"]["trials"]), document["search"]["answers"]
    if not stages:
        return f"pruned: none; {answers['generated']} answers were generated"
    parts = [f"{stages[name]} at {name}" for name in STAGES if stages[name]]
    return (
        f"pruned: {stages.total()} of {trials} points ({', '.join(parts)}); "
        f"{answers['generated']} answers were generated instead of {answers['without_pruning']}"
    )


def tune_tables(document: Mapping[str, Any], *, width: int = 80) -> list[Any]:
    """What a terminal of that width shows: the trials, the held-out figures, the headline."""
    rows = trial_rows(document, reasons=False)
    shown: list[Any] = [_table("Points looked at", *rows, width=width)]
    titles, cells = held_out_rows(document)
    if cells:
        shown += ["", _table(HELD_OUT, titles, cells, width=width)]
    shown += ["", pruning_text(document), *headline(document)]
    return [*shown, *(f"note: {note}" for note in document["notes"])]


def tune_markdown(document: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Tuning a repair", ""]
    lines += [f"- {sentence}" for sentence in headline(document)]
    lines += ["", f"Method `{document['method']['name']}`, {_sides(document)}.", ""]
    if tune_picture(document) is not None:
        lines += [f"![Harm against cost]({PICTURE})", ""]
    titles, cells = held_out_rows(document)
    if cells:
        lines += ["## Held-out prompts", "", *_markdown(titles, cells), ""]
        lines += [MET, ""]
    lines += ["## Points looked at", "", *_markdown(*trial_rows(document)), ""]
    lines += [COSTS, "", f"The search ended: {document['search']['ended']}; "
              f"{pruning_text(document)}.", ""]  # fmt: skip
    lines += [f"- {note}" for note in document["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def tune_html(document: Mapping[str, Any]) -> str:
    """The report as one HTML page that loads nothing."""
    figure = tune_picture(document)
    label = "Harmful compliance against cost, one mark per strength"
    return (
        environment()
        .get_template("tune.html.j2")
        .render(
            document=document,
            headline=headline(document),
            sides=_sides(document),
            costs=COSTS,
            met=MET,
            pruning=pruning_text(document),
            picture=None if figure is None else markup(to_svg(figure, label=label)),
            held_out=held_out_rows(document),
            trials=trial_rows(document),
        )
    )


def write_tune_files(document: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    """Write the page, the Markdown and the picture beside tune.json.

    Raises:
        OutputError: the folder cannot be written.
    """
    page, text, picture = (folder / name for name in (PAGE, TEXT, PICTURE))
    atomic_write(page, tune_html(document))
    atomic_write(text, tune_markdown(document))
    figure = tune_picture(document)
    try:
        picture.unlink(missing_ok=True)
        if figure is not None:
            save(figure, picture)
    except OSError as error:
        raise OutputError(
            f"{picture}: cannot be written ({error.strerror})", "check space and permissions"
        ) from error
    return (page, text) if figure is None else (page, text, picture)


def _nearest(document: Mapping[str, Any]) -> list[str]:
    """The least costly of the points that were measured, where none was good enough."""
    measured = [trial for trial in document["search"]["trials"] if trial["cost"] is not None]
    start = document["search"]["finetuned"]["cost"]["harm"]
    safer = [trial for trial in measured if trial["cost"]["harm"] < start]
    if not safer:
        return ["none of them restored any safety"]

    def worst(trial: Mapping[str, Any], *names: str) -> float:
        return max(trial["cost"][name] for name in names if trial["cost"][name] is not None)

    best = min(safer, key=lambda trial: worst(trial, "utility_drop", "over_refusal_rise"))
    change = worst(best, "utility_drop", "over_refusal_rise")
    bound = worst(best, "utility_at_most", "over_refusal_at_most")
    point = ", ".join(f"{t:g}" for t in dict.fromkeys(best["point"]))
    return [
        f"the least costly one that helps: {point}, harm {percent(best['cost']['harm'])}, at "
        f"{_bounded(change, bound)} points on its worst suite"
    ]


def _sides(document: Mapping[str, Any]) -> str:
    def count(side: str) -> str:
        return ", ".join(f"{s['name']} {s['n']}" for s in document["suites"][side])

    return f"tuned on {count('tuning')} prompts; held out: {count('held_out')}"


def _table(
    title: str, titles: Sequence[str], cells: Sequence[Sequence[str]], *, width: int
) -> RenderableType:
    return figures_table(title, titles, cells, width=width, words=("outcome", "verdict"))


def _markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    def line(values: Sequence[str]) -> str:
        return f"| {' | '.join(value.replace('|', '/') for value in values)} |"

    return [line(titles), line(["---"] * len(titles)), *(line(row) for row in cells)]
