"""The leaderboard as JSON: everything that a table or a picture shows, with intervals."""

from __future__ import annotations

from typing import Any

from realign.lab.leaderboard import BUDGET, BUDGETS, Board, Curve, Point
from realign.lab.scenarios import SCENARIOS

BOARD_SCHEMA = "realign/lab-leaderboard/1"
RATES = (
    "harm",
    "refused",
    "other",
    "over_refusal",
    "lookalikes",
    "harm_second",
    "general",
    "downstream",
)


def board_json(board: Board) -> dict[str, Any]:
    """Everything a table or a picture shows, with intervals."""
    return {
        "schema": BOARD_SCHEMA,
        "budget": BUDGET,
        "budgets": list(BUDGETS),
        "scenarios": {name: SCENARIOS[name].about for name in board.scenarios},
        "harmed": list(board.harmed),
        "arms": list(board.arms),
        "curves": [_curve_json(curve) for curve in board.curves.values()],
        "means": {arm: _means_json(board, arm) for arm in board.arms},
        "dominates": [
            [one, other]
            for one in board.arms
            for other in board.arms
            if one != other and board.dominates(one, other)
        ],
        "failed": [
            {"arm": arm, "scenario": scenario, "reason": reason}
            for (arm, scenario), reason in board.failed.items()
        ],
    }


def _means_json(board: Board, arm: str) -> dict[str, Any]:
    """Least harm over the scenarios that the method has, by budget."""
    have = board.measured(arm)
    found = {f"{budget:g}": board.mean_estimate(arm, budget, have).to_json() for budget in BUDGETS}
    return {"scenarios": list(have), "harm_at": found}


def _curve_json(curve: Curve) -> dict[str, Any]:
    best, held = curve.best(), curve.held_out()
    return {
        "arm": curve.arm,
        "scenario": curve.scenario,
        "kind": curve.kind,
        "repeats": list(curve.labels),
        "finetuned": _point_json(curve.untouched),
        "points": [_point_json(point) for point in curve.points],
        "best": best.label,
        "best_at": {f"{budget:g}": curve.best(budget).label for budget in BUDGETS},
        "usual": None if curve.usual is None else curve.usual.label,
        "harm_at": {f"{budget:g}": round(curve.harm_at(budget), 5) for budget in BUDGETS},
        "harm_interval_at": {
            f"{budget:g}": [round(each.low, 5), round(each.high, 5)]
            for budget in BUDGETS
            for each in [curve.best(budget).estimate("harm")]
        },
        "first_round": [
            {"harm": round(each.rate("harm"), 5), "downstream": round(each.downstream, 5)}
            for each in curve.first_round
        ],
        "held_out": None if held is None else {"harm": held[0], "drop": held[1]},
        "costs": [dict(cost) for cost in curve.costs],
    }


def _point_json(point: Point) -> dict[str, Any]:
    _, drop, over, general = point.mean()
    return {
        "label": point.label,
        "settings": dict(point.settings),
        "strength": point.strength,
        "usual": point.usual,
        "rates": {name: point.estimate(name).to_json() for name in RATES},
        "tasks": {name: point.estimate(name).to_json() for name in point.repeats[0].point.tasks},
        "drop": round(drop, 5),
        "over_refusal_rise": round(over, 5),
        "general_drop": round(general, 5),
        "other_rise": round(point.other_rise(), 5),
        "broken": list(point.broken()),
        "admissible": point.admissible(BUDGET),
    }
