"""What Safe LoRA and SafeMERGE share: the cosine of every task vector with its filtered image.

`prepare` leaves for every matrix its cosine c and the chance level c0, `select` takes the low ones.
The reading of the definitions is in `realign.subspace.alignment_cosine`. Not here: what becomes of
the matrices that are selected (`safe_lora`, `safemerge`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from realign.repair.edit import Facts, Layer, LoraFactors, Unchanged
from realign.repair.method import Method
from realign.repair.preparation import Scores, Selection, Statistics, Workbench
from realign.subspace.alignment_cosine import AlignmentFilter

UNTOUCHED = Unchanged("alignment did not touch this tensor")
NO_TASK = Unchanged("task vector is zero")


@dataclass(frozen=True, kw_only=True)
class CosineMethod(Method):
    """A method that edits the matrices whose task vector agrees little with alignment."""

    @property
    def threshold(self) -> float | str:
        """A cosine, or "auto" for the chance level of each matrix."""
        raise NotImplementedError

    def filter_of(self, layer: Layer) -> AlignmentFilter | None:
        """Return the alignment filter of a matrix, None where alignment did not touch it."""
        kind = self.vector_kind
        assert kind is not None
        v_oi = layer.safety_vector(kind)
        return AlignmentFilter(v_oi) if bool(v_oi.any()) else None

    def score(self, layer: Layer) -> Mapping[str, float] | None:
        """Return c and c0 of one matrix; None where the vectors leave nothing to compare."""
        own = self.filter_of(layer)
        if own is None:
            return None
        if layer.lora is None:
            cosine = own.cosine(layer.task_vector())
        else:
            cosine = own.factored_cosine(layer.lora.up, layer.lora.down)
        return None if cosine is None else {"cosine": cosine, "chance_cosine": own.chance}

    def prepare(self, workbench: Workbench) -> Statistics:
        """Compute the cosine of every matrix to edit; no data, no model."""
        scores: dict[str, Mapping[str, float]] = {}
        total = len(workbench.slots)
        with workbench.progress.task("cosines", total=total, unit="matrices") as task:
            for layer in workbench.layers():
                score = self.score(_on(layer, workbench.device))
                if score is not None:
                    scores[layer.key] = score
                task.advance(1)
        return Statistics(scores=scores, facts=self._facts(scores))

    def select(self, scores: Scores) -> Selection | None:
        """Choose the matrices whose cosine is below the threshold, strictly."""
        return frozenset(key for key, each in scores.items() if each["cosine"] < self.bound(each))

    def bound(self, score: Mapping[str, float]) -> float:
        """Return the threshold for one matrix."""
        asked = self.threshold
        return score["chance_cosine"] if isinstance(asked, str) else asked

    def not_selected(self, layer: Layer, statistics: Statistics) -> Unchanged | None:
        """Return why a matrix is left alone, None where it was selected."""
        score = statistics.scores.get(layer.key)
        if statistics.selects(layer.key):
            return None
        if score is None:
            return UNTOUCHED if self.filter_of(layer) is None else NO_TASK
        return Unchanged(self.why_not())

    def why_not(self) -> str:
        """Say why a cosine does not call for an edit; the row's facts hold the cosine itself."""
        asked = self.threshold
        if isinstance(asked, str):
            return "its cosine is not below its chance level"
        return f"its cosine is not below {asked:g}"

    def score_facts(self, layer: Layer, statistics: Statistics) -> Facts:
        """Return c and c0 for the report, where they were computed."""
        return dict(statistics.scores.get(layer.key, {}))

    def _facts(self, scores: Scores) -> Facts:
        cosines = [each["cosine"] for each in scores.values()]
        chances = [each["chance_cosine"] for each in scores.values()]
        below = sum(each["cosine"] < each["chance_cosine"] for each in scores.values())
        return {
            "matrices_compared": len(scores),
            "below_chance": below,
            "lowest_cosine": min(cosines, default=math.nan) if scores else None,
            "highest_cosine": max(cosines, default=math.nan) if scores else None,
            "lowest_chance": min(chances, default=math.nan) if scores else None,
            "highest_chance": max(chances, default=math.nan) if scores else None,
        }


def _on(layer: Layer, device: torch.device) -> Layer:
    """The layer on an accelerator that knows float64, where one is used."""
    if device.type in ("cpu", "mps"):
        return layer
    lora = layer.lora
    moved: dict[str, Any] = {
        name: each.to(device)
        for name in ("finetuned", "aligned", "base", "unaligned")
        if isinstance(each := getattr(layer, name), torch.Tensor)
    }
    if lora is not None:
        moved["lora"] = LoraFactors(lora.down.to(device), lora.up.to(device), lora.scale)
    return dataclasses.replace(layer, **moved)
