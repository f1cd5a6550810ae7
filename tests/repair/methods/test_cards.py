from __future__ import annotations

from pathlib import Path

import pytest

from realign.repair.cards import render_card, render_cards, write_cards
from realign.repair.methods.lssf import Lssf
from realign.repair.registry import METHODS

DOCS = Path(__file__).resolve().parents[3] / "docs" / "methods"

HOW = "make the pages anew: realign.repair.cards.write_cards(Path('docs/methods'))"


def test_the_shipped_pages_are_what_the_cards_say() -> None:
    pages = render_cards()
    assert {path.name for path in DOCS.glob("*.md")} == set(pages), HOW
    for name, text in pages.items():
        assert (DOCS / name).read_text(encoding="utf-8") == text, f"{name}: {HOW}"


def test_pages_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    write_cards(tmp_path / "new" / "methods")
    assert {path.name for path in (tmp_path / "new" / "methods").iterdir()} == set(render_cards())


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda m: m.name)
def test_a_page_names_every_parameter_and_its_source(method: type) -> None:
    page = render_card(method)
    for each in method.parameters():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{each.name}` "))
        assert each.domain.describe() in row
        assert each.source in row
        assert row.count("|") == 7  # no cell splits its row
    assert method.card.source in page


def test_the_page_of_lssf_gives_the_command_with_its_papers_vector() -> None:
    assert "--unaligned MODEL --method lssf" in render_card(Lssf)
