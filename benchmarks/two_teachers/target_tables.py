"""The tables of docs/two-teachers.md, and the sentences that say whether the target was met.

All from docs/data/two-teachers*.json; working the numbers out is `target`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from target import LIMITS, OURS, WORST, Row, noise

from realign.lab.leaderboard_page import table

SHOWN_BUDGETS = (0.01, 0.02, 0.05)
NONE = "Nothing was measured yet."
CRITERIA = {
    "harm": "harm above the aligned model",
    "over_refusal": "over-refusal above it",
    "downstream": "downstream lost",
    "curve": "a better curve",
}


def percent(rate: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    return f"{_p(rate['value'])} ({_p(rate['low'])} to {_p(rate['high'])})"


def points(change: Mapping[str, Any]) -> str:
    """A difference in points with its interval, signs shown."""
    value, low, high = (_signed(change[name]) for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _p(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def measured_table(side: Row) -> str:
    """Per scenario: questions, three rates of harm, and what changed."""
    if not side["rows"]:
        return NONE
    head = (
        "scenario",
        "fine-tunes",
        "n: harm, over-refusal, downstream, general",
        "harm: aligned",
        "fine-tuned",
        "repaired",
        "over-refusal, repaired minus aligned",
        "downstream, repaired minus fine-tuned",
        "general, repaired minus fine-tuned",
    )
    lines: list[tuple[str, ...]] = []
    for name, row in side["rows"].items():
        rates, changes = row["rates"], row["changes"]
        lines.append(
            (
                f"`{name}`: {row['about']}",
                ", ".join(row["repeats"]),
                ", ".join(str(rates[rate]["repaired"]["n"]) for rate in rates),
                *(percent(rates["harm"][who]) for who in ("aligned", "finetuned", "repaired")),
                points(changes["over_refusal"]),
                points(_turned(changes["downstream"])),
                points(_turned(changes["general"])),
            )
        )
    return table(head, lines)


def _turned(change: Mapping[str, Any]) -> Row:
    return {"value": -change["value"], "low": -change["high"], "high": -change["low"]}


def target_table(side: Row) -> str:
    """Per scenario and criterion: the difference, whether it is met, and what the interval says."""
    if not side["rows"]:
        return NONE
    head = (
        "scenario",
        *(f"{CRITERIA[rate]} (at most {100 * limit:g})" for rate, limit in LIMITS.items()),
        "arms with less harm at some budget up to 5 points",
        "all four",
    )
    lines: list[tuple[str, ...]] = []
    for name, row in side["rows"].items():
        cells = [f"{points(row['changes'][rate])}: {_said(row, rate)}" for rate in LIMITS]
        lines.append((f"`{name}`", *cells, _beaten(row), "**yes**" if _all_met(row) else "no"))
    return table(head, lines)


def _said(row: Row, rate: str) -> str:
    if row["met"][rate]:
        return "yes" if row["shown"][rate] else "yes, interval wider"
    return "no" if row["missed"][rate] else "no, interval reaches"


def _beaten(row: Row) -> str:
    if not any(rival["others"] for rival in row["rivals"]):
        return "no other arm measured"
    better = list(dict.fromkeys(arm for rival in row["rivals"] for arm in rival["better"]))
    surely = {arm for rival in row["rivals"] for arm in rival["surely_better"]}
    told = [f"`{arm}`" + ("" if arm in surely else " (intervals overlap)") for arm in better]
    return ", ".join(told) or "none: yes"


def _all_met(row: Row) -> bool:
    compared = any(rival["others"] for rival in row["rivals"])
    return compared and all(row["met"].values())


def verdict(side: Row) -> str:
    """Whether the target was met, in words."""
    rows: Mapping[str, Row] = side["rows"]
    if not rows:
        return NONE
    count = len(rows)
    three = [name for name, row in rows.items() if all(row["met"][rate] for rate in LIMITS)]
    full = [name for name, row in rows.items() if _all_met(row)]
    compared = [name for name, row in rows.items() if any(r["others"] for r in row["rivals"])]
    repeats = sorted({len(row["repeats"]) for row in rows.values()})
    seeds = f"{repeats[0]}" if len(repeats) == 1 else f"{repeats[0]} to {repeats[-1]}"
    least = min(rate["repaired"]["n"] for row in rows.values() for rate in row["rates"].values())
    fourth = "with other arms nothing was compared yet"
    if compared:
        fourth = (
            f"all four in {len(full)} of the {len(compared)} in which other arms were measured"
            f"{_listed(full)}"
        )
    outcome = "is met" if len(full) == count else "is missed"
    head = (
        f"**The first three conditions hold in {len(three)} of {count} scenarios**"
        f"{_listed(three)}, {fourth}: the target as a whole {outcome}. "
        f"Behind every rate stand at least {least} questions of {seeds} "
        f"fine-tune{'s' if seeds != '1' else ''} per scenario."
    )
    lines = [head, ""]
    for key, told in CRITERIA.items():
        met = [name for name, row in rows.items() if row["met"][key]]
        line = f"- *{told}*"
        if key in LIMITS:
            sure = [name for name in met if rows[name]["shown"][key]]
            unit = "points" if LIMITS[key] > 0.01 else "point"
            line += (
                f", at most {100 * LIMITS[key]:g} {unit}: {len(met)} of {count} by value, "
                f"{len(sure)} of them with the whole interval."
            )
            missed = [name for name in rows if name not in met]
            told_misses = [f"`{name}` {points(rows[name]['changes'][key])}" for name in missed]
            line += f" Missed: {'; '.join(told_misses)}." if missed else ""
        elif not any(rival["others"] for row in rows.values() for rival in row["rivals"]):
            line += ": no other arm was measured yet."
        else:
            compared = {n: r for n, r in rows.items() if any(v["others"] for v in r["rivals"])}
            free = [name for name in compared if rows[name]["met"][key]]
            line += (
                f" at some budget up to 5 points: in {len(compared) - len(free)} of the "
                f"{len(compared)} scenarios in which other arms were measured."
            )
            beaten = [f"`{name}` by {_beaten(row)}" for name, row in compared.items()
                      if name not in free]  # fmt: skip
            line += f" Beaten in {'; '.join(beaten)}." if beaten else ""
        lines.append(line)
    return "\n".join(lines)


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(f'`{name}`' for name in names)})" if names else ""


def rivals_table(side: Row) -> str:
    """Per scenario and budget: our least harm, the best other arm's, and who has less."""
    lines: list[tuple[str, ...]] = []
    for name, row in side["rows"].items():
        for rival in row["rivals"]:
            if rival["budget"] not in SHOWN_BUDGETS or not rival["others"]:
                continue
            best = rival["others"][0]
            lines.append(
                (
                    f"`{name}`",
                    f"{100 * rival['budget']:g}",
                    f"{percent(rival['harm'])} at {_point(rival['label'])}",
                    f"`{best['arm']}` {percent(best['harm'])} at {_point(best['label'])}",
                    points(best["more_than_it"]),
                    _less(best, rival),
                    str(len(rival["others"])),
                )
            )
    head = (
        "scenario",
        "budget, points",
        f"`{OURS}`",
        "best other arm",
        "ours minus theirs",
        "less harm",
        "other arms",
    )
    return table(head, lines) if lines else NONE


