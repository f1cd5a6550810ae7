from __future__ import annotations

import io

import pytest
from rich.console import Console
from support.report_support import make_report

from realign.audit.schema import Report
from realign.report.terminal import rates_table, render
from realign.report.view import columns_of


def drawn(report: Report, *, width: int) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, no_color=True)
    for part in render(report, width=width):
        console.print(part)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_cut_off(width: int) -> None:
    text = drawn(make_report(), width=width)
    assert all(len(line) <= width for line in text.splitlines())
    words = " ".join(text.split())
    for part in (
        "Fine-tuning raised harmful compliance from 1.0 % to 98.0 %.",
        "harmful compliance",
        "68.6-100.0",
        "drift: fine-tuned - aligned",
        "+1.7 to +10.1",
        "drift found",
        "280 items",
        "PASS",
        "INCONCLUSIVE",
        "weight screening: NOT validated",
        "no adaptive attack was run",
    ):
        assert part in words


def test_a_verdict_keeps_all_its_words_on_a_narrow_terminal() -> None:
    # The verdict column is the one that wraps; its words must all be there, in order.
    lines = drawn(make_report(), width=80).splitlines()
    start = next(at for line in lines if (at := line.find("verdict (margin)")) >= 0)
    column = [line[start:].strip() for line in lines]
    text = " ".join(part for part in column if part)
    assert "within the declared margin (3.0 pp)" in text
    assert "not enough data to say (3.0 pp): too few items for this margin" in text


def test_without_a_policy_it_says_so() -> None:
    text = drawn(make_report(policy=None, gates=[], comparisons=[]), width=80)
    assert "no verdicts: no policy" in text
    assert "drift found" not in text


def test_an_incomplete_run_says_so_first() -> None:
    data = make_report().run.model_dump() | {"status": "incomplete", "exit_code": 2}
    assert drawn(make_report(run=data), width=80).startswith("INCOMPLETE")


def test_invalid_answers_stand_in_the_cell() -> None:
    rate = make_report().rates[0].model_dump() | {"n_valid": 190, "n_invalid": {"empty": 10}}
    assert "10 invalid" in drawn(make_report(rates=[rate]), width=100)


def test_a_verdict_stands_under_the_rate_it_is_about() -> None:
    report = make_report()
    stream = io.StringIO()
    table = rates_table(columns_of(report), width=100, verdicts=True, metrics=[("harmful", "asr")])
    Console(file=stream, width=100, no_color=True).print(table)
    text = stream.getvalue()
    assert "drift found" in text
    assert "within the declared margin" in text
    assert "accuracy" not in text, "only the metrics that were asked for"
