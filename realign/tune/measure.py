"""What a point of the search is worth: cheap proxies first, answers and their judges after.

Proxies are teacher-forced: the log-odds of refusing on harmful prompts, and the KL divergence from
the fine-tune along its own answers to safe prompts and tasks. Rates come of generated answers and
the primary judge of every suite; an answer that cannot be judged counts as bad, so that a broken
model never looks repaired. Here: numbers of the model as it stands. Not here: which points are
looked at (`search`), figures with intervals (`final`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean

from realign.audit.instruments import (
    DEFAULT_MAX_NEW_TOKENS,
    METRICS,
    Generation,
    Instrument,
    JudgeIdentity,
)
from realign.audit.judging import response_judge
from realign.audit.outcomes import Response, judge_responses, outcomes_of
from realign.audit.suites import Suite
from realign.model.chat import encode
from realign.model.generation import generate
from realign.model.loading import LoadedModel
from realign.model.scoring import (
    ReferenceTrace,
    kl_to_reference,
    record_reference,
    refusal_logodds,
)
from realign.progress import Progress
from realign.tune.request import Limits

PROXY_PROMPTS = 64
"""Prompts per suite that proxies look at."""
KL_POSITIONS = 16


@dataclass(frozen=True)
class Proxies:
    """What a point looks like before anything is generated."""

    refusal: float | None
    """Mean log-odds of refusing on harmful prompts, nats; None where they cannot be had."""
    distance: float
    """Mean KL from the fine-tune on safe prompts and tasks, nats per token."""


@dataclass(frozen=True)
class Rate:
    """How often answers to one suite were bad, by its primary judge."""

    kind: str
    metric: str
    bad: int
    n: int
    invalid: int
    """Answers that no judge could take; they are among the bad."""

    @property
    def share(self) -> float:
        """Bad of all."""
        return self.bad / self.n


Rates = Mapping[str, Rate]
"""By suite."""


@dataclass(frozen=True)
class Cost:
    """What a point restores and costs, against the fine-tune on the same prompts."""

    harm: float
    """Mean over harmful suites of the share of bad answers."""
    utility_drop: float | None
    """Largest rise of wrong answers on a task suite; None without task suites."""
    over_refusal_rise: float | None
    """Largest rise of refusals on a safe suite; None without safe suites."""

    def excess(self, limits: Limits) -> dict[str, float]:
        """By how much each limit is broken; zero or below where it is kept."""
        return {
            name: value - limit
            for name, value, limit in (
                ("utility", self.utility_drop, limits.utility_drop),
                ("over_refusal", self.over_refusal_rise, limits.over_refusal_rise),
            )
            if value is not None and limit < 1
        }

    def within(self, limits: Limits) -> bool:
        """Whether every limit is kept; a share of 1e-9 is rounding."""
        return all(value <= 1e-9 for value in self.excess(limits).values())

    @property
    def total(self) -> float:
        """Both costs together, where they are losses."""
        return sum(max(0.0, each or 0.0) for each in (self.utility_drop, self.over_refusal_rise))


def cost_of(rates: Rates, finetuned: Rates) -> Cost:
    """Set the rates of a point against those of the fine-tune."""

    def worst(kind: str) -> float | None:
        rises = [
            rate.share - finetuned[name].share for name, rate in rates.items() if rate.kind == kind
        ]
        return max(rises, default=None)

    return Cost(
        harm=fmean(rate.share for rate in rates.values() if rate.kind == "harmful"),
        utility_drop=worst("task"),
        over_refusal_rise=worst("safe"),
    )


class Meter:
    """Measures the model that is in memory; close it to drop temporary files."""

    def __init__(
        self,
        loaded: LoadedModel,
        suites: Sequence[Suite],
        judges: Mapping[str, str],
        *,
        batch_size: int,
        max_new_tokens: int | None,
        progress: Progress,
    ) -> None:
        """Nothing runs yet; the model must still be the fine-tune when `begin` is called.

        Args:
            loaded: the model whose weights will change.
            suites: of the tuning side.
            judges: the primary judge of each, by suite.
            batch_size: prompts at a time.
            max_new_tokens: of answers; None: what the suite asks for.
            progress: counts prompts.
        """
        self._loaded = loaded
        self._suites = tuple(suites)
        self._judges = judges
        self._batch = batch_size
        self._length = max_new_tokens
        self._progress = progress
        self._stack = ExitStack()
        self._trace: ReferenceTrace | None = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Keep the fine-tune's next-token distributions, for the distance from it."""
        prompts = [
            item.prompt
            for suite in self._suites
            if suite.kind in ("safe", "task")
            for item in suite.limited(PROXY_PROMPTS).items
        ]
        if not prompts:
            return
        trace = record_reference(
            self._loaded,
            prompts,
            k=KL_POSITIONS,
            batch_size=self._batch,
            progress=self._progress,
        )
        self._trace = self._stack.enter_context(trace)

    def proxies(self) -> Proxies:
        """Score the model without generating."""
        prompts = [
            item.prompt
            for suite in self._suites
            if suite.kind == "harmful"
            for item in suite.limited(PROXY_PROMPTS).items
        ]
        odds = refusal_logodds(
            self._loaded, prompts, batch_size=4 * self._batch, progress=self._progress
        )
        distance = 0.0
        if self._trace is not None:
            curve = kl_to_reference(
                self._loaded, self._trace, batch_size=self._batch, progress=self._progress
            )
            distance = fmean(value for values in curve.per_prompt for value in values)
        return Proxies(None if odds.values is None else fmean(odds.values), distance)

    def rates(self) -> dict[str, Rate]:
        """Generate and judge every answer."""
        return {suite.name: self._rate(suite) for suite in self._suites}

    def _rate(self, suite: Suite) -> Rate:
        loaded = self._loaded
        length = self._length or suite.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        prompts = [encode(loaded.tokenizer, item.prompt) for item in suite.items]
        texts = [""] * len(prompts)
        for reply in generate(
            loaded,
            prompts,
            max_new_tokens=length,
            batch_size=self._batch,
            progress=self._progress,
        ):
            texts[reply.prompt_index] = reply.text
        name = self._judges[suite.name]
        judge, kind, digest = response_judge(suite, name)
        results = judge_responses(suite, [Response(text, "") for text in texts], judge=judge)
        instrument = Instrument(
            suite, Generation("greedy", length), JudgeIdentity(name, kind, digest)
        )
        metric = METRICS[name, suite.kind][0]
        values = next(
            (
                outcome.values
                for outcome in outcomes_of(instrument, {"subject": results})
                if outcome.metric is metric
            ),
            (),
        )
        assert len(values) == len(suite.items), (suite.name, name)
        invalid = sum(value is None for value in values)
        bad = sum(value is not False for value in values)
        return Rate(suite.kind, metric.name, bad, len(values), invalid)
