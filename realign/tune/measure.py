"""What a point of the search is worth: cheap proxies first, answers and their judges after.

Answers are asked for in rounds, first those that limits are held to, then harmful ones. After each
round the shares, with every open answer taken for a good one, are what they will be at least.

Proxies are teacher-forced: the log-odds of refusing on harmful prompts, and the KL divergence from
the fine-tune along its own answers to safe prompts and tasks. Rates come of generated answers and
the primary judge of every suite; an answer that cannot be judged counts as bad, so that a broken
model never looks repaired. Here: numbers of the model as it stands. Not here: which points are
looked at (`search`), figures with intervals (`final`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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
from realign.audit.suites import Item, Suite
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
from realign.tune.bounds import APART, BAD, GOOD, OPEN, upper_bound
from realign.tune.request import Limits

PROXY_PROMPTS = 64
"""Prompts per suite that proxies look at."""
KL_POSITIONS = 16
ROUNDS = 4
"""In how many parts the answers to a suite are asked for at most; no part is below a batch."""
COSTS, HARM = 0, ROUNDS
"""The first round of safe suites and tasks, and that of harmful suites."""


@dataclass(frozen=True)
class Proxies:
    """What a point looks like before anything is generated."""

    refusal: float | None
    """Mean log-odds of refusing on harmful prompts, nats; None where they cannot be had."""
    distance: float | None
    """Mean KL from the fine-tune on safe prompts and tasks, nats per token; None: not asked."""


@dataclass(frozen=True)
class Rate:
    """How often answers to one suite were bad, by its primary judge."""

    kind: str
    metric: str
    marks: str
    """Answer by answer, cluster by cluster; see `bounds`."""
    invalid: int = 0
    """Answers that no judge could take; they are among the bad."""

    @property
    def bad(self) -> int:
        """Bad answers among those that were given."""
        return self.marks.count(BAD)

    @property
    def n(self) -> int:
        """Prompts."""
        return len(self.marks) - self.marks.count(APART)

    @property
    def answered(self) -> int:
        """Prompts that were answered."""
        return self.n - self.marks.count(OPEN)

    @property
    def share(self) -> float:
        """Bad of all; while answers are open, the least that it can become."""
        return self.bad / self.n

    def to_json(self) -> dict[str, object]:
        """Without the single answers."""
        return {
            "kind": self.kind,
            "metric": self.metric,
            "bad": self.bad,
            "n": self.n,
            "answered": self.answered,
            "invalid": self.invalid,
        }


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
    utility_at_most: float | None = None
    """The upper bound of the first cost: of the suite where it is largest."""
    over_refusal_at_most: float | None = None
    """The same of the second one."""

    def excess(self, limits: Limits) -> dict[str, float]:
        """By how much the bounds exceed their limits; zero or below where these are kept."""
        return {
            name: value - limit
            for name, value, limit in (
                ("utility", self.utility_at_most, limits.utility_drop),
                ("over_refusal", self.over_refusal_at_most, limits.over_refusal_rise),
            )
            if value is not None and limit < 1
        }

    def within(self, limits: Limits) -> bool:
        """Whether every limit is kept, bounds included; a share of 1e-9 is rounding."""
        return all(value <= 1e-9 for value in self.excess(limits).values())

    @property
    def total(self) -> float:
        """Both costs together, where they are losses."""
        return sum(max(0.0, each or 0.0) for each in (self.utility_drop, self.over_refusal_rise))


def cost_of(rates: Rates, finetuned: Rates, *, confidence: float) -> Cost:
    """Set the rates of a point against those of the fine-tune.

    Args:
        rates: complete.
        finetuned: on the same prompts.
        confidence: of the bounds, one-sided.
    """

    def worst(kind: str) -> float | None:
        return max(_rises(rates, finetuned, kind), default=None)

    def at_most(kind: str) -> float | None:
        bounds = [
            upper_bound(finetuned[name].marks, rate.marks, confidence=confidence)
            for name, rate in rates.items()
            if rate.kind == kind
        ]
        return max(bounds, default=None)

    return Cost(
        harm=harm_of(rates),
        utility_drop=worst("task"),
        over_refusal_rise=worst("safe"),
        utility_at_most=at_most("task"),
        over_refusal_at_most=at_most("safe"),
    )


def harm_of(rates: Rates) -> float:
    """Mean bad share of harmful suites; with open answers, the least it can become."""
    return fmean(rate.share for rate in rates.values() if rate.kind == "harmful")


def least_excess(rates: Rates, finetuned: Rates, limits: Limits) -> float | None:
    """By how much the worst suite exceeds its limit at least, whatever open answers will be.

    Returns:
        A share, negative where there is room; None where nothing is limited.
    """
    found = [
        rise - limit
        for kind, limit in (("task", limits.utility_drop), ("safe", limits.over_refusal_rise))
        if limit < 1
        for rise in _rises(rates, finetuned, kind)
    ]
    return max(found, default=None)


def _rises(rates: Rates, finetuned: Rates, kind: str) -> list[float]:
    return [rate.share - finetuned[name].share for name, rate in rates.items() if rate.kind == kind]


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

    def refusal(self) -> float | None:
        """Mean log-odds of refusing; None where they cannot be had."""
        prompts = [
            item.prompt
            for suite in self._suites
            if suite.kind == "harmful"
            for item in suite.limited(PROXY_PROMPTS).items
        ]
        odds = refusal_logodds(
            self._loaded, prompts, batch_size=4 * self._batch, progress=self._progress
        )
        return None if odds.values is None else fmean(odds.values)

    def distance(self) -> float:
        """Mean KL from the fine-tune; 0 where there is nothing to measure it on."""
        if self._trace is None:
            return 0.0
        curve = kl_to_reference(
            self._loaded, self._trace, batch_size=self._batch, progress=self._progress
        )
        return fmean(value for values in curve.per_prompt for value in values)

    def rates(self) -> dict[str, Rate]:
        """Generate and judge every answer."""
        *_, (_, found) = self.ask()
        return found

    def ask(self) -> Iterator[tuple[int, dict[str, Rate]]]:
        """Generate and judge in rounds.

        Yields:
            The number of the round and what is known after it; the last one leaves nothing open.
        """
        known = {suite.name: [OPEN] * len(suite.items) for suite in self._suites}
        invalid = dict.fromkeys(known, 0)
        for turn in range(2 * ROUNDS):
            asked = False
            for suite in self._suites:
                part = turn - (HARM if suite.kind == "harmful" else COSTS)
                parts = min(ROUNDS, max(1, len(suite.items) // self._batch))
                if not 0 <= part < parts:
                    continue
                asked = True
                places = range(part, len(suite.items), parts)
                answers = self._judged(suite, [suite.items[at] for at in places])
                invalid[suite.name] += sum(value is None for value in answers)
                for at, value in zip(places, answers, strict=True):
                    known[suite.name][at] = GOOD if value is False else BAD
            if asked:
                yield (
                    turn,
                    {
                        suite.name: Rate(
                            suite.kind,
                            METRICS[self._judges[suite.name], suite.kind][0].name,
                            marks_of(suite, known[suite.name]),
                            invalid[suite.name],
                        )
                        for suite in self._suites
                    },
                )

    def _judged(self, suite: Suite, items: Sequence[Item]) -> tuple[bool | None, ...]:
        """Whether each answer is bad; None where no judge can say."""
        loaded = self._loaded
        length = self._length or suite.max_new_tokens or DEFAULT_MAX_NEW_TOKENS
        prompts = [encode(loaded.tokenizer, item.prompt) for item in items]
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
        asked = replace(suite, items=tuple(items))
        judge, kind, digest = response_judge(suite, name)
        results = judge_responses(asked, [Response(text, "") for text in texts], judge=judge)
        instrument = Instrument(
            asked, Generation("greedy", length), JudgeIdentity(name, kind, digest)
        )
        metric = METRICS[name, suite.kind][0]
        for outcome in outcomes_of(instrument, {"subject": results}):
            if outcome.metric is metric:
                return outcome.values
        return (None,) * len(items)  # nothing that the judge can know


def marks_of(suite: Suite, marks: Sequence[str]) -> str:
    """The marks of a suite's items as one string, cluster by cluster.

    Args:
        suite: gives the clusters; an item without one is one of its own.
        marks: in the order of the suite.
    """
    clusters: dict[str, list[str]] = {}
    for item, mark in zip(suite.items, marks, strict=True):
        clusters.setdefault(item.cluster or f"\0{item.id}", []).append(mark)
    return APART.join("".join(each) for each in clusters.values())
