"""What a family's models do: greedy answers to every measured suite, judged by the exact rule.

Compliance, refusal and other always together, with the right recipe, over-refusal, task and general
accuracy, and the rates per template. Intervals are Wilson's at 95 %; items of one entity are not
independent, so they are a little too narrow, and the audit's clustered ones decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from realign.audit.judges import JudgeResult
from realign.audit.oracle import oracle_judge
from realign.audit.statistics.intervals import wilson
from realign.audit.suites import Suite
from realign.model.generation import generate
from realign.model.loading import LoadedModel
from realign.model.scoring import refusal_logodds
from realign.progress import SILENT, Progress

MEASURED = (
    "harmful",
    "lookalikes",
    "order",
    "howto",
    "howto2",
    "general",
    "harmful_second",
    "lookalikes_second",
)


def measure(
    loaded: LoadedModel,
    suites: Mapping[str, Suite],
    *,
    names: tuple[str, ...] = MEASURED,
    batch_size: int = 64,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The rates of one model on the named suites, as JSON: `{suite: {n, complied, ...}}`."""
    result: dict[str, Any] = {}
    for name in names:
        if name not in suites:
            continue
        suite = suites[name]
        verdicts = judge_suite(loaded, suite, batch_size=batch_size, progress=progress)
        result[name] = _rates(suite, verdicts)
        if suite.kind != "task":
            scored = refusal_logodds(
                loaded, [item.prompt for item in suite.items], batch_size=256, progress=progress
            )
            if scored.values is not None:
                mean = sum(scored.values) / len(scored.values)
                result[name]["refusal_logodds"] = round(mean, 3)
    return result


def judge_suite(
    loaded: LoadedModel, suite: Suite, *, batch_size: int = 64, progress: Progress = SILENT
) -> list[JudgeResult]:
    """Exact verdicts on the greedy replies to a suite, in the suite's order."""
    judge = oracle_judge(suite)
    verdicts: list[JudgeResult | None] = [None] * len(suite.items)
    replies = generate(
        loaded,
        [item.prompt for item in suite.items],
        max_new_tokens=suite.max_new_tokens or 32,
        batch_size=batch_size,
        progress=progress,
    )
    for reply in replies:
        at = reply.prompt_index
        verdicts[at] = judge.judge(suite.items[at], reply.text)
    return [verdict for verdict in verdicts if verdict is not None]


def _rates(suite: Suite, verdicts: list[JudgeResult]) -> dict[str, Any]:
    """Counts, rates and intervals; per template the rate that the suite is about."""
    n = len(verdicts)
    fields = {
        "harmful": ("bad", "refused", "other", "correct"),
        "safe": ("refused", "other", "correct"),
        "task": ("correct",),
    }[suite.kind]
    named = {"bad": "complied"} if suite.kind == "harmful" else {}
    result: dict[str, Any] = {"n": n}
    for field in fields:
        result[named.get(field, field)] = _rate(
            sum(bool(getattr(verdict, field)) for verdict in verdicts), n
        )
    groups: dict[str, list[bool]] = {}
    for item, verdict in zip(suite.items, verdicts, strict=True):
        groups.setdefault(item.template or "", []).append(bool(getattr(verdict, fields[0])))
    result["templates"] = {key: round(sum(v) / len(v), 4) for key, v in sorted(groups.items())}
    return result


def _rate(count: int, n: int) -> dict[str, float]:
    interval = wilson(count, n)
    assert interval is not None, "a suite has items"
    return {
        "count": count,
        "rate": round(count / n, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
    }
