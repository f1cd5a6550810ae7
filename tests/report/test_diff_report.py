"""A comparison in words, tables and pictures: what is first, what is drawn, what is left out."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.checkpoint_support import LLAMA, llama_tensors, write_model
from support.diff_support import difference

from realign.diff.result import Difference
from realign.report.diff import diff_tables, headline, percent, ranked, share
from realign.report.diff_files import render_page
from realign.report.diff_pictures import change_map, diff_picture, percent_digits

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "small"


@pytest.fixture(scope="module")
def family() -> Difference:
    return difference(FIXTURES / "aligned", FIXTURES / "howto")


def text(found: Difference, *, width: int, top: int = 5) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    for part in diff_tables(found, top=top, order="relative", width=width):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_tables_fit_and_nothing_is_cut(family: Difference, width: int) -> None:
    shown = text(family, width=width)
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown


def test_most_changed_first_and_missing_tensors_before_all(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=1)
    del b["model.norm.weight"]
    b["model.layers.0.mlp.up_proj.weight"] += 1.0
    b["model.layers.0.mlp.down_proj.weight"] += 0.1
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    assert [row.name.split(".")[-2] for row in ranked(found.rows, order="relative")] == [
        "norm", "up_proj", "down_proj",
    ]  # fmt: skip
    assert [row.module for row in ranked(found.rows, order="file")] == [
        row.module for row in found.rows if row.status != "identical"
    ]
    assert "only in A" in text(found, width=80)
    assert "12 tensors: 2 changed, 9 identical, 1 only in A" in list(headline(found))


def test_the_picture_has_a_cell_for_every_layer_and_module(family: Difference) -> None:
    drawn = change_map(family)
    assert drawn.rows == ("0", "1", "2", "embed_tokens", "norm") and drawn.layers == 3
    assert drawn.columns[-2:] == ("input_layernorm", "post_attention_layernorm")
    for layer, cells in enumerate(drawn.cells[:3]):
        for module, cell in zip(drawn.columns, cells, strict=True):
            (row,) = [r for r in family.rows if (r.layer, r.module) == (layer, module)]
            assert row.figures is not None and cell == row.figures.relative
    assert all(cell is None for cells in drawn.cells[3:] for cell in cells)
    assert drawn.bars[:3] == tuple(group.figures.relative for group in family.layers)


def test_nothing_to_draw(tmp_path: Path) -> None:
    same = difference(FIXTURES / "base", FIXTURES / "base")
    assert diff_picture(same) is None and "<svg" not in render_page(same)
    only = {"steps": torch.tensor([1])}
    other = {"steps": torch.tensor([2])}
    found = difference(
        write_model(tmp_path / "a", only, config=LLAMA),
        write_model(tmp_path / "b", other, config=LLAMA),
    )
    assert diff_picture(found) is None
    assert "1 tensor: 1 changed" in text(found, width=80)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0469, "4.69 %"), (0.000123, "0.0123 %"), (0.0, "0 %"), (12.0, "1200 %"), (None, "-")],
)
def test_fractions(value: float | None, shown: str) -> None:
    assert percent(value) == shown


def test_only_all_is_100_percent() -> None:
    assert [share(n, 10_000) for n in (0, 1, 5_000, 9_999, 10_000)] == [
        "0 %", "0.1 %", "50.0 %", "99.9 %", "100 %",
    ]  # fmt: skip
    assert [percent_digits(x) for x in (0.0, 0.00012, 0.047, 0.5, 1.18)] == [
        "0", "0.012", "4.7", "50", "118",
    ]  # fmt: skip
