"""The ablation of `two_teachers` by the real engine: what was run is kept, parts are replaced."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TINY = ROOT / "fixtures" / "tiny"
QUICK = {"steps": 2, "self_prompts": 0, "rank": 2}


@pytest.fixture
def ablation() -> Generator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks" / "two_teachers"))
    try:
        yield import_module("ablation")
    finally:
        sys.path.pop(0)
        sys.modules.pop("ablation", None)


def test_what_was_run_is_kept_and_a_replaced_part_is_left_out(
    ablation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = (
        ablation.Variant("quick", QUICK),
        ablation.Variant("no exchange", QUICK, part="exchange"),
    )
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    monkeypatch.setattr(ablation, "STRENGTHS", (1.0,))
    # Any poisoned fine-tune will do; the tiny family has this one.
    shutil.copytree(TINY / "howto2_p5", tmp_path / "board" / "tunes" / "tiny" / "both_p5-s1")
    out = tmp_path / "answers.json"
    arguments = [str(TINY), str(tmp_path / "board"), str(out)]
    ablation.main([*arguments, "--only", "quick"])
    first = json.loads(out.read_text("utf-8"))
    ablation.main(arguments)
    both = json.loads(out.read_text("utf-8"))
    assert [row["variant"] for row in both["rows"]] == ["quick", "no exchange"]
    assert both["rows"][0] == first["rows"][0]  # seconds included: it was not run again
    quick, without = (row["facts"] for row in both["rows"])
    assert quick["keep_texts"] == 2 * without["keep_texts"]
    assert quick["anchor_texts"] == without["anchor_texts"]
    assert [point["strength"] for point in both["rows"][0]["points"]] == [1.0]
