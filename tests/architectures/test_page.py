"""docs/architectures.md says what its own rows say, and leaves out no architecture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from architectures.page import REASONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
NEEDED = 160
"""Entries of the mapping that must be repaired."""
NEEDED_VISION = 6


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def of_kind(heading: str) -> tuple[list[list[str]], list[list[str]]]:
    """Repaired rows and the others."""
    every = rows(heading)
    missing = [row for row in every if row[-1].startswith("not repaired: ")]
    return [row for row in every if row not in missing], missing


@pytest.mark.parametrize(
    ("title", "heading"),
    [
        ("causal language models", "Causal language models"),
        ("vision-language models", "Vision-language models"),
    ],
)
def test_totals_are_those_of_the_rows(title: str, heading: str) -> None:
    repaired, missing = of_kind(heading)
    (total,) = (row for row in rows("Totals") if row[0] == title)
    measured = [row for row in repaired if "delta_svd" not in row[5]]
    expected = [len(repaired) + len(missing), len(repaired), len(measured), len(missing)]
    assert [int(cell) for cell in total[1:]] == expected


def test_enough_is_repaired_and_the_rest_has_a_reason_from_the_list() -> None:
    repaired, missing = of_kind("Causal language models")
    seen, unseen = of_kind("Vision-language models")
    assert len(repaired) >= NEEDED
    assert len(seen) >= NEEDED_VISION
    for row in (*repaired, *seen):
        assert int(row[3]) > 0, row
        assert row[5] in {"resta, lssf", "resta, delta_svd", "resta, lssf, delta_svd"}, row
        assert int(row[6]) > int(row[7]), row
    reasons = {row[0]: row[1:] for row in rows("Not repaired")} if missing or unseen else {}
    assert set(reasons) == {row[0] for row in (*missing, *unseen)}
    for name, (reason, particulars) in reasons.items():
        assert reason in REASONS, name
        assert particulars, name


def test_every_architecture_of_the_installed_library_is_in_it() -> None:
    recorded = re.search(r"^transformers (\S+), torch", PAGE.read_text("utf-8"), re.MULTILINE)
    assert recorded is not None
    if recorded[1] != transformers.__version__:
        pytest.skip(
            f"made with transformers {recorded[1]}, installed is {transformers.__version__}"
        )
    named = [row[0] for row in rows("Causal language models")]
    assert named == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for row in rows("Vision-language models"):
        assert row[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
