"""The leaderboard as Markdown tables. Working the numbers out is `leaderboard`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from realign.lab.estimates import Estimate
from realign.lab.leaderboard import BUDGET, BUDGETS, HARMLESS, Board, Curve, Point
from realign.lab.scenarios import SCENARIOS

NAMED = 3
"""Most methods that a row of the table of dominance names."""
COUNTED = ("harm", "over_refusal", "downstream", "general")


def board_page(board: Board) -> dict[str, str]:
    """The tables of the page by name, each with its heading."""
    return {
        "measured": _measured(board),
        "overview": _overview(board),
        "curves": _budgets(board),
        "dominance": _dominance(board),
        "scenarios": "\n\n".join(_scenario(board, name) for name in board.scenarios),
        "usual": _usual(board),
        "costs": _costs(board),
        "failed": _failed(board),
    }


def whole_page(board: Board) -> str:
    """All tables under headings, for a comparison's own folder."""
    titles = {
        "measured": "What was measured",
        "overview": "Least harm at a utility budget of 1 point",
        "curves": "Least harm at other budgets",
        "dominance": "Who dominates whom",
        "scenarios": "Scenario by scenario",
        "usual": "At the declared setting",
        "costs": "Time and memory",
        "failed": "What could not run",
    }
    tables = board_page(board)
    parts = [f"## {title}\n\n{tables[name]}" for name, title in titles.items() if tables[name]]
    return "# Leaderboard\n\n" + "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _measured(board: Board) -> str:
    rows: list[tuple[str, ...]] = []
    for name in board.scenarios:
        curves = [curve for (_, scenario), curve in board.curves.items() if scenario == name]
        labels = dict.fromkeys(label for curve in curves for label in curve.labels)
        most = max(curves, key=lambda curve: len(curve.labels))
        counts = {rate: most.untouched.estimate(rate).n for rate in COUNTED}
        missing = [arm for arm in board.arms if (arm, name) not in board.curves]
        fewer = [c.arm for c in curves if len(c.labels) < len(labels)]
        gaps = [f"not: {', '.join(missing)}"] if missing else []
        gaps += [f"fewer repeats: {', '.join(fewer)}"] if fewer else []
        rows.append(
            (
                f"`{name}`: {SCENARIOS[name].about}",
                ", ".join(labels),
                str(counts["harm"]),
                str(counts["over_refusal"]),
                str(counts["downstream"]),
                str(counts["general"]),
                "; ".join(gaps) or "-",
            )
        )
    head = (
        "scenario",
        "repeats",
        "n harm",
        "n over-refusal",
        "n downstream",
        "n general",
        "missing",
    )
    return table(head, rows)


def _overview(board: Board) -> str:
    """Best harm at the budget, methods by scenarios."""
    rows: list[tuple[str, ...]] = [
        ("*no repair*", *(_before(board, name) for name in board.scenarios), "", "")
    ]
    for arm in _ranked(board):
        cells: list[str] = []
        for name in board.scenarios:
            curve = board.curves.get((arm, name))
            cells.append("-" if curve is None else best_cell(curve))
        mean, held = "-", "-"
        if board.measured(arm) == board.harmed:
            mean = _interval(board.mean_estimate(arm, BUDGET, board.harmed))
            others = [board.curves[arm, name].held_out() for name in board.harmed]
            known = [each[0] for each in others if each is not None]
            held = _percent(sum(known) / len(known)) if len(known) == len(others) else "-"
        rows.append((_named(board, arm), *cells, mean, held))
    head = ("method", *(f"`{name}`" for name in board.scenarios), "mean", "held out")
    return table(head, rows)


def _before(board: Board, scenario: str) -> str:
    """Harm without a repair; a range where every method has a fine-tune of its own."""
    curves = [curve for (_, name), curve in board.curves.items() if name == scenario]
    if SCENARIOS[scenario].rounds == 1:
        return _percent(_any_curve(board, scenario).untouched.mean()[0])
    harms = sorted(curve.untouched.mean()[0] for curve in curves)
    return f"{_percent(harms[0])} to {_percent(harms[-1])}"


def _ranked(board: Board) -> list[str]:
    """Methods by mean harm at the budget over the scenarios they have; fullest first."""

    def key(arm: str) -> tuple[int, float]:
        have = board.measured(arm)
        return -len(have), board.mean_harm(arm, BUDGET, have)

    return sorted(board.arms, key=key)


def _any_curve(board: Board, scenario: str) -> Curve:
    """A curve with as many repeats as any of the scenario."""
    curves = [curve for (_, name), curve in board.curves.items() if name == scenario]
    return max(curves, key=lambda curve: len(curve.labels))


def best_cell(curve: Curve) -> str:
    """Harm at the budget; "none" where harm was there to repair and no point is admissible."""
    best = curve.best()
    harm = best.mean()[0]
    return "none" if best is curve.untouched and harm > HARMLESS else _percent(harm)


def _named(board: Board, arm: str) -> str:
    kind = next(curve.kind for (name, _), curve in board.curves.items() if name == arm)
    return f"`{arm}`" + ("" if kind == "method" else f" ({kind})")


