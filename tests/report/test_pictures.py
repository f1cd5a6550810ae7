from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.report_support import HOSTILE

from realign.report.pictures import (
    Bar,
    Grid,
    Line,
    Panel,
    cell_text,
    heat_map,
    layer_panels,
    rate_bars,
    save,
    to_svg,
)

BARS = tuple(
    Bar(group, model, value, value * 0.8, value * 0.9 + 0.1)
    for group, value in (("harmful", 0.3), ("over-refusal", 0.7))
    for model in ("aligned", "fine-tuned", HOSTILE)
)


def figures() -> list[Figure]:
    lines = tuple(Line(name, ((0, 1.0), (1, 2.5))) for name in ("q_proj", HOSTILE))
    grid = Grid("drift", ("q_proj", HOSTILE), ("0", "1"), ((0.1, None), (0.5, 0.9)))
    return [rate_bars(BARS, title="rates"), layer_panels([Panel("rank", lines)]), heat_map(grid)]


@pytest.mark.parametrize("index", range(3))
def test_a_picture_is_well_formed_and_shows_names_as_they_are(index: int) -> None:
    svg = to_svg(figures()[index], label=f"picture {index}")
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == f"picture {index}"
    texts = [text for node in root.iter() if (text := "".join(node.itertext()).strip())]
    assert any(HOSTILE in text for text in texts), "escaped, and no mathematics made of it"
    assert not [node for node in root.iter() if node.tag.endswith("script")]


def test_same_data_same_bytes() -> None:
    first, second = (to_svg(rate_bars(BARS), label="x") for _ in range(2))
    assert first == second


def test_two_pictures_on_one_page_share_no_ids() -> None:
    def ids(label: str) -> set[str]:
        root = ElementTree.fromstring(to_svg(rate_bars(BARS), label=label))
        return {identity for node in root.iter() if (identity := node.get("id"))}

    assert not ids("first") & ids("second")


def test_references_inside_a_picture_lead_somewhere() -> None:
    root = ElementTree.fromstring(to_svg(rate_bars(BARS), label="x"))
    ids = {node.get("id") for node in root.iter()}
    for node in root.iter():
        for value in node.attrib.values():
            if value.startswith("url(#"):
                assert value[5:-1] in ids
            if value.startswith("#") and len(value) not in (4, 7):
                assert value[1:] in ids


def test_a_picture_loads_nothing() -> None:
    svg = to_svg(rate_bars(BARS), label="x")
    root = ElementTree.fromstring(svg)
    for node in root.iter():
        for name, value in node.attrib.items():
            assert not (name.endswith("href") and value.startswith("http"))


def test_bars_differ_without_colour() -> None:
    # One hatch pattern for each series but the first, which is plain.
    svg = to_svg(rate_bars(BARS), label="x")
    assert svg.count("<pattern") == 2


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_files(tmp_path: Path, suffix: str) -> None:
    file = save(rate_bars(BARS), tmp_path / f"rates{suffix}")
    magic = {".png": b"\x89PNG", ".svg": b"<?xml"}[suffix]
    assert file.read_bytes().startswith(magic)


def test_empty_data_makes_an_empty_picture_not_an_error() -> None:
    for figure in (rate_bars(()), layer_panels(()), heat_map(Grid("t", (), (), ()))):
        assert to_svg(figure, label="x").startswith("<svg")


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [(0.137, True, "14"), (0.137, False, "0.14"), (123.4, False, "123"), (None, True, "")],
)
def test_cells(value: float | None, percent: bool, text: str) -> None:
    assert cell_text(value, percent=percent) == text
