"""A comparison in words, tables and pictures: what is first, what is drawn, what is left out."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.checkpoint_support import LLAMA, llama_tensors, write_model
from support.diff_support import difference

from realign.diff.result import Difference, Group
from realign.report.diff import diff_tables, headline, percent, ranked, share
from realign.report.diff_files import render_page
from realign.report.diff_pictures import change_map, diff_picture, percent_digits
from realign.report.diff_sides import folded
from realign.report.tables import elide

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


@pytest.mark.parametrize("width", [80, 100, 120, 160, 200])
def test_tables_fit_and_no_row_of_them_wraps(family: Difference, width: int) -> None:
    lines = text(family, width=width, top=100).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines), "nothing is cut"
    changed = ranked(family.rows, order="relative")
    sections = {
        "Tensors that differ": [row.name for row in changed],
        "By layer": [group.key for group in family.layers],
        "By module": [group.key for group in _by_change(family.modules)],
    }
    for title, names in sections.items():
        at = next(n for n, line in enumerate(lines) if line.startswith(title))
        body = [line.split() for line in lines[at + 3 : at + 3 + len(names)]]
        assert [cells[0] for cells in body] == names
        assert not lines[at + 3 + len(names)].strip()


def _by_change(groups: tuple[Group, ...]) -> list[Group]:
    return sorted(groups, key=lambda group: -(group.figures.relative or 0.0))


def test_the_page_orders_modules_as_the_terminal_does_and_breaks_names_at_dots(
    family: Difference,
) -> None:
    page = render_page(family)
    section = page[page.index("<h2>By module") : page.index("<h2>Tensors that differ")]
    assert re.findall(r"<tr><td>(\w+)</td>", section) == [
        group.key for group in _by_change(family.modules)
    ]
    name = ranked(family.rows, order="relative")[0].name
    assert f"<code>{name.replace('.', '.<wbr>')}</code>" in page


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_long_names_are_elided_and_still_tell_layer_and_tensor(tmp_path: Path, width: int) -> None:
    names = [
        f"model.language_model.layers.{layer}.block_sparse_moe.experts.{n}.{part}_proj.weight"
        for layer in (3, 11) for n in (7, 12) for part in ("gate", "up")
    ]  # fmt: skip
    one = {name: torch.ones(4, 4) for name in names}
    two = {name: torch.full((4, 4), 2.0 + n) for n, name in enumerate(names)}
    found = difference(write_model(tmp_path / "a", one), write_model(tmp_path / "b", two))
    lines = text(found, width=width, top=100).splitlines()
    assert max(map(len, lines)) <= width
    at = next(n for n, line in enumerate(lines) if line.startswith("Tensors that differ"))
    body = [line.split() for line in lines[at + 3 : at + 3 + len(names)]]
    assert not lines[at + 3 + len(names)].strip(), "a row is a line"
    assert len({cells[0] for cells in body}) == len(names), "no two look alike"
    for cells, name in zip(body, reversed(names), strict=True):
        assert name.endswith(cells[0][-16:]) and name.split(".")[3] + "." in cells[0]
        assert len(cells) >= 6, "name, relative, cosine and changed are there"
    if width == 120:
        assert [cells[0] for cells in body] == names[::-1], "columns give way before names do"


def test_elision() -> None:
    name = "model.layers.12.self_attn.q_proj.weight"
    assert elide(name, 39) == name
    assert elide(name, 30) == "mod\N{HORIZONTAL ELLIPSIS}12.self_attn.q_proj.weight"
    assert elide(name, 20).startswith("\N{HORIZONTAL ELLIPSIS}12.\N{HORIZONTAL ELLIPSIS}")
    for width in range(12, 40):
        assert len(elide(name, width)) <= width
        assert len(elide("vision_tower.embeddings.position_embedding.weight", width)) == width


def test_tensors_of_one_side_are_counted_and_do_not_crowd_out_the_others(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=1)
    b["model.norm.weight"] += 1.0
    for n in range(20):
        a[f"model.vision_tower.layers.{n}.mlp.fc1.weight"] = torch.ones(4, 4)
        a[f"model.vision_tower.layers.{n}.mlp.fc2.weight"] = torch.ones(4, 4)
        a[f"model.vision_tower.layers.{n}.ln_{n % 3}.weight"] = torch.ones(4)
    a["model.multi_modal_projector.linear_1.weight"] = torch.ones(4, 4)
    b["extra.weight"] = torch.ones(4)
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    shown = text(found, width=100)
    assert (
        "61 tensors only in A: model.multi_modal_projector.*, model.vision_tower.* (60)" in shown
    ) and "1 tensor only in B: extra.weight" in shown
    table = shown[shown.index("Tensors that differ") :]
    assert table.splitlines()[3].startswith("model.norm.weight") and "1 of 62" not in table
    assert "0 of 0" not in shown and "fc1" not in table and "extra" not in table
    statuses = [row["status"] for row in found.to_json()["tensors"]]
    assert statuses.count("only_a") == 61 and statuses.count("only_b") == 1
    assert {"fc1", "fc2"} <= {group["key"] for group in found.to_json()["modules"]}
    page = render_page(found).replace("<wbr>", "")
    assert "0 of 0" not in page and page.count("only in A") >= 61
    assert page.index("<code>model.norm.weight") < page.index("<code>model.vision_tower")


def test_folded_names() -> None:
    few = ["a.0.bias", "b.weight"]
    assert folded(few) == "a.0.bias, b.weight"
    layers = [f"model.layers.{n}.{part}.bias" for n in range(3) for part in ("q", "k")]
    assert folded(layers) == "model.layers.*.q.bias (3), model.layers.*.k.bias (3)"
    tops = [f"top{n}.x" for n in range(7)]
    assert folded(tops) == "top0.*, top1.*, top2.*, top3.* and 3 more"


def test_most_changed_first_and_missing_tensors_last(tmp_path: Path) -> None:
    a, b = llama_tensors(seed=1), llama_tensors(seed=1)
    del b["model.norm.weight"]
    b["model.layers.0.mlp.up_proj.weight"] += 1.0
    b["model.layers.0.mlp.down_proj.weight"] += 0.1
    found = difference(write_model(tmp_path / "a", a), write_model(tmp_path / "b", b))
    assert [row.name.split(".")[-2] for row in ranked(found.rows, order="relative")] == [
        "up_proj", "down_proj", "norm",
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
