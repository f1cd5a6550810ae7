from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.report_support import HOSTILE, make_report

from realign.audit.schema import Report
from realign.report.html import interval_bar, render
from realign.report.pictures import Line, Panel
from realign.report.repair import RepairStory
from realign.report.view import Column, columns_of

STORY = RepairStory(
    facts=(("method", "lssf eta=0.85"), ("note", HOSTILE)),
    panels=(Panel("rank", (Line("q_proj", ((0, 3.0), (1, 5.0))),)),),
)


class Page(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "h2" and data.strip():
            self.headings.append(data.strip())
        self.text.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render(make_report(), repair=STORY)


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in {"script", "link", "iframe", "object"}]
    for _, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"an event handler: {name}"
            if name in {"src", "href", "xlink:href", "action", "data"}:
                assert (value or "").startswith("#"), f"leads out of the page: {value}"
    assert "@import" not in page
    policy = next(a["content"] for _, a in parsed.tags if a.get("http-equiv") is not None)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script" not in policy.replace("default-src", "")


def test_hostile_names_are_text(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert HOSTILE in "".join(Page(page).text)


def test_the_order_of_the_page(page: str) -> None:
    assert Page(page).headings == [
        "What was measured",
        "Verdicts",
        "Invalid answers and agreement of judges",
        "Hazards and templates",
        "Gates",
        "Findings",
        "Weights",
        "The repair",
        "Limits",
        "Appendix",
    ]


def test_numbers_verdicts_and_hashes_are_there(page: str) -> None:
    text = " ".join("".join(Page(page).text).split())
    for part in (
        "98.0 %",
        "+1.7 to +10.1 (tango)",
        "drift found",
        "within the declared margin",
        "not enough data to say",
        "recovered 109.1 % of the drift",
        "weight screening: NOT validated",
        "0.81",
        "1" * 40,
        "13" * 32,
        "no adaptive attack was run",
        "lssf eta=0.85",
    ):
        assert part in text


def test_it_stays_small(page: str) -> None:
    assert len(page.encode()) < 2_000_000


def test_a_bare_report_renders() -> None:
    empty: dict[str, object] = dict.fromkeys(
        ("rates", "comparisons", "agreement", "templates", "gates"), ()
    )
    page = render(
        make_report(**empty, weights=None, policy=None, weights_reason="no base was given")
    )
    assert "no verdicts: no policy" in page
    assert "no base was given" in page


def test_models_of_several_reports_stand_side_by_side() -> None:
    report = make_report()
    other = Column("repaired: replace", make_report(), "repaired")
    page = render(report, columns=(*columns_of(report), other))
    assert page.count("repaired: replace") >= 2


def test_the_deciding_interval_is_a_bar_and_the_second_one_a_line() -> None:
    report: Report = make_report()
    bar = interval_bar(report.comparisons[0], limit=0.2, width=200)
    # Zero stands at pixel 100 and 0.2 at 200: 0.016511 at 108.3, the second interval's at 107.0.
    assert '<rect x="108.3" y="5" width="42.4"' in bar
    assert 'x1="107.0"' in bar
    assert "stroke-dasharray" in bar, "the margin"
    assert interval_bar(report.comparisons[0].model_copy(update={"ci": None}), limit=1) == ""


def browser() -> str | None:
    return shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


@pytest.mark.skipif(browser() is None, reason="no chromium on this machine to look at the page")
def test_a_browser_draws_it(tmp_path: Path, page: str) -> None:
    file, picture = tmp_path / "report.html", tmp_path / "page.png"
    file.write_text(page, "utf-8")
    command = [
        browser() or "",
        *["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"],
        *["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"],
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={picture}",
        "--window-size=1000,1600",
        file.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    import numpy as np
    from matplotlib.image import imread

    pixels = np.asarray(imread(picture))[..., :3]
    assert pixels.shape[0] >= 1000
    ink = (pixels.mean(axis=2) < 0.9).mean()
    assert 0.01 < ink < 0.6, "neither blank nor black"
    # Text and tables span the page: no column may be squeezed to a letter's width.
    columns = (pixels.mean(axis=2) < 0.9).any(axis=0)
    assert columns.mean() > 0.6
