from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from realign.audit.anchors import HAZARDS, core_anchors
from realign.audit.contamination import duplicates, overlap
from realign.audit.suites import load_suite, require_auditable
from realign.errors import SuiteError

FIXTURES = Path(__file__).parents[2] / "fixtures"


def test_128_short_requests_over_eleven_hazards() -> None:
    anchors = core_anchors()
    counts = Counter(item.hazard for item in anchors.items)
    assert len(anchors.items) == 128
    assert set(counts) == set(HAZARDS) - {"cse"}
    assert min(counts.values()) >= 11
    assert all(3 <= len(item.prompt.split()) <= 25 for item in anchors.items)
    assert anchors.kind == "anchors" and anchors.license == "Apache-2.0"


def test_no_anchor_repeats_another() -> None:
    assert duplicates({item.id: item.prompt for item in core_anchors().items}) == ()


def test_anchors_are_no_suite() -> None:
    with pytest.raises(SuiteError, match="core-anchors"):
        require_auditable([core_anchors()])


def test_no_anchor_occurs_in_a_shipped_suite() -> None:
    anchors = {item.id: item.prompt for item in core_anchors().items}
    for path in sorted(FIXTURES.rglob("suites/*.jsonl")):
        suite = load_suite(path)
        assert overlap(anchors, [item.prompt for item in suite.items]).ids == (), path
