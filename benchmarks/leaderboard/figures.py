"""Figures in the page's prose, each between marks that say what it is, filled from the data.

    <!--harm|resta|poison5|0.01-->74.6 % (64.6 to 82.5)<!---->

    harm|METHOD|SCENARIO|BUDGET     least harm at a budget, with its interval
    setting|METHOD|SCENARIO|BUDGET  the point that has it
    lost|METHOD|SCENARIO|BUDGET     what it costs downstream, in points
    mean|METHOD|BUDGET              least harm, averaged over the harmed scenarios
    usual|METHOD|SCENARIO|FIELD     a field of the declared point
    at|METHOD|SCENARIO|POINT|FIELD  a field of any point, named as in the tables
    before|SCENARIO|FIELD           a field of the fine-tune
    dominates|METHOD                how many methods it dominates; so `dominated`
    seeds|SCENARIO                  how many fine-tunes were repaired
    why|SCENARIO|METHOD|ASKED|FIELD an answer of `why.py`

A field is a rate, with its interval, or a change in points (drop, over_refusal_rise, general_drop,
other_rise). What the data do not answer becomes "not measured" and is named on standard error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

Data = dict[str, Any]
SHARES = ("kept_share", "also_marked_by_task", "also_marked_by_safe", "share_of_update")
_MARK = re.compile(r"<!--(\w+\|[^>]*?)-->.*?<!---->", re.DOTALL)


def fill_figures(page: str, told: Data, answers: Sequence[Data] = ()) -> str:
    """The page with every marked figure taken from the data: the board's, and `why.py`'s."""

    def filled(found: re.Match[str]) -> str:
        try:
            text = figure(told, found[1], answers)
        except StopIteration:
            sys.stderr.write(f"not measured: {found[1]}\n")
            text = "not measured"
        return f"<!--{found[1]}-->{text}<!---->"

    return _MARK.sub(filled, page)


def figure(told: Data, mark: str, answers: Sequence[Data] = ()) -> str:
    """One figure as text."""
    kind, *rest = mark.split("|")
    if kind == "why":
        wanted = dict(zip(("scenario", "method", "what"), rest, strict=False))
        return _answer(next(row for row in answers if wanted.items() <= row.items()), rest[3])
    if kind in ("dominates", "dominated"):
        side = 0 if kind == "dominates" else 1
        return str(sum(pair[side] == rest[0] for pair in told["dominates"]))
    if kind == "mean":
        mean = told["means"][rest[0]]
        if len(mean["scenarios"]) < len(told["harmed"]):
            raise StopIteration
        return _rate(mean["harm_at"][rest[1]])
    if kind in ("seeds", "before"):
        curve = next(c for c in told["curves"] if c["scenario"] == rest[0])
        return (
            str(len(curve["repeats"])) if kind == "seeds" else _field(curve["finetuned"], rest[1])
        )
    curve = next(c for c in told["curves"] if [c["arm"], c["scenario"]] == rest[:2])
    if kind in ("harm", "setting", "lost"):
        label = curve["best_at"][rest[2]]
        if kind == "setting":
            return label
        every = [{**curve["finetuned"], "label": "no repair"}, *curve["points"]]
        best = next(point for point in every if point["label"] == label)
        return _field(best, "harm" if kind == "harm" else "drop")
    label = curve["usual"] if kind == "usual" else rest[2]
    return _field(next(p for p in curve["points"] if p["label"] == label), rest[-1])


def _answer(row: Data, name: str) -> str:
    if name in SHARES or name in row.get("facts", {}):
        return f"{100 * (row[name] if name in SHARES else row['facts'][name]):.1f} %"
    if name in row and isinstance(row[name], float) and "rates" not in row:
        return f"{row[name]:.3f}"
    if name in ("cos_to_aligned", "norm_over_way_back"):
        return f"{row[name]:.3f}"
    if name in ("cosine_and_gain", "cosine_and_loss", "gain_and_loss"):
        return f"{row['summary'][name]['correlation']:+.2f}"
    return _field({"tasks": (), **row}, name)


def _field(point: Data, name: str) -> str:
    if name in point["rates"]:
        return _rate(point["rates"][name])
    if name in point["tasks"]:
        return _rate(point["tasks"][name])
    return f"{round(100 * point[name], 1) + 0.0:.1f}"


def _rate(rate: Data) -> str:
    value, low, high = (100 * rate[name] for name in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"
