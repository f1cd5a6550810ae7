from __future__ import annotations

import pytest
from support.report_support import HOSTILE, make_report, rate

from realign.report.view import (
    columns_of,
    place,
    rate_rows,
    template_grids,
    verdict_rows,
    weight_grid,
)


def test_columns_are_in_reading_order() -> None:
    assert [column.title for column in columns_of(make_report())] == [
        "aligned",
        "fine-tuned",
        "repaired",
    ]


def test_accuracy_is_the_complement_with_its_interval_mirrored() -> None:
    report = make_report(
        rates=[rate("subject", "order", "error_rate", "exact-match", 20, 200, (0.06, 0.15))]
    )
    (row,) = rate_rows(columns_of(report))
    (cell,) = row.cells
    assert row.label == "accuracy"
    assert cell is not None
    assert (cell.value, cell.low, cell.high) == pytest.approx((0.9, 0.85, 0.94))


def test_a_judge_is_named_only_where_there_are_several() -> None:
    both = [
        rate("subject", "harmful", "asr", judge, 3, 10, (0.1, 0.6))
        for judge in ("oracle", "logprob")
    ]
    alone = [rate("subject", "order", "error_rate", "exact-match", 3, 10, (0.1, 0.6))]
    labels = [row.label for row in rate_rows(columns_of(make_report(rates=both + alone)))]
    assert labels == ["harmful compliance [oracle]", "harmful compliance [logprob]", "accuracy"]


def test_a_model_without_a_rate_has_a_gap_and_no_zero() -> None:
    rates = [
        rate("reference", "harmful", "asr", "oracle", 0, 10, (0, 0.3)),
        rate("subject", "order", "error_rate", "exact-match", 1, 10, (0, 0.4)),
    ]
    rows = rate_rows(columns_of(make_report(rates=rates)))
    assert [[cell is None for cell in row.cells] for row in rows] == [[False, True], [True, False]]


def test_verdict_rows_fall_back_to_the_instrument() -> None:
    data = make_report().comparisons[0].model_dump() | {
        "suite": None,
        "metric": None,
        "judge": None,
    }
    (row,) = verdict_rows(make_report(comparisons=[data]))
    assert (row.suite, row.label, row.judge) == ("harmful", "compliance", "oracle")
    assert row.against == "fine-tuned - aligned"


def test_templates_become_one_grid_per_suite() -> None:
    (grid,) = template_grids(columns_of(make_report()))
    assert grid.rows == ("t01", "t02", HOSTILE)
    assert grid.columns == ("aligned", "fine-tuned", "repaired")
    assert grid.values[0] == (0.0, 1.0, 0.08)


def test_weight_grid_places_modules_and_layers() -> None:
    report = make_report()
    assert report.weights is not None
    grid = weight_grid(report.weights.groups[0])
    assert grid is not None
    assert grid.rows == ("q_proj", HOSTILE)
    assert grid.columns == ("0", "1")
    assert grid.values[0] == pytest.approx((0.05, 0.15))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.layers.12.self_attn.q_proj.weight", ("q_proj", 12)),
        ("transformer.h.0.attn.c_attn.weight[k_proj]", ("k_proj", 0)),
        ("model.layers.3.mlp.experts.gate_up_proj[7]", ("gate_up_proj", 3)),
        ("lm_head.weight", ("lm_head", None)),
    ],
)
def test_places(key: str, expected: tuple[str, int | None]) -> None:
    assert place(key) == expected
