"""WiSE-FT: interpolate between the fine-tuned and the aligned weights (arXiv 2109.01903)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from realign.errors import UsageError
from realign.repair.edit import Dense, Difference, Edit, Layer, Unchanged
from realign.repair.method import Card, Method, Scope
from realign.repair.parameters import Real, parameter
from realign.repair.preparation import Statistics
from realign.subspace.vectors import difference

CARD = Card(
    title="WiSE-FT: interpolation with the aligned model",
    source="Wortsman et al., arXiv 2109.01903, CVPR 2022; for safety Farn et al., "
    "arXiv 2412.19512, EMNLP 2025 Findings",
    summary="go part of the way back to the aligned model",
    idea="Weights on the straight line between two fine-tunes of one parent often keep the skills "
    "of both. It needs nothing but the aligned model: any other method must beat it at equal "
    "utility before it is worth its cost.",
    equations="W' = (1 - a) W_finetuned + a W_aligned",
    inputs="fine-tuned, aligned; no data",
    touches="every parameter; tensors that the aligned model lacks are copied",
    edit_kind="dense",
    cost="reading two checkpoints and writing one",
    deviations=(
        "The other end of the line is always the aligned model, never the base.",
        "a = 1 gives the aligned weights exactly, without rounding.",
    ),
    cautions=("The task goes as safety comes: sweep a from 0.1 to 0.9 and look at the curve.",),
)


@dataclass(frozen=True, kw_only=True)
class WiseFt(Method):
    """Linear interpolation towards the aligned weights."""

    name: ClassVar[str] = "wise_ft"
    card: ClassVar[Card] = CARD
    elementwise: ClassVar[bool] = True
    default_scope: ClassVar[Scope] = "all"

    a: float = parameter(
        0.5, Real(0.0, 1.0), symbol="a", source="arXiv 2412.19512 by public summaries"
    )
    """How far to go: 0 is the fine-tune, 1 the aligned model."""

    def check_settings(self) -> None:
        """Refuse to stay where the fine-tune is."""
        if self.a == 0.0:
            raise UsageError(
                "a = 0 is the fine-tune itself: wise_ft would change nothing",
                "give a number in (0, 1] (default 0.5)",
            )

    def linear_edit(self) -> Difference | None:
        """Return a (Wa - Wf)."""
        if self.a == 0.0:
            return None
        return Difference(
            factor=self.a,
            minus="finetuned",
            zero="task vector is zero",
            exact=self.a == 1.0,
        )

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = a (Wa - Wf), in the shape of the tensor or chunk."""
        if self.a == 0.0:
            return Unchanged("a is 0")
        if layer.aligned is None:
            return Unchanged("absent from the aligned model")
        towards = difference(layer.aligned, layer.finetuned)
        if not bool(towards.any()):
            return Unchanged("task vector is zero")
        if self.a == 1.0:
            return Dense(towards, target=layer.aligned)
        return Dense(towards.mul_(self.a))