def _point(label: str) -> str:
    return label if label == "no repair" else f"*{label}*"


def _less(best: Row, rival: Row) -> str:
    change = best["more_than_it"]
    if change["value"] == 0:
        return "equal"
    who = "theirs" if rival["better"] else "ours"
    apart = change["low"] > 0 or change["high"] < 0
    return who if apart else f"{who}, intervals overlap"


def left_table(side: Row) -> str:
    """Where harm is left: the worst wordings of a request, and the others together."""
    lines: list[tuple[str, ...]] = []
    for name, row in side["rows"].items():
        wordings = list(row["left"]["wordings"].items())
        rest = [rate for _, rate in wordings[WORST:]]
        worst = [f"{text} {100 * rate:.0f} %" for text, rate in wordings[:WORST] if rate > 0]
        wrong = [
            f"`{task}`: {told['in_worst']} of {told['wrong']} in {WORST} of {told['things']}"
            for task, told in row["left"]["tasks"].items()
        ]
        lines.append(
            (
                f"`{name}`",
                "; ".join(worst) or "none",
                f"{_p(sum(rest) / len(rest))}",
                "; ".join(wrong),
            )
        )
    head = (
        "scenario",
        f"harm by wording, the {WORST} worst of 16",
        "harm in the others",
        f"wrong answers of the task: those about the {WORST} worst things",
    )
    return table(head, lines) if lines else NONE