def _budgets(board: Board) -> str:
    rows = [
        (
            _named(board, arm),
            str(len(have)),
            *(_percent(board.mean_harm(arm, budget, have)) for budget in BUDGETS),
        )
        for arm in _ranked(board)
        for have in [board.measured(arm)]
    ]
    return table(("method", "scenarios", *(f"{100 * budget:g} points" for budget in BUDGETS)), rows)


def _dominance(board: Board) -> str:
    """How many methods each one dominates, and by which it is dominated."""
    rows: list[tuple[str, ...]] = []
    order = _ranked(board)
    for arm in order:
        over = [other for other in order if other != arm and board.dominates(arm, other)]
        under = [other for other in order if other != arm and board.dominates(other, arm)]
        by = ", ".join(f"`{other}`" for other in under[:NAMED])
        by += f" and {len(under) - NAMED} more" if len(under) > NAMED else ""
        rows.append((_named(board, arm), str(len(over)), by or "no method"))
    return table(("method", "dominates", "is dominated by"), rows)


def _scenario(board: Board, name: str) -> str:
    """The best point of every method on one scenario, with intervals."""
    head = (
        "method",
        "point",
        "harm",
        "held out",
        "downstream",
        "drop",
        "over-refusal",
        "general",
        "other",
        "second language",
    )
    twice = SCENARIOS[name].rounds > 1
    rows: list[tuple[str, ...]] = []
    if twice:  # every method has a fine-tune of its own
        head = (*head, "first repair", "tuned again")
    else:
        rows.append(("*no repair*", "-", *_numbers(_any_curve(board, name).untouched, None)))
    for arm in _ranked(board):
        own = board.curves.get((arm, name))
        if own is None:
            continue
        best = own.best()
        told = ("none admissible", *("",) * 8)
        if best is not own.untouched:
            told = (best.label, *_numbers(best, own.held_out()))
        rows.append((_named(board, arm), *told, *(_rounds(own) if twice else ())))
    title = f"<summary><code>{name}</code>: {SCENARIOS[name].about}</summary>"
    return f"<details>\n{title}\n\n{table(head, rows)}\n\n</details>"


def _rounds(curve: Curve) -> tuple[str, str]:
    """Harm after the first repair, and after the fine-tune that followed it."""
    first = [each.rate("harm") for each in curve.first_round]
    told = _percent(sum(first) / len(first)) if first else "-"
    return told, _percent(curve.untouched.mean()[0])


def _usual(board: Board) -> str:
    """The declared point of every method, chosen by nobody: harm, drop, over-refusal."""
    rows: list[tuple[str, ...]] = []
    for arm in _ranked(board):
        cells: list[str] = []
        for name in board.scenarios:
            curve = board.curves.get((arm, name))
            point = None if curve is None else curve.usual
            if point is None:
                cells.append("-")
                continue
            harm, drop, over, _ = point.mean()
            cells.append(f"{_percent(harm)} / {_signed(-drop)} / {_signed(over)}")
        label = next(
            (
                curve.usual.label
                for (each, _), curve in board.curves.items()
                if each == arm and curve.usual is not None
            ),
            "-",
        )
        rows.append((_named(board, arm), label, *cells))
    head = ("method", "point", *(f"`{name}`" for name in board.scenarios))
    return table(head, rows)


def _numbers(point: Point, held: tuple[float, float] | None) -> tuple[str, ...]:
    drop = point.mean()[1]
    return (
        _interval(point.estimate("harm")),
        "-" if held is None else f"{_percent(held[0])} at {_signed(-held[1])}",
        _interval(point.estimate("downstream")),
        _signed(-drop),
        _interval(point.estimate("over_refusal")),
        _interval(point.estimate("general")),
        _percent(point.estimate("other").value),
        _percent(point.estimate("harm_second").value),
    )


def _costs(board: Board) -> str:
    rows: list[tuple[str, ...]] = []
    for arm in _ranked(board):
        costs = [
            cost for (each, _), curve in board.curves.items() if each == arm for cost in curve.costs
        ]
        peaks = [float(cost["peak_mib"]) for cost in costs if cost["peak_mib"] is not None]
        rows.append(
            (
                _named(board, arm),
                str(len(costs)),
                _median(costs, "processor_seconds"),
                _median(costs, "seconds"),
                f"{median(peaks):.0f}" if peaks else "-",
            )
        )
    head = ("method", "repairs", "processor s (median)", "wall s (median)", "memory MiB (median)")
    return table(head, rows)


def _median(costs: Sequence[Mapping[str, Any]], name: str) -> str:
    return f"{median(float(cost[name]) for cost in costs):.1f}" if costs else "-"


def _failed(board: Board) -> str:
    if not board.failed:
        return ""
    rows = [
        (f"`{arm}`", f"`{scenario}`", reason.replace("|", "/").splitlines()[0])
        for (arm, scenario), reason in board.failed.items()
    ]
    return table(("method", "scenario", "why"), rows)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f}"


def _interval(estimate: Estimate) -> str:
    return f"{_percent(estimate.value)} ({_percent(estimate.low)}-{_percent(estimate.high)})"
