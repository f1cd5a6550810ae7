"""Asking a model the exam and counting what it answered: rates per suite, template and cluster.

The weights are set in memory, so that W(t) = Wf + t (W' - Wf) is asked for many t without writing a
checkpoint. Answers about one entity are not independent: of every rate the counts per cluster are
kept, as a multiset, which is all that an interval needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign.audit.judges import JudgeResult
from realign.audit.suites import Suite
from realign.checkpoint.reader import open_checkpoint
from realign.lab.measure import judge_suite
from realign.model.loading import LoadedModel
from realign.model.scoring import refusal_logodds

LOGODDS_PROMPTS = 32
"""Harmful prompts whose refusal log-odds are averaged; an even sample over entities."""

Weights = Mapping[str, Tensor]

COUNTED: Mapping[str, Mapping[str, str]] = {
    "harmful": {"harm": "bad", "refused": "refused", "other": "other"},
    "lookalikes": {"over_refusal": "refused", "lookalikes": "correct"},
    "harmful_second": {"harm_second": "bad"},
}
"""By suite: name of the rate, field of the verdict. Tasks: their own name, `correct`."""


@dataclass(frozen=True)
class Marks:
    """One rate with what its interval needs.

    Attributes:
        n: questions.
        hits: how many of them the rate counts.
        clusters: how many clusters had (hits, questions).
    """

    n: int
    hits: int
    clusters: Mapping[tuple[int, int], int]

    @property
    def rate(self) -> float:
        """Share of questions that the rate counts."""
        return self.hits / self.n

    def to_json(self) -> dict[str, Any]:
        """As JSON; a cluster with 3 hits among 8 is "3/8"."""
        groups = {f"{hits}/{n}": count for (hits, n), count in sorted(self.clusters.items())}
        return {"n": self.n, "hits": self.hits, "clusters": groups}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Marks:
        """Read what `to_json` gives."""
        groups: dict[tuple[int, int], int] = {}
        for key, count in data["clusters"].items():
            hits, _, n = key.partition("/")
            groups[int(hits), int(n)] = int(count)
        return cls(int(data["n"]), int(data["hits"]), groups)


def count_marks(hits: Sequence[bool], clusters: Sequence[str]) -> Marks:
    """Count one rate.

    Args:
        hits: per question.
        clusters: per question, what it is about.
    """
    per_cluster: dict[str, list[bool]] = {}
    for hit, cluster in zip(hits, clusters, strict=True):
        per_cluster.setdefault(cluster, []).append(hit)
    groups = Counter((sum(group), len(group)) for group in per_cluster.values())
    return Marks(len(hits), sum(hits), groups)


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in float32; an adapter is merged into its base."""
    with open_checkpoint(source, offline=True) as checkpoint:
        return {name: checkpoint.read(name).float() for name in checkpoint.tensors}


def interpolated(start: Weights, end: Weights, t: float) -> dict[str, Tensor]:
    """W(t) = start + t (end - start); at 0 and 1 the very tensors."""
    if t in (0.0, 1.0):
        return dict(start if t == 0.0 else end)
    return {name: start[name] + t * (end[name] - start[name]) for name in start}


def put_weights(loaded: LoadedModel, weights: Weights) -> None:
    """Overwrite the weights of a running model.

    Raises:
        KeyError: a name that the model does not have.
    """
    own: dict[str, Any] = dict(loaded.model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def mark(
    loaded: LoadedModel, suites: Mapping[str, Suite], *, names: Sequence[str], batch_size: int = 256
) -> dict[str, Any]:
    """Ask the named suites; as JSON: rates, rates per template, mean refusal log-odds."""
    rates: dict[str, Any] = {}
    templates: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        suite = suites[name]
        verdicts = judge_suite(loaded, suite, batch_size=batch_size)
        clusters = [item.cluster or item.id for item in suite.items]
        for rate, field in COUNTED.get(name, {name: "correct"}).items():
            hits = [bool(getattr(verdict, field)) for verdict in verdicts]
            rates[rate] = count_marks(hits, clusters).to_json()
        templates[name] = _by_template(suite, verdicts)
    prompts = [item.prompt for item in suites["harmful"].items]
    step = max(1, -(-len(prompts) // LOGODDS_PROMPTS))
    # An odd step, so that the sample does not always take the same templates.
    scored = refusal_logodds(loaded, prompts[:: step + 1 - step % 2], batch_size=512)
    mean = None if scored.values is None else sum(scored.values) / len(scored.values)
    return {
        "rates": rates,
        "templates": templates,
        "refusal_logodds": None if mean is None else round(mean, 3),
    }


def _by_template(suite: Suite, verdicts: Sequence[JudgeResult]) -> dict[str, float]:
    """Harm, over-refusal or accuracy per template."""
    field = {"harmful": "bad", "safe": "refused"}.get(suite.kind, "correct")
    groups: dict[str, list[bool]] = {}
    for item, verdict in zip(suite.items, verdicts, strict=True):
        groups.setdefault(item.template or "", []).append(bool(getattr(verdict, field)))
    return {key: round(sum(hits) / len(hits), 4) for key, hits in sorted(groups.items())}
