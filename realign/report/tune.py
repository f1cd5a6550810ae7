"""A tuning for people: tables on a terminal, Markdown, and an HTML page with the picture.

All of it from the content of tune.json. Here: words and tables. Not here: the picture itself
(`tune_pictures`), the audit of the held-out prompts, which has a report of its own.
"""

from __future__ import annotations

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
_ROLES = (("reference", "aligned"), ("subject", "fine-tune"), ("repaired", "repaired"))


def headline(document: Mapping[str, Any]) -> list[str]:
    """What came out, in a few sentences."""
    chosen, held_out = document["chosen"], document["held_out"]
    limits = limits_text(document)
    if chosen is None:
        return [
            f"no strength looked at is safer than the fine-tune and within the limits ({limits})",
            *_nearest(document),
        ]
    cost = chosen["cost"]
    lines = [
        f"chosen: {strength_text(document)} (trial {chosen['trial']}); on the tuning prompts harm "
        f"{percent(document['search']['finetuned']['cost']['harm'])} -> {percent(cost['harm'])}"
    ]
    broken = [row["suite"] for row in held_out["rows"] if not row["holds"]]
    unsure = [row["suite"] for row in held_out["rows"] if row["holds"] and not row["certain"]]
    if broken:
        lines.append(
            f"on held-out prompts it does not hold on {', '.join(broken)}: no checkpoint is kept"
        )
    else:
        lines.append(f"on held-out prompts every limit holds ({limits})")
        if unsure:
            lines.append(
                f"{', '.join(unsure)}: the figure holds, its interval reaches beyond the limit; "
                "more prompts would decide"
            )
    return lines


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
        f"{group['name']} {strengths[str(group['layers'][0])]:g}" for group in document["groups"]
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
    titles = ["suite", "bad answer", "n", *(words for _, words in roles)]
    titles += ["change", "95 % interval", "limit", "verdict"]
    cells = [
        [
            row["suite"],
            METRIC_WORDS[row["metric"]],
            str(row["n"]),
            *(percent(row["rates"][role]["rate"]) for role, _ in roles),
            points(row["difference"]),
            f"[{points(row['low'])}, {points(row['high'])}]",
            "falls" if row["kind"] == "harmful" else points(row["limit"]),
            verdict(row),
        ]
        for row in rows
    ]
    return titles, cells


def verdict(row: Mapping[str, Any]) -> str:
    """Whether a limit holds on held-out prompts, and whether the interval agrees."""
    if row["kind"] != "harmful" and row["limit"] is None:
        return "no limit"
    word = "holds" if row["holds"] else "BROKEN"
    return word if row["certain"] else f"{word}, not certain"


def trial_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of every point that was looked at."""
    groups = document["groups"]
    single = len(groups) == 1
    titles = ["trial", *(["strength"] if single else [group["name"] for group in groups])]
    titles += ["refusal log-odds", "KL", "harm", "accuracy", "over-refusal", "outcome"]
    chosen = None if document["chosen"] is None else document["chosen"]["trial"]
    cells: list[list[str]] = []
    for trial in document["search"]["trials"]:
        cost, proxies = trial["cost"], trial["proxies"]
        outcome = trial["skipped"] or ("within" if trial["within"] else "breaks a limit")
        drop = None if cost is None or cost["utility_drop"] is None else -cost["utility_drop"]
        cells.append(
            [
                str(trial["number"]),
                *(f"{t:g}" for t in trial["point"]),
                "-" if proxies["refusal"] is None else f"{proxies['refusal']:+.2f}",
                f"{proxies['distance']:.4f}",
                percent(None if cost is None else cost["harm"]),
                points(drop),
                points(None if cost is None else cost["over_refusal_rise"]),
                "chosen" if trial["number"] == chosen else outcome,
            ]
        )
    return titles, cells


def tune_tables(document: Mapping[str, Any], *, width: int = 80) -> list[Any]:
    """What a terminal of that width shows: the trials, the held-out figures, the headline."""
    shown: list[Any] = [_table("Points looked at", *trial_rows(document), width=width)]
    titles, cells = held_out_rows(document)
    if cells:
        shown += ["", _table(HELD_OUT, titles, cells, width=width)]
    return [*shown, "", *headline(document), *(f"note: {note}" for note in document["notes"])]


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
        lines += ["Shares of bad answers on prompts that chose nothing; change against the "
                  "fine-tune, pair by pair.", ""]  # fmt: skip
    lines += ["## Points looked at", "", *_markdown(*trial_rows(document)), ""]
    lines += ["Costs against the fine-tune on the same tuning prompts, the worst suite of each "
              f"kind. The search ended: {document['search']['ended']}.", ""]  # fmt: skip
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

    def cost(trial: Mapping[str, Any]) -> float:
        values = (trial["cost"]["utility_drop"], trial["cost"]["over_refusal_rise"])
        return max(value for value in values if value is not None)

    best = min(safer, key=cost)
    point = ", ".join(f"{t:g}" for t in dict.fromkeys(best["point"]))
    return [
        f"the least costly one that helps: {point}, harm {percent(best['cost']['harm'])}, at "
        f"{points(cost(best))} points on its worst suite"
    ]


def _sides(document: Mapping[str, Any]) -> str:
    def count(side: str) -> str:
        return ", ".join(f"{s['name']} {s['n']}" for s in document["suites"][side])

    return f"tuned on {count('tuning')} prompts; held out: {count('held_out')}"


def _table(
    title: str, titles: Sequence[str], cells: Sequence[Sequence[str]], *, width: int
) -> RenderableType:
    return figures_table(
        title, titles, cells, width=width, words=("bad answer", "outcome", "verdict")
    )


def _markdown(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    def line(values: Sequence[str]) -> str:
        return f"| {' | '.join(value.replace('|', '/') for value in values)} |"

    return [line(titles), line(["---"] * len(titles)), *(line(row) for row in cells)]
