"""The tables of docs/results.md are what the recorded measurements say."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fill_in(page: Path) -> None:
    """Run the script that writes tables and figures of the data into the page."""
    script = ROOT / "benchmarks" / "claim" / "draw_claim.py"
    data = ROOT / "docs" / "data"
    subprocess.run(
        [sys.executable, str(script), str(data / "claim.jsonl"), str(data / "grid.jsonl"), page],
        check=True,
        timeout=120,
    )


def test_the_page_holds_what_the_data_say(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    shutil.copy(ROOT / "docs" / "results.md", page)
    fill_in(page)
    assert page.read_text() == (ROOT / "docs" / "results.md").read_text()


def test_a_table_that_was_edited_by_hand_is_noticed(tmp_path: Path) -> None:
    """The test above can fail: the script puts an altered figure back."""
    page = tmp_path / "results.md"
    text = (ROOT / "docs" / "results.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| replace |"))
    page.write_text(text.replace(row, "| replace | 0.0 |", 1))
    fill_in(page)
    assert page.read_text() == text
