"""Tables, figures in prose and pictures of the leaderboard are what the recorded data say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from realign.report.leaderboard import save_pictures

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SCRIPT = """
import json, sys
from pathlib import Path
from figures import fill_figures
from page import fill
from why_page import why_tables
docs = Path(sys.argv[1])
told = json.loads((docs / "data" / "leaderboard.json").read_text("utf-8"))
answers = json.loads((docs / "data" / "why-methods-fail.json").read_text("utf-8"))
tables = {"leaderboard.md": {}, "why-methods-fail.md": why_tables(answers)}
for name, made in tables.items():
    page = docs / name
    page.write_text(fill_figures(fill(page.read_text("utf-8"), made), told, answers), "utf-8")
"""
PAGES = ("leaderboard.md", "why-methods-fail.md")


def fill_in(docs: Path) -> None:
    """Run the scripts that write tables and figures of the data into the pages."""
    subprocess.run(
        [sys.executable, "-c", SCRIPT, str(docs)],
        cwd=ROOT / "benchmarks" / "leaderboard",
        check=True,
        timeout=120,
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for name in (*PAGES, "data/leaderboard.json", "data/why-methods-fail.json"):
        shutil.copy(DOCS / name, tmp_path / name)
    return tmp_path


def test_the_pages_hold_what_the_data_say(copied: Path) -> None:
    fill_in(copied)
    for name in PAGES:
        assert (copied / name).read_text("utf-8") == (DOCS / name).read_text("utf-8")


def test_a_figure_that_was_edited_by_hand_is_noticed(copied: Path) -> None:
    """The test above can fail: altered figures are put back, in prose and in tables."""
    for name, mark in (("leaderboard.md", "-->"), ("why-methods-fail.md", "| ")):
        page = copied / name
        text = (DOCS / name).read_text("utf-8")
        line = next(each for each in text.splitlines() if "<!--harm|" in each or " (p 0." in each)
        at = line.index(mark) + len(mark)
        page.write_text(text.replace(line, line[:at] + "77" + line[at:], 1), "utf-8")
    fill_in(copied)
    for name in PAGES:
        assert (copied / name).read_text("utf-8") == (DOCS / name).read_text("utf-8")


def test_the_pictures_are_those_of_the_data(tmp_path: Path) -> None:
    told = json.loads((DOCS / "data" / "leaderboard.json").read_text("utf-8"))
    for picture in save_pictures(told, tmp_path):
        assert picture.read_bytes() == (DOCS / "pictures" / picture.name).read_bytes()


def test_every_test_that_the_page_cites_is_there() -> None:
    page = (DOCS / "why-methods-fail.md").read_text("utf-8")
    file = ""
    cited = re.findall(r"`(test_\w+\.py)?(?:::)?(test_\w+)?`", page)
    assert len(cited) > 20
    for named, test in cited:
        file = named or file
        text = next(ROOT.joinpath("tests").rglob(file)).read_text("utf-8")
        assert f"def {test}(" in text or not test, f"{file}::{test}"


def test_a_fine_tune_counts_when_every_method_has_repaired_it() -> None:
    code = """
from page import whole
def cell(arm, seed):
    return {"arm": arm, "family": "small", "scenario": "howto", "seed": seed}
cells = [cell("lox", 1), cell("resta", 1), cell("lox", 2), cell("late", 3), cell("lox", 3)]
print([(each["arm"], each["seed"]) for each in whole(cells, ["late"])])
print(whole(cells, [""]))
"""
    made = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks" / "leaderboard",
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert made.stdout == "[('lox', 1), ('resta', 1)]\n[]\n"


def test_what_was_not_measured_is_said() -> None:
    code = """
import sys
from figures import fill_figures
rate = {"value": 0.5, "low": 0.25, "high": 1.0}
point = {"label": "t 1", "rates": {"harm": rate}, "tasks": {}, "drop": -0.0001}
curve = {"arm": "lox", "scenario": "howto", "best_at": {"0.01": "t 1"}, "points": [point],
         "finetuned": point, "repeats": ["small seed 1"]}
told = {"curves": [curve], "dominates": [["lox", "resta"], ["irr", "lox"]]}
page = "".join(f"<!--{mark}-->?<!---->" for mark in sys.argv[1:])
print(fill_figures(page, told))
"""
    marks = {
        "harm|lox|howto|0.01": "50.0 % (25.0 to 100.0)",
        "lost|lox|howto|0.01": "0.0",
        "at|lox|howto|t 2|harm": "not measured",
        "harm|lox|poison5|0.01": "not measured",
        "seeds|howto": "1",
        "dominates|lox": "1",
    }
    made = subprocess.run(
        [sys.executable, "-c", code, *marks],
        cwd=ROOT / "benchmarks" / "leaderboard",
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert made.stdout.strip() == "".join(f"<!--{m}-->{text}<!---->" for m, text in marks.items())
    assert made.stderr.count("not measured: ") == 2
