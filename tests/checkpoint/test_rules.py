"""The table of rules in the documentation is that of the code, and every rule is used."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from realign.checkpoint.rules import RULES, merged, refuse, remark
from realign.errors import HeaderError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- rules: begin", "<!-- rules: end -->"


def table() -> str:
    lines = ["| id | severity | what | what to do |", "|---|---|---|---|"]
    for rule in RULES.values():
        lines.append(f"| {rule.id} | {rule.severity} | {rule.what} | {rule.fix} |")
    return "\n".join(lines)


def test_the_page_shows_the_rules_of_the_code() -> None:
    text = PAGE.read_text("utf-8")
    head, _, rest = text.partition(BEGIN)
    marker, _, rest = rest.partition("\n")
    shown, _, tail = rest.partition(END)
    if os.environ.get("REALIGN_REWRITE"):
        PAGE.write_text(f"{head}{BEGIN}{marker}\n{table()}\n{END}{tail}", "utf-8")
        return
    assert shown.strip() == table(), "run this test once with REALIGN_REWRITE=1"


def test_every_rule_is_raised_somewhere_and_no_other() -> None:
    used: set[str] = set()
    for file in (ROOT / "realign").rglob("*.py"):
        if file.name != "rules.py":
            used |= set(re.findall(r"\bRA\d{3}\b", file.read_text("utf-8")))
    assert used == set(RULES)


def test_ids_are_in_order_and_say_what_to_do() -> None:
    assert list(RULES) == sorted(RULES)
    assert all(rule.what and rule.fix and rule.severity in "CEWN" for rule in RULES.values())


def test_a_refusal_and_a_remark() -> None:
    file = Path("model.safetensors")
    error = refuse("RA013", file, "truncated")
    assert isinstance(error, HeaderError)
    assert error.message == "RA013: model.safetensors: truncated"
    assert error.hint == RULES["RA013"].fix
    assert refuse("RA013", file, "truncated", "do this").hint == "do this"
    found = [remark("RA016", Path(name), "odd") for name in "abc"] + [remark("RA017", file, "none")]
    assert merged(found) == ("RA016: a and 2 more: odd", "RA017: model.safetensors: none")


@pytest.mark.parametrize(("make", "rule"), [(refuse, "RA016"), (remark, "RA013")])
def test_severity_decides_between_the_two(make, rule: str) -> None:
    with pytest.raises(AssertionError):
        make(rule, Path("x"), "detail")
