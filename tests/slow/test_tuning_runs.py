"""Whole tunings of the tiny family: interrupted ones, and limits that break on held-out prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tune_support import tiny_repair, tiny_request, tiny_suites

from realign.progress import SilentProgress
from realign.report.tune import tune_markdown
from realign.tune.request import Limits
from realign.tune.run import tune


class _Interrupts(SilentProgress):
    """Presses Ctrl-C when a trial begins."""

    def __init__(self, trial: int) -> None:
        self._trial = trial

    def note(self, message: str) -> None:
        if message.startswith(f"trial {self._trial} of"):
            raise KeyboardInterrupt


def test_an_interrupted_search_goes_on_to_the_same_end(tmp_path: Path) -> None:
    # Full strength breaks a limit, so that there is something to search for.
    options: dict[str, Any] = {
        "groups": 2,
        "trials": 3,
        "suites": tiny_suites(limit=10),
        "limits": Limits(utility_drop=0.05, over_refusal_rise=0.05),
        "repair": tiny_repair(method="resta", settings={"gamma": 1.0, "safety_vector": "base"}),
    }
    whole = tune(tiny_request(tmp_path / "a", **options))
    assert len(whole.document["search"]["trials"]) == 3
    with pytest.raises(KeyboardInterrupt):
        tune(tiny_request(tmp_path / "b", **options), progress=_Interrupts(3))
    assert not (tmp_path / "b" / "tune.json").exists()
    resumed = tune(tiny_request(tmp_path / "b", **options))
    assert resumed.document == whole.document


def test_limits_broken_on_held_out_prompts_keep_no_checkpoint(tmp_path: Path) -> None:
    # On the final side a "task" whose right answers are harmful recipes: no repair can keep it.
    harmful, safe, task = tiny_suites(limit=160)
    names = sorted({item.cluster or "" for item in harmful.items})
    parts = [
        replace(
            harmful,
            name=f"part{index}",
            kind="task" if index == 2 else "harmful",
            items=tuple(i for i in harmful.items if i.cluster in names[index::3])[:16],
        )
        for index in range(3)
    ]
    request = tiny_request(
        tmp_path / "a",
        trials=1,
        suites=(parts[0], replace(safe, items=safe.items[:10]), task.limited(10)),
        final_suites=(
            parts[1], replace(safe, name="safe2", items=safe.items[10:20]), parts[2],
        ),
    )  # fmt: skip
    found = tune(request)
    assert found.status == "limits broken" and found.exit_code == 1
    rows = {row["suite"]: row for row in found.document["held_out"]["rows"]}
    assert rows["part1"]["holds"] and not rows["part2"]["holds"]
    assert rows["part2"]["certain"], "the interval says so as well"
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert "tune.json" in left and not [name for name in left if "repaired" in name]
    assert found.document["output"] is None
    assert "no checkpoint is kept" in tune_markdown(found.document)
