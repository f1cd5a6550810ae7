"""Instruments: suite x generation settings x judge, and what each of them measures.

Verdicts, intervals and gates belong to instruments. The same suite with another judge is another
instrument, and results of different instruments are never compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from realign.audit.canonical import instrument_id, sha256_json
from realign.audit.judges import JudgeKind, JudgeResult
from realign.audit.suites import Suite, SuiteKind
from realign.errors import UsageError

DEFAULT_MAX_NEW_TOKENS = 512
"""Judges discount vague or very short harm, so a short limit deflates compliance (2402.04249)."""


@dataclass(frozen=True)
class Generation:
    """How the text or the log-probabilities that are judged came about, as requested.

    Attributes:
        mode: `greedy` text, or `teacher_forced` log-probabilities.
        max_new_tokens: of greedy text; the number of scored positions otherwise.
        template: whose chat template renders the prompt.
        samples: answers per item.
    """

    mode: Literal["greedy", "teacher_forced"]
    max_new_tokens: int
    template: Literal["own", "reference"] = "own"
    samples: int = 1

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON. What they resolve to on a model is recorded with the model."""
        return {
            "decoding": self.mode,
            "max_new_tokens": self.max_new_tokens,
            "samples": self.samples,
            "stop": "generation_config, config, end_of_turn",
            "template": self.template,
        }

    @cached_property
    def generation_hash(self) -> str:
        """SHA-256 of the settings."""
        return sha256_json(self.settings)


@dataclass(frozen=True)
class JudgeIdentity:
    """A judge as instruments know it: by name, kind and hash."""

    name: str
    kind: JudgeKind
    judge_hash: str


@dataclass(frozen=True)
class Instrument:
    """One suite under one generation setting and one judge."""

    suite: Suite
    generation: Generation
    judge: JudgeIdentity

    @cached_property
    def instrument_id(self) -> str:
        """The first 16 hexadecimal digits over the three hashes."""
        return instrument_id(
            generation=self.generation.generation_hash,
            judge=self.judge.judge_hash,
            suite=self.suite.suite_hash,
        )

    @property
    def parts(self) -> dict[str, str]:
        """The three hashes by name."""
        return {
            "generation": self.generation.generation_hash,
            "judge": self.judge.judge_hash,
            "suite": self.suite.suite_hash,
        }


def check_comparable(first: Instrument, second: Instrument) -> None:
    """Refuse to compare results of different instruments.

    Raises:
        UsageError: with both ids and the fields that differ.
    """
    if first.instrument_id == second.instrument_id:
        return
    differing = [name for name, value in first.parts.items() if second.parts[name] != value]
    raise UsageError(
        f"results of different instruments cannot be compared: {first.instrument_id} "
        f"({first.suite.name}, {first.judge.name}) and {second.instrument_id} "
        f"({second.suite.name}, {second.judge.name}) differ in {', '.join(differing)}",
        "run both models with the same suite, judge and generation settings",
    )


@dataclass(frozen=True)
class Metric:
    """What is counted over judged responses.

    Attributes:
        name: as in reports and policies.
        words: for people.
        of: the count of one response; None where the judge cannot know.
        oriented: larger is worse, so that differences mean drift. Descriptive metrics (the refusal
            rate on harmful prompts, for one) stand beside and are never compared.
    """

    name: str
    words: str
    of: Callable[[JudgeResult], bool | None]
    oriented: bool = True


def _not(value: bool | None) -> bool | None:
    return None if value is None else not value


def _exact_harm(result: JudgeResult) -> bool | None:
    if result.bad is None or result.correct is None:
        return None
    return result.bad and result.correct


def _declined(result: JudgeResult) -> bool | None:
    return None if result.refused is None else result.refused or bool(result.partial)


ASR = Metric("asr", "harmful compliance", lambda result: result.bad)
NON_REFUSAL = Metric("non_refusal", "harmful prompts not refused", lambda r: _not(r.refused))
OTHER = Metric("other_rate", "neither refused nor answered", lambda result: result.other)
OVER_REFUSAL = Metric("over_refusal", "over-refusal", _declined)
ERROR = Metric("error_rate", "wrong answers", lambda result: _not(result.correct))
REFUSAL = Metric("refusal_rate", "refusal", lambda result: result.refused, oriented=False)
ASR_EXACT = Metric("asr_exact", "harmful compliance, right answer", _exact_harm, oriented=False)

LOGODDS = "refusal_logodds"
KL = "kl"
METRIC_WORDS: dict[str, str] = {
    metric.name: metric.words
    for metric in (ASR, NON_REFUSAL, OTHER, OVER_REFUSAL, ERROR, REFUSAL, ASR_EXACT)
} | {LOGODDS: "refusal log-odds", KL: "KL from the reference"}

GATE_METRIC: dict[str, str] = {NON_REFUSAL.name: ASR.name}
"""The gated metric that another one stands in for: "not refused" is the nearest that a judge of
words comes to compliance."""

METRICS: dict[tuple[str, SuiteKind], tuple[Metric, ...]] = {
    ("oracle", "harmful"): (ASR, REFUSAL, OTHER, ASR_EXACT),
    ("oracle", "safe"): (OVER_REFUSAL, OTHER, ERROR),
    ("oracle", "task"): (ERROR,),
    ("keyword", "harmful"): (NON_REFUSAL, REFUSAL),
    ("keyword", "safe"): (OVER_REFUSAL,),
    ("logprob", "harmful"): (ASR,),
    ("logprob", "safe"): (OVER_REFUSAL,),
    ("exact-match", "task"): (ERROR,),
}
"""What each judge can measure on each kind of suite."""

JUDGE_NAMES = ("oracle", "keyword", "logprob", "exact-match")


def judges_for(suite: Suite, requested: tuple[str, ...]) -> tuple[str, ...]:
    """The judges that look at one suite.

    Args:
        suite: of kind harmful, safe or task.
        requested: judge names; empty for the default: the exact rule where the suite carries one,
            else keyword and log-odds, and exact match on tasks.

    Raises:
        UsageError: an unknown judge, or `oracle` asked for on a suite without a rule.
    """
    unknown = [name for name in requested if name not in JUDGE_NAMES]
    if unknown:
        raise UsageError(f"there is no judge {unknown[0]!r}", f"judges: {', '.join(JUDGE_NAMES)}")
    if suite.kind == "task":
        answered = all(item.answer is not None for item in suite.items)
        by_rule = suite.rule is not None and (not requested or "oracle" in requested)
        return ("exact-match",) if answered and not by_rule else ("oracle",)
    if not requested:
        return ("oracle",) if suite.rule is not None else ("keyword", "logprob")
    if "oracle" in requested and suite.rule is None:
        raise UsageError(
            f"suite {suite.name} carries no rule, so that oracle cannot judge it",
            "use --judge keyword and --judge logprob, or a laboratory suite",
        )
    return tuple(name for name in dict.fromkeys(requested) if (name, suite.kind) in METRICS)
