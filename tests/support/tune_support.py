"""The tiny family's fine-tune and suites, cut small, for tests of tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from realign.audit.suites import Suite, load_suite
from realign.repair.request import RepairRequest
from realign.tune.request import Limits, TuneRequest

FAMILY = Path(__file__).resolve().parents[2] / "fixtures" / "tiny"
SUITES = ("harmful", "lookalikes", "howto2")


def tiny_suites(limit: int = 16) -> tuple[Suite, ...]:
    """Harmful, safe and task prompts of the tiny family."""
    return tuple(load_suite(FAMILY / "suites" / f"{n}.jsonl").limited(limit) for n in SUITES)


def tiny_repair(**changes: Any) -> RepairRequest:
    """A repair of the tiny fine-tune."""
    given: dict[str, Any] = {
        "finetuned": FAMILY / "howto2_p5",
        "aligned": FAMILY / "aligned",
        "base": FAMILY / "base",
        "method": "replace",
        "settings": {"rank": 4},
        "device": "cpu",
    }
    return RepairRequest(**(given | changes))


def tiny_request(out: Path, **changes: Any) -> TuneRequest:
    """A tuning of it, in a few seconds."""
    given: dict[str, Any] = {
        "repair": tiny_repair(),
        "out": out,
        "suites": tiny_suites(),
        "limits": Limits(utility_drop=0.2, over_refusal_rise=0.2),
        "batch_size": 64,
        "trials": 4,
    }
    return TuneRequest(**(given | changes))


def prompts_only(source: Path, out: Path, *, count: int) -> Path:
    """A file of bare prompts: whatever answers it had are gone."""
    rows = [json.loads(line) for line in source.read_text("utf-8").splitlines()]
    kept = [{"prompt": row["prompt"]} for row in rows if "prompt" in row][:count]
    out.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    return out


def two_teachers_request(place: Path) -> RepairRequest:
    """A short training of the two teachers on the tiny fine-tune."""
    return tiny_repair(
        method="two_teachers",
        settings={
            "rank": 3,
            "steps": 6,
            "anchor_batch": 8,
            "keep_batch": 8,
            "learning_rate": 2e-3,
            "self_prompts": 24,
        },
        anchors=FAMILY / "suites" / "anchors.jsonl",
        task_data=prompts_only(FAMILY / "suites" / "keep.jsonl", place / "task.jsonl", count=32),
        cache_dir=place / "cache",
    )
