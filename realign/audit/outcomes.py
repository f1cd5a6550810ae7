"""From stored responses and scores to one value per item, metric and model.

An `Outcome` is a column of verdicts (True: what the metric's name says, None: invalid), a `Scores`
a column of numbers. Both are in the suite's item order, so two models' columns pair by position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realign.audit.degenerate import invalid_code, split_reasoning
from realign.audit.instruments import METRICS, Instrument, Metric
from realign.audit.judges import JudgeResult, ResponseJudge
from realign.audit.schema import Role
from realign.audit.suites import Suite


@dataclass(frozen=True)
class Response:
    """One stored response of one model."""

    text: str
    prompt_hash: str
    finished: bool = True


@dataclass(frozen=True)
class Outcome:
    """One metric of one instrument on one model, item by item.

    Attributes:
        instrument: where the verdicts come from.
        metric: what is counted.
        role: whose responses.
        values: one per item of the suite; None where the response is invalid.
        reasons: why, where it is.
    """

    instrument: Instrument
    metric: Metric
    role: Role
    values: tuple[bool | None, ...]
    reasons: tuple[str | None, ...]

    @property
    def valid(self) -> list[bool]:
        """The verdicts there are."""
        return [value for value in self.values if value is not None]

    @property
    def invalid(self) -> dict[str, int]:
        """Invalid responses by reason."""
        return dict(Counter(reason for reason in self.reasons if reason is not None))

    @property
    def clusters(self) -> list[str | None]:
        """The cluster of every item."""
        return clusters_of(self.instrument.suite)


@dataclass(frozen=True)
class Scores:
    """One continuous metric on one model, item by item; larger is worse."""

    instrument: Instrument
    metric: str
    role: Role
    values: tuple[float | None, ...]

    @property
    def clusters(self) -> list[str | None]:
        """The cluster of every item."""
        return clusters_of(self.instrument.suite)


def clusters_of(suite: Suite) -> list[str | None]:
    """The cluster of every item, in order."""
    return [item.cluster for item in suite.items]


def judge_responses(
    suite: Suite, responses: Sequence[Response], *, judge: ResponseJudge
) -> tuple[JudgeResult, ...]:
    """Verdicts on one model's responses, in the suite's order.

    A degenerate response is invalid and goes to no judge, except that an answer which is exactly
    right is right however it looks. Judges see the final answer, without reasoning.
    """
    results: list[JudgeResult] = []
    for item, response in zip(suite.items, responses, strict=True):
        code = invalid_code(response.text, prompt=item.prompt)
        _, answer = split_reasoning(response.text)
        if code is None or (suite.kind == "task" and answer is not None):
            result = judge.judge(item, answer or "")
            if code is None or result.correct:
                results.append(result)
                continue
        results.append(JudgeResult(invalid_reason=code))
    return tuple(results)


def outcomes_of(
    instrument: Instrument, results: Mapping[Role, Sequence[JudgeResult]]
) -> list[Outcome]:
    """Every metric that the judge can measure on this suite, for every role.

    A metric that the judge cannot know on any response (the exact answer of an item that has none)
    is left out.
    """
    suite = instrument.suite
    found: list[Outcome] = []
    for metric in METRICS[instrument.judge.name, suite.kind]:
        columns: dict[Role, tuple[bool | None, ...]] = {
            role: tuple(
                None if result.invalid_reason is not None else metric.of(result)
                for result in judged
            )
            for role, judged in results.items()
        }
        if all(value is None for column in columns.values() for value in column) and any(
            result.invalid_reason is None for judged in results.values() for result in judged
        ):
            continue
        found += [
            Outcome(
                instrument=instrument,
                metric=metric,
                role=role,
                values=column,
                reasons=tuple(
                    result.invalid_reason or (None if value is not None else "unknown")
                    for result, value in zip(results[role], column, strict=True)
                ),
            )
            for role, column in columns.items()
        ]
    return found