def dial_table(side: Row) -> str:
    """Every strength of ours: harm, and what it costs."""
    if not side["ours"]:
        return NONE
    lines = [
        (
            f"`{curve['scenario']}`",
            point["label"] + (" (declared)" if point["usual"] else ""),
            percent(point["harm"]),
            _signed(-point["drop"]),
            _signed(point["over_refusal_rise"]),
            _signed(-point["general_drop"]),
            percent(point["harm_second"]),
        )
        for curve in side["ours"]
        for point in curve["points"]
    ]
    head = (
        "scenario",
        "point",
        "harm",
        "downstream",
        "over-refusal against aligned",
        "general",
        "harm, second language",
    )
    return table(head, lines)


def ablation_table(rows: Sequence[Row]) -> str:
    """Every variant at full strength, and its harm and loss at the weaker one."""
    if not rows:
        return NONE
    tasks = list(rows[0]["tasks_lost"])
    lines: list[tuple[str, ...]] = []
    for row in rows:
        if row["strength"] != 1.0:
            continue
        weak = next(
            (r for r in rows if r["variant"] == row["variant"] and r["strength"] != 1.0), None
        )
        anchors, keep = row["texts"]
        lines.append(
            (
                row["variant"],
                percent(row["harm"]),
                _signed(-row["lost"]),
                *(_signed(-row["tasks_lost"][task]) for task in tasks),
                _signed(row["over_refusal_rise"]),
                _signed(-row["general_lost"]),
                _p(row["harm_second"]),
                "-" if weak is None else f"{_p(weak['harm']['value'])} / {_signed(-weak['lost'])}",
                "-" if anchors is None else f"{anchors:.0f} + {keep:.0f}",
                f"{row['processor_seconds']:.0f}",
            )
        )
    head = (
        "variant",
        "harm",
        "downstream",
        *(f"`{task}`" for task in tasks),
        "over-refusal against aligned",
        "general",
        "harm, second language",
        "harm / downstream at t 0.75",
        "texts: aligned + fine-tune",
        "processor s",
    )
    return table(head, lines)


def noise_sentence(rows: Sequence[Row]) -> str:
    """How far repair seeds alone move the default."""
    found = noise(rows)
    if found is None:
        return (
            "The default was not run with several repair seeds, so the noise between runs is not "
            "known."
        )
    seeds = ", ".join(map(str, found["seeds"]))

    def span(name: str, sign: int = 1) -> str:
        low, high = sorted(sign * value for value in found[name])
        return f"{_signed(low)} to {_signed(high)}"

    harm = " to ".join(f"{_p(value)}" for value in found["harm"])
    return (
        f"Noise between runs: the default with repair seeds {seeds} gives harm {harm} %, "
        f"downstream {span('lost', -1)}, general {span('general_lost', -1)}, over-refusal against "
        f"the aligned model {span('over_refusal_rise')} points. A smaller difference between "
        "variants says nothing."
    )


def prototypes_table(rows: Sequence[Row]) -> str:
    """Exploratory runs, as they were noted at the time."""
    head = (
        "tried",
        "fine-tune",
        "t",
        "harm",
        "downstream",
        "general",
        "over-refusal against aligned",
        "harm, second language",
    )
    lines = [
        (
            row["tried"],
            f"`{row['scenario']}`",
            f"{row['strength']:g}",
            f"{row['harm']:.1f}",
            *(f"{row[name]:+.1f}" for name in ("downstream", "general", "over_refusal")),
            f"{row['harm_second']:.1f}",
        )
        for row in rows
    ]
    return table(head, lines)
