"""A fine-tune of the leaderboard on which single questions about single methods are asked.

Repairs by the ordinary engine, edits put together by hand, the leaderboard's own exam, and two
sensitive scores that need no generation. Not here: the questions (`why`).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign.lab.compare import given_to
from realign.lab.estimates import estimate_mean, estimate_rate
from realign.lab.leaderboard import Answers, Repeat
from realign.lab.marking import mark, put_weights, read_weights
from realign.lab.places import Place
from realign.model.chat import encode_reply
from realign.model.logprobs import continuation_logprobs
from realign.repair.engine import repair
from realign.repair.method import Method
from realign.repair.request import RepairRequest

Weights = dict[str, Tensor]
Row = dict[str, Any]
Question = tuple[str, str, Callable[[], Row]]
"""Method, what is asked, and how."""
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def is_matrix(name: str) -> bool:
    """Whether a tensor is a linear layer of a decoder block."""
    return any(f".{kind}.weight" in name for kind in KINDS)


def flat(weights: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The named tensors as one vector, float64."""
    return torch.cat([weights[name].double().flatten() for name in names])


def cosine_of(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors; NaN where one is zero."""
    norms = float(a.norm() * b.norm())
    return float(a @ b) / norms if norms else math.nan


class Bench:
    """One place with its models as dictionaries of tensors."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.wf, self.wa = dict(place.start), read_weights(place.role("aligned"))
        self.w0, self.wu = read_weights(place.role("base")), read_weights(place.role("unaligned"))
        self.names = [name for name in self.wf if is_matrix(name)]
        self.answers: dict[tuple[str, str], dict[str, Any]] = {}
        """By method and what was asked."""

    def ask(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The leaderboard's exam as one row: rates with intervals, and what they cost."""
        put_weights(self.place.loaded, weights)
        marks = mark(self.place.loaded, self.place.exam, names=self.place.asked)
        tasks = self.place.scenario.tasks
        repeat = Repeat(Answers.from_json(marks, tasks), self.aligned, self.finetuned)
        over, general = repeat.side_costs
        rates = repeat.point.rates
        found = {
            name: estimate_rate([rates[name]]).to_json()
            for name in ("harm", "refused", "other", "over_refusal", "general", "lookalikes")
        }
        found["downstream"] = estimate_mean([[rates[task]] for task in tasks]).to_json()
        return {
            "rates": found,
            "drop": round(repeat.drop, 5),
            "over_refusal_rise": round(over, 5),
            "general_drop": round(general, 5),
            "refusal_logodds": marks["refusal_logodds"],
        }

    @cached_property
    def finetuned(self) -> Answers:
        return self._answers(self.wf)

    @cached_property
    def aligned(self) -> Answers:
        return self._answers(self.wa)

    def _answers(self, weights: Mapping[str, Tensor]) -> Answers:
        put_weights(self.place.loaded, weights)
        marks = mark(self.place.loaded, self.place.exam, names=self.place.asked)
        return Answers.from_json(marks, self.place.scenario.tasks)

    def repaired(self, method: Method, **other: Any) -> tuple[Weights, dict[str, Any]]:
        """W' at strength 1 by the engine, with the manifest; `other` replaces what it is given."""
        with tempfile.TemporaryDirectory(prefix="realign-why-") as work:
            request: dict[str, Any] = {
                "finetuned": self.place.subject,
                "output": Path(work) / "out",
                "method": method,
                "anchors": self.place.family / "suites" / "anchors.jsonl",
                "device": "cpu",
                "offline": True,
                "cache_dir": Path(work) / "cache",
                **given_to(self.place, method),
            }
            repair(RepairRequest(**(request | other)))
            manifest = json.loads((Path(work) / "out" / "realign.json").read_text("utf-8"))
            return read_weights(Path(work) / "out"), manifest

    def with_aligned(self, names: Sequence[str]) -> Weights:
        """The fine-tune with the aligned model's weights in some matrices."""
        return {**self.wf, **{name: self.wa[name] for name in names}}

    def moved(self, t: float, end: Mapping[str, Tensor]) -> Weights:
        """Wf + t (end - Wf)."""
        return {name: own + t * (end[name] - own) for name, own in self.wf.items()}

    def random_mask(self, name: str, share: float) -> Tensor:
        """Entries of a matrix, each marked with probability `share`."""
        rng = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
        return torch.rand(self.wf[name].shape, generator=rng) < share

    def scores(self, weights: Mapping[str, Tensor]) -> tuple[float, float]:
        """Nats per token by which refusals beat recipes on hazards; the task's loss per token.

        Both on the texts that methods are given, the first 96 rows: teacher-forced.
        """
        put_weights(self.place.loaded, weights)
        safe, harmful = self._losses("safe"), self._losses("harmful")
        return harmful - safe, self._losses("task")

    def _losses(self, kind: str) -> float:
        lines = self.place.texts[kind].read_text("utf-8").splitlines()[:96]
        rows = [json.loads(line) for line in lines]
        loaded = self.place.loaded
        replies = [encode_reply(loaded.tokenizer, row["prompt"], row["response"]) for row in rows]
        pairs = [(reply.prompt_ids, reply.reply_ids) for reply in replies]
        found = continuation_logprobs(loaded, pairs, batch_size=96)
        return -float(torch.cat(found).mean())
