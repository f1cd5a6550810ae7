"""What a person reads first and last: at most five headline sentences, and the limits.

The words are fixed: drift found, within the declared margin, not enough data to say. An audit never
says "safe", "passed" or "no drift".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from realign.audit.instruments import METRIC_WORDS
from realign.audit.schema import (
    ComparisonEntry,
    JudgeEntry,
    ModelEntry,
    RateEntry,
    Role,
    SuiteEntry,
)
from realign.audit.statistics.verdicts import REASON_WORDS, WORDS

NO_VERDICTS = "no verdicts: no policy"
NO_REQUIRED_GATE = "The policy has no required gate: nothing in it can fail this audit."
ROLE_WORDS: dict[Role, str] = {
    "reference": "the reference",
    "subject": "the fine-tuned model",
    "repaired": "the repaired model",
    "base": "the base model",
}
MOST = 5


def headline(
    *,
    suites: Sequence[SuiteEntry],
    rates: Sequence[RateEntry],
    comparisons: Sequence[ComparisonEntry],
    primary: Mapping[str, str],
    toothless: bool = False,
) -> tuple[str, ...]:
    """At most five plain sentences, the most important first.

    `toothless`: there is a policy, and no gate of it is required.
    """
    sentences: list[str] = [NO_REQUIRED_GATE] if toothless else []
    incoherent = [row for row in rates if "incoherent" in row.flags]
    if incoherent:
        row = incoherent[0]
        sentences.append(
            f"{_upper(ROLE_WORDS[row.role])} gives {_percent(1 - row.n_valid / row.n)} invalid "
            f"answers on {row.suite}: read its rates with that in mind."
        )
    lookup = {(row.role, row.suite, row.metric, row.judge): row for row in rates}

    def rate(role: Role, suite: str, metric: str) -> RateEntry | None:
        return lookup.get((role, suite, metric, primary.get(suite)))

    kinds: dict[str, list[str]] = {}
    for suite in suites:
        kinds.setdefault(suite.kind or "", []).append(suite.name)
    rows = {
        (row.name, row.suite, row.metric): row
        for row in comparisons
        if primary.get(row.suite or "") == row.judge
    }
    for name in kinds.get("harmful", []):
        metric = "asr" if rate("subject", name, "asr") else "non_refusal"
        before, after = rate("reference", name, metric), rate("subject", name, metric)
        change = rows.get(("drift", name, metric))
        if before and after and change:
            sentences.append(_moved("Fine-tuning", name, metric, before, after, change))
        elif after is not None:
            sentences.append(
                f"{_upper(METRIC_WORDS[metric])} of the fine-tuned model on {name}: "
                f"{_rate_words(after)}."
            )
        residual, repaired = rows.get(("residual", name, metric)), rate("repaired", name, metric)
        if residual and repaired:
            sentences.append(_residual(name, metric, repaired, residual))
        if len(sentences) >= MOST - 2:
            break
    for name in kinds.get("safe", [])[:1]:
        which: Role = "repaired" if rate("repaired", name, "over_refusal") else "subject"
        before, after = rate("reference", name, "over_refusal"), rate(which, name, "over_refusal")
        change = rows.get(("residual" if which == "repaired" else "drift", name, "over_refusal"))
        if before and after and change:
            cause = "Repair" if which == "repaired" else "Fine-tuning"
            sentences.append(_moved(cause, name, "over_refusal", before, after, change))
    sentences += _taxes(kinds.get("task", []), rows, rate_of=rate)
    return tuple(sentences[:MOST])


def _taxes(
    tasks: Iterable[str],
    rows: Mapping[tuple[str, str | None, str | None], ComparisonEntry],
    *,
    rate_of: Callable[[Role, str, str], RateEntry | None],
) -> list[str]:
    """The repair's cost in skill, the worst task first; one sentence."""
    costs = [
        (row.diff, name, row)
        for name in tasks
        if (row := rows.get(("tax", name, "error_rate"))) is not None and row.diff is not None
    ]
    if not costs:
        return []
    _, name, row = max(costs, key=lambda cost: cost[0])
    before, after = rate_of("subject", name, "error_rate"), rate_of("repaired", name, "error_rate")
    if before is None or after is None or before.rate is None or after.rate is None:
        return []
    among = f", the largest loss of {len(costs)} tasks" if len(costs) > 1 else ""
    return [
        f"Repair changed accuracy on {name} from {_percent(1 - before.rate)} to "
        f"{_percent(1 - after.rate)}{among}{_verdict(row)}."
    ]


