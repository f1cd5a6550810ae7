"""Safe LoRA: filter the task vector by the alignment directions where it strays from them.

arXiv 2405.16833. For an adapter only its B factors change; the full form is the same equation on
whole matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from realign.errors import UsageError
from realign.repair.edit import Dense, Edit, Layer, VectorKind, from_factors
from realign.repair.method import Card, CostClass
from realign.repair.methods.cosine import NO_TASK, UNTOUCHED, CosineMethod
from realign.repair.parameters import Choice, Either, Integer, Real, parameter
from realign.repair.preparation import Scores, Selection, Statistics

CARD = Card(
    title="Safe LoRA: the task vector seen through alignment",
    source="Hsu et al., arXiv 2405.16833, NeurIPS 2024",
    summary="filter the task vector by the alignment directions where it strays from them; no data",
    idea="The difference between the aligned and the base model says where alignment lives in a "
    "matrix. A task vector that has little in common with it is replaced by its part inside. C is "
    "a cheap stand-in for the projector on these directions, and no projector: it weighs them by "
    "their energy, is not idempotent, and scales with norm(V).",
    equations="""\
V = W_aligned - W_base;  C = V V^T / norm(V)
c = cos(C dW, dW),  dW = s B A of an adapter, or W_finetuned - W_aligned
selected:      B <- C B, A unchanged   (full form: W' = W_aligned + C dW)
not selected:  unchanged
chance level:  c0 = norm(V)^2 / (sqrt(d_out) norm(V V^T)), what an unrelated dW gives, about""",
    inputs="fine-tuned (an adapter or full weights), aligned, base; no data",
    touches="weights of linear layers in decoder blocks; of an adapter its B factors alone",
    edit_kind="low-rank for an adapter (its rank), else dense",
    cost="a few matrix products per matrix",
    deviations=(
        "The threshold is the default; the public code's default is number, whose count does not "
        "carry over to models of another depth.",
        "tau = auto takes the chance level of each matrix: our addition. projector = unit, whose "
        "largest gain is 1, is ours, too.",
        "A matrix that alignment did not touch is left alone.",
        "safety_vector = unaligned, which the paper does not have, is offered as well.",
    ),
    defects=(
        "Base and aligned weights are paired by name, not zipped by order and picked by substring, "
        "which biases (Qwen) break.",
        "A and B are told apart by name, not by a shape that equals the rank.",
        "Cosines are not rounded to five digits before they are compared: number selects exactly "
        "as many as it says, ties by name.",
        "A zero V gives no NaN.",
        "C is never kept: an adapter's B goes through V (V^T B), a matrix at a time, and no second "
        "model is in memory.",
        "Selection is finished before any tensor changes: nothing is projected twice.",
        "The product with C is taken in float32, not in the 16 bits of the file.",
        "Target modules given as one regular expression are not split into characters.",
    ),
    cautions=(
        "A fixed tau means little alone: where it is below the chance level, even an update "
        "unrelated to alignment passes untouched. Look at cosine and chance_cosine together.",
        "For a V of full rank the true projector is the identity: C is a spectral filter. It "
        "shrinks what it selects by norm(V), so the task suffers where V is small.",
        "Not idempotent: a second run filters once more.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class SafeLora(CosineMethod):
    """The alignment filter on selected matrices."""

    name: ClassVar[str] = "safe_lora"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "decomposition"
    paper_vector: ClassVar[VectorKind | None] = "base"

    selection: str = parameter(
        "threshold",
        Choice(("threshold", "number")),
        source="our choice; the public code's default is number",
    )
    """Select by a threshold on the cosine, or the matrices with the lowest cosines."""

    tau: float | str = parameter(
        0.5,
        Either((Real(0.0), Choice(("auto",)))),
        symbol="tau",
        source="the public code; 0.35 and 0.3 elsewhere",
    )
    """A matrix is selected if its cosine is below this; `auto`: below its own chance level."""

    num_layers: int = parameter(
        10, Integer(1), symbol="K", source="the public code; read with selection=number only"
    )
    """How many matrices are selected: those with the lowest cosines; all if there are fewer."""

    projector: str = parameter(
        "paper",
        Choice(("paper", "unit")),
        symbol="C",
        source="arXiv 2405.16833; `unit` is ours",
    )
    """V V^T / norm(V), or V V^T / S_1^2, whose largest gain is 1."""

    safety_vector: str = parameter(
        "base", Choice(("base", "unaligned", "auto")), symbol="V", source="the public code"
    )
    """Aligned minus base, or aligned minus unaligned."""

    def check_settings(self) -> None:
        """Refuse a threshold that selects nothing."""
        if self.selection == "threshold" and self.tau == 0.0:
            raise UsageError(
                "tau = 0 selects no matrix: safe_lora would change nothing",
                "give a number above 0, or tau = auto",
            )

    def fixed_count(self) -> tuple[str, int] | None:
        """Return K, where it is what selects."""
        return ("num_layers", self.num_layers) if self.selection == "number" else None

    @property
    def threshold(self) -> float | str:
        """See `CosineMethod.threshold`."""
        return self.tau

    def select(self, scores: Scores) -> Selection | None:
        """Choose by threshold, or exactly K matrices (all, if there are fewer), ties by name."""
        if self.selection == "threshold":
            return super().select(scores)
        ordered = sorted(scores, key=lambda key: (scores[key]["cosine"], key))
        return frozenset(ordered[: self.num_layers])

    def why_not(self) -> str:
        """See `CosineMethod.why_not`."""
        if self.selection == "number":
            return f"its cosine is not among the {self.num_layers} lowest"
        return super().why_not()

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = C dW - dW of a selected matrix: s (C B - B) A for an adapter."""
        reason = self.not_selected(layer, statistics)
        if reason is not None:
            return reason
        own = self.filter_of(layer)
        if own is None:
            return UNTOUCHED
        facts, gain = self.score_facts(layer, statistics), own.gain(self.projector)
        if layer.lora is not None:
            up = layer.lora.scale * layer.lora.up.to(own.v_oi)
            down = layer.lora.down.to(own.v_oi)
            if not (bool(up.any()) and bool(down.any())):
                return NO_TASK
            return from_factors(gain * own.push(up) - up, down, facts)
        task = layer.task_vector()
        if not bool(task.any()):
            return NO_TASK
        return Dense(own.push(task).mul_(gain).sub_(task), facts=facts)
