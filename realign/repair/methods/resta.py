"""RESTA: add the whole safety vector, by task arithmetic (arXiv 2402.11746)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from realign.repair.edit import Dense, Difference, Edit, Layer, Unchanged, VectorKind
from realign.repair.method import Card, Method, Scope
from realign.repair.parameters import Choice, Real, parameter
from realign.repair.preparation import Statistics

CARD = Card(
    title="RESTA: restoring safety by task arithmetic",
    source="Bhardwaj et al., arXiv 2402.11746, ACL 2024",
    summary="add a multiple of the whole safety vector",
    idea="What un-alignment took away, seen as a direction in weight space, is added back. The "
    "baseline that every filtered form of the same vector has to beat.",
    equations="""\
delta_safe = W_aligned - W_unaligned
W' = W_finetuned + gamma delta_safe""",
    inputs="fine-tuned, aligned, unaligned (or base); no data",
    touches="every parameter; buffers are copied",
    edit_kind="dense",
    cost="reading three checkpoints and writing one",
    deviations=(
        "gamma is not confirmed by the paper's text at hand; 0.5 is a public baseline's value.",
        "The variant that also drops and rescales task entries (DARE) is not offered.",
    ),
    cautions=(
        "The full vector carries general ability, chat format and length as well as safety: with "
        "`base` most of it is not about safety. Watch over-refusal and the task.",
        "Linear in gamma and not idempotent: running it twice adds twice.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Resta(Method):
    """Task arithmetic with the safety vector."""

    name: ClassVar[str] = "resta"
    card: ClassVar[Card] = CARD
    paper_vector: ClassVar[VectorKind | None] = "unaligned"
    elementwise: ClassVar[bool] = True
    default_scope: ClassVar[Scope] = "all"

    gamma: float = parameter(
        0.5, Real(0.0), symbol="gamma", source="a public baseline; 0.3 to 1.0 elsewhere"
    )
    """How much of the safety vector is added; the same as the strength t."""

    safety_vector: str = parameter(
        "auto",
        Choice(("auto", "unaligned", "base")),
        symbol="delta_safe",
        source="the paper takes `unaligned`",
    )
    """Aligned minus unaligned or aligned minus base; `auto` takes the paper's if it was given."""

    def linear_edit(self) -> Difference | None:
        """Return gamma delta_safe."""
        kind = self.vector_kind
        if kind is None or self.gamma == 0.0:
            return None
        return Difference(factor=self.gamma, minus=kind, zero="safety vector is zero")

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = gamma delta_safe, in the shape of the tensor or chunk."""
        kind = self.vector_kind
        assert kind is not None
        if self.gamma == 0.0:
            return Unchanged("gamma is 0")
        delta_safe = layer.safety_vector(kind)
        if not bool(delta_safe.any()):
            return Unchanged("safety vector is zero")
        return Dense(delta_safe.mul_(self.gamma))
