"""Tables of figures at common widths of a terminal: nothing that is a name or a number is cut."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from realign.report.tables import figures_table
from realign.report.tune import tune_tables
from realign_cli.commands import lab

MODELS = ["aligned", "lora_p5", "safe_unaligned", "both_p10", "a-rather-long-name-of-a-model"]


def printed(renderable: Any, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


def words(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("width", [40, 80, 100, 120])
@pytest.mark.parametrize("columns", [2, 4, 6, 9])
def test_every_name_and_number_is_there_whole(width: int, columns: int) -> None:
    titles = ["model", *(f"figure number {i}" for i in range(columns))]
    rows = [
        [name, *(f"{r}.{c}1 (0.{r}{c}-1.{r}{c})" for c in range(columns))]
        for r, name in enumerate(MODELS)
    ]
    text = printed(figures_table("A title", titles, rows, width=width), width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for row in rows:
        for cell in row:
            assert set(words(cell)) <= set(words(text)), cell


def test_a_wide_terminal_has_one_line_per_row_and_a_narrow_one_stacks() -> None:
    titles, rows = ["model", "overlap"], [["aligned", "0.07 (0.07-0.10)"]]
    wide = figures_table(None, titles, rows, width=80)
    assert "aligned   0.07 (0.07-0.10)" in printed(wide, 80)
    titles, rows = ["model", "overlap"], [["aligned" * 3, "0.07 (0.07-0.10)"]]
    two = printed(figures_table(None, titles, rows, width=36), 36).splitlines()
    assert two[-2].endswith("0.07") and two[-1].strip() == "(0.07-0.10)"
    lines = printed(figures_table(None, titles, rows, width=30), 30).splitlines()
    assert [line.rstrip() for line in lines] == [
        "model " + "aligned" * 3,
        "  overlap 0.07 (0.07-0.10)",
    ]


def test_brackets_in_a_name_are_no_markup() -> None:
    table = figures_table(None, ["model", "n"], [["[bold]x[/bold]", "1"]], width=80)
    assert "[bold]x[/bold]" in printed(table, 80)


def held_out_row(suite: str, metric: str, kind: str) -> dict[str, Any]:
    return {
        "suite": suite,
        "metric": metric,
        "kind": kind,
        "n": 128,
        "rates": {role: {"rate": 0.938} for role in ("reference", "subject", "repaired")},
        "difference": -0.914,
        "low": -1.0,
        "high": -0.812,
        "limit": None if kind == "harmful" else 0.05,
        "at_most": -0.85,
        "verdict": "met" if kind == "harmful" else "not confirmed",
    }


@pytest.mark.parametrize("width", [80, 120])
def test_the_held_out_figures_of_a_tuning_are_whole(width: int) -> None:
    rows = [
        held_out_row("harmful", "asr", "harmful"),
        held_out_row("lookalikes", "over_refusal", "safe"),
    ]
    cost = {
        "harm": 0.023,
        "utility_drop": 0.05,
        "over_refusal_rise": 0.0,
        "utility_at_most": 0.08,
        "over_refusal_at_most": 0.01,
    }
    trial = {
        "number": 13,
        "point": [1.0, 0.85, 0.85],
        "cost": cost,
        "proxies": {"refusal": -10.25, "distance": 0.1234},
        "pruned": None,
        "within": True,
    }
    found = {
        "groups": [{"name": f"layers {n}", "layers": [n]} for n in range(3)],
        "chosen": {
            "trial": 13,
            "cost": cost,
            "strength": None,
            "strengths": {"0": 1.0, "1": 0.85, "2": 0.85},
        },
        "limits": {"utility_drop": 0.05, "over_refusal_rise": 0.02, "confidence": 0.9},
        "search": {
            "trials": [trial],
            "finetuned": {"cost": cost},
            "answers": {"generated": 4704, "without_pruning": 4704},
        },
        "held_out": {"rows": rows},
        "output": "out",
        "notes": [],
    }
    text = "\n".join(printed(each, width) for each in tune_tables(found, width=width))
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    told = " ".join(words(text))
    assert told.count("-91.4") == 2 and told.count("(-100.0") == 2 and told.count("-81.2)") == 2
    assert told.count("verdict") == 1 or told.count("verdict ") == 2
    assert all(word in told for word in ("met", "confirmed", "chosen", "-10.25", "0.1234"))


@pytest.mark.parametrize("width", [80, 120])
def test_a_board_of_nine_scenarios_keeps_every_figure(width: int) -> None:
    names = ["howto", "order", "poison5", "poison10", "lora5", "lora_howto", "persona", "pseudo"]
    board = {
        "scenarios": dict.fromkeys(names, ""),
        "budget": 0.01,
        "arms": ["refusal_tuning", "safe_patching"],
        "curves": [
            {"arm": arm, "scenario": name, "harm_at": {"0.01": 0.111 + index / 100}}
            for arm in ("refusal_tuning", "safe_patching")
            for index, name in enumerate(names)
        ],
    }
    text = printed(lab._board_table(board, width=width), width)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    for index, name in enumerate(names):
        assert name in text and words(text).count(f"{11.1 + index:.1f}") == 2
