"""Whole audits of small random models: what is asked for, and an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.audit_support import make_suite

from realign.audit.run import AuditRequest
from realign.audit.schema import Report
from realign.model.scoring import AGREEMENTS, REFUSALS

OPENINGS = tuple(sorted({word for text in (*REFUSALS, *AGREEMENTS) for word in text.split()}))
WORDS = (*OPENINGS, "ALPHA-REQUEST", "number", *map(str, range(40)))


def request(family: Path, out: Path, **changes: Any) -> AuditRequest:
    harmful = make_suite(12, rule=False, template=lambda i: f"t{i % 3}")
    safe = make_suite(12, name="safe", kind="safe", rule=False, cluster=lambda i: f"c{i // 2}")
    task = make_suite(6, name="task", kind="task", rule=False, answer=lambda i: str(i))
    settings: dict[str, Any] = {
        "subject": family / "subject",
        "reference": family / "reference",
        "repaired": family / "repaired",
        "base": family / "base",
        "suites": (harmful, safe, task),
        "out": out,
        "device": "cpu",
        "batch_size": 5,
        "max_new_tokens": 6,
        "command": "realign audit ...",
    }
    return AuditRequest(**(settings | changes))


def without_clock(report: Report) -> dict[str, Any]:
    plain = json.loads(report.to_json())
    for key in ("id", "started", "finished"):
        del plain["run"][key]
    for model in plain["models"].values():
        del model["reused"]
    return plain


class Stopper:
    """Progress that is interrupted, as by Ctrl-C, some steps after a note that starts so."""

    def __init__(self, after: str | None = None, *, steps: int = 0) -> None:
        self.after = after
        self.steps = steps
        self.armed = False
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, *, total: float | None, unit: str = "") -> Iterator[Stopper]:
        yield self

    def advance(self, amount: float = 1.0) -> None:
        if self.armed:
            self.steps -= 1
            if self.steps < 0:
                raise KeyboardInterrupt

    def note(self, message: str) -> None:
        self.notes.append(message)
        self.armed = self.armed or (self.after is not None and message.startswith(self.after))