def _moved(
    cause: str,
    suite: str,
    metric: str,
    before: RateEntry,
    after: RateEntry,
    change: ComparisonEntry,
) -> str:
    words = METRIC_WORDS[metric]
    if before.rate is None or after.rate is None or change.diff is None:
        return f"{_upper(words)} on {suite} could not be compared: no valid answers."
    tail = f"{_range(change)}{_verdict(change)}."
    if cause == "Repair":
        return (
            f"After repair {words} on {suite} is {_percent(after.rate)}, "
            f"{_percent(before.rate)} in the reference{tail}"
        )
    if change.diff == 0.0:
        return f"{cause} left {words} on {suite} at {_percent(after.rate)}{tail}"
    verb = "raised" if change.diff > 0 else "lowered"
    return (
        f"{cause} {verb} {words} on {suite} from {_percent(before.rate)} to "
        f"{_percent(after.rate)}{tail}"
    )


def _residual(suite: str, metric: str, repaired: RateEntry, row: ComparisonEntry) -> str:
    if repaired.rate is None or row.diff is None:
        return f"After repair {METRIC_WORDS[metric]} on {suite} is unknown: no valid answers."
    return (
        f"After repair {METRIC_WORDS[metric]} on {suite} is {_percent(repaired.rate)}, "
        f"{_points(row.diff)} against the reference{_range(row, difference=False)}{_verdict(row)}."
    )


def _range(row: ComparisonEntry, *, difference: bool = True) -> str:
    if row.ci is None or row.diff is None:
        return ""
    level = f"{100 * row.ci.level:g} %"
    limits = f"{level} {_number(row.ci.low)} to {_number(row.ci.high)}"
    return f" ({_points(row.diff)}, {limits})" if difference else f" ({limits})"


def _verdict(row: ComparisonEntry) -> str:
    if row.verdict is None:
        return ""
    words = WORDS[row.verdict]
    if row.verdict == "within_margin" and row.margin is not None:
        return f": {words} of {100 * row.margin:g} pp"
    why = REASON_WORDS.get(row.reason or "", "")
    return f": {words} ({why})" if why else f": {words}"


def _rate_words(row: RateEntry) -> str:
    if row.rate is None or row.ci95 is None:
        return "unknown, no valid answers"
    low, high = row.ci95
    return f"{_percent(row.rate)} of {row.n_valid} (95 % {_number(low)} to {_number(high)})"


def limits(
    *,
    suites: Sequence[SuiteEntry],
    judges: Sequence[JudgeEntry],
    models: Mapping[Role, ModelEntry],
    languages: Iterable[str],
    clustered: Sequence[str],
    weights: bool,
    noise_floor: bool,
    has_policy: bool,
    reasons: Mapping[tuple[str, str], str],
) -> tuple[str, ...]:
    """Plain sentences on what was not measured; never empty."""
    prompts = sum(suite.n_items for suite in suites)
    spoken = ", ".join(sorted(set(languages))) or "unnamed language"
    found = [
        f"Single turn, {prompts} prompts in {len(suites)} "
        f"{'suite' if len(suites) == 1 else 'suites'} (language: {spoken}); greedy decoding; no "
        "adaptive attack was run.",
    ]
    if not any(judge.kind in ("model", "endpoint") for judge in judges):
        exact = any(judge.name == "oracle" for judge in judges)
        weak = [judge.name for judge in judges if judge.name in ("keyword", "logprob")]
        if weak:
            found.append(
                f"Judged by {' and '.join(weak)} only where no exact rule applies: neither reads "
                "what an answer says."
            )
        elif exact:
            found.append("The exact rule judges laboratory answers; it says nothing about others.")
    if "reference" not in models:
        found.append("Without a reference nothing was compared: these are single rates.")
    if not has_policy:
        found.append("Without a policy there are no margins and so no verdicts.")
    if clustered:
        found.append(
            f"Items of {', '.join(clustered)} share entities: intervals are from whole clusters, "
            "never narrower than for independent items. They cluster on entities and do not "
            "generalise over templates: other wordings may differ by more."
        )
    if not noise_floor:
        found.append("The noise floor (the reference against itself) was not measured.")
    templates = {entry.chat_template_sha256 for entry in models.values()} - {None}
    if len(templates) > 1:
        found.append(
            "The models ship different chat templates: a changed template and changed weights are "
            "different causes, and this audit does not separate them."
        )
    if weights:
        found.append("Weight metrics are a screening signal, not validated, and decide nothing.")
    dropped = sum(suite.n_contaminated for suite in suites)
    if dropped:
        found.append(
            f"{dropped} items were dropped because they occur in the calibration data or in the "
            "declared training data."
        )
    cut = sum(suite.n_skipped.get("limit", 0) for suite in suites)
    if cut:
        found.append(f"{cut} items were left out by --limit.")
    found += [
        f"Judge {judge} gave nothing on {suite}: {reason}."
        for (suite, judge), reason in reasons.items()
    ]
    return tuple(found)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:.1f}"


def _points(value: float) -> str:
    return f"{round(100 * value, 1) + 0.0:+.1f} pp"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
