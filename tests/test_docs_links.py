"""Every link and picture of the README and the documentation leads to a file that is there."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_TARGET = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)"  # [text](target "title"), ![text](target)
    r"|^\[[^\]]+\]:\s*<?(\S+?)>?\s*$"  # [name]: target
    r"|<(?:img|a)\b[^>]*?\b(?:src|href)=[\"']([^\"']+)",
    re.MULTILINE,
)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)


def local_targets(text: str) -> list[str]:
    """What the links of a page name, code and other sites apart."""
    prose = _CODE.sub("", _FENCE.sub("", text))
    found = [next(filter(None, match.groups())) for match in _TARGET.finditer(prose)]
    return [each for each in found if not _ELSEWHERE.match(each)]


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, spelled as GitHub does."""
    found: dict[str, int] = {}
    spelled: set[str] = set()
    for title in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        spelled.add(name if count == 0 else f"{name}-{count}")
    return spelled


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    lost: list[str] = []
    for target in local_targets(page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / unquote(name) if name else page
        named = anchor and file.suffix == ".md" and file.exists()
        if not file.exists() or (named and anchor not in anchors(file.read_text("utf-8"))):
            lost.append(target)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_noticed(tmp_path: Path) -> None:
    """The test above can fail."""
    (tmp_path / "there is.md").write_text("# A `b` c!\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](there%20is.md) [b](there%20is.md#a-b-c) [c](#here) [d](https://x.org/y)\n"
        "![p](none.png) [e](none.md#x) [f](there%20is.md#nowhere) `[g](code.md)`\n"
        '```\n[h](fenced.md)\n```\n[i]: gone.md\n<img src="lost.svg">\n'
    )
    assert broken(page) == ["none.png", "none.md#x", "there%20is.md#nowhere", "gone.md", "lost.svg"]


def test_links_are_found_at_all() -> None:
    assert sum(len(local_targets(page.read_text("utf-8"))) for page in PAGES) > 50
