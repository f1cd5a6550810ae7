"""SafeMERGE: mix in a safety model where the task vector strays from alignment (arXiv 2503.17239).

The selection is Safe LoRA's. Without a safety model its place is taken by the aligned one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.repair.edit import Dense, Edit, Facts, Layer, Unchanged, VectorKind, from_factors
from realign.repair.method import Card, CostClass, Given, Role, Settled, with_settings
from realign.repair.methods.cosine import NO_TASK, UNTOUCHED, CosineMethod
from realign.repair.parameters import Choice, Either, Real, parameter
from realign.repair.preparation import Statistics
from realign.subspace.vectors import difference

CARD = Card(
    title="SafeMERGE: selective merging with a safety model",
    source="Djuhera et al., arXiv 2503.17239, ICLR 2025 workshop",
    summary="mix a safety model into the matrices whose task vector strays from alignment",
    idea="Where a task vector has little in common with the alignment directions, it is averaged "
    "with the update that a fine-tune on refusals made to the same matrix; everywhere else the "
    "fine-tune stays as it is.",
    equations="""\
V = W_aligned - W_base;  C = V V^T / norm(V)
rho = cos(C dW_f, dW_f),  dW_f = W_finetuned - W_aligned
rho < tau:  W' = w W_finetuned + (1 - w) W_safety
else:       W' = W_finetuned
two adapters: B = [w s_f B_f, (1 - w) s_s B_s], A = [A_f ; A_s], which is exact""",
    inputs="fine-tuned, aligned, base, and a safety model (the aligned one after a fine-tune on "
    "safe data) if there is one; no data",
    touches="weights of linear layers in decoder blocks that the fine-tune has moved",
    edit_kind="low-rank where fine-tune and safety model are adapters over the aligned model, "
    "else dense",
    cost="a few matrix products per matrix",
    deviations=(
        "Without a safety model the aligned one stands for it: selected matrices shrink towards "
        "their aligned values (safety_model = aligned, said in the plan).",
        "A matrix that alignment did not touch, or that the fine-tune did not move, is left alone.",
        "The merged product is not recompressed to a smaller rank; --max-patch-rank does that to a "
        "patch, and reports the error.",
        "tau = auto, the chance level of each matrix, and safety_vector = unaligned are ours.",
    ),
    defects=(
        "Products are mixed, not factors: summing the A's and the B's by the square roots of their "
        "weights adds sqrt(w (1 - w)) (B_f A_s + B_s A_f), 0.4 of each cross product at 0.8.",
        "Matrices are paired by name, not by a running counter over modules.",
        "A zero V does not count as a cosine of 0, which would always merge.",
        "No model is told by its path's name.",
    ),
    cautions=(
        "A fixed tau means little alone: compare cosine with chance_cosine.",
        "The safety model is a fine-tune of the same aligned model on 500 to 1000 pairs; of "
        "another parent it is no safety model.",
        "Not idempotent: a second run mixes again.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Safemerge(CosineMethod):
    """Selective mixing with a safety model."""

    name: ClassVar[str] = "safemerge"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "decomposition"
    paper_vector: ClassVar[VectorKind | None] = "base"

    tau: float | str = parameter(
        0.35,
        Either((Real(0.0), Choice(("auto",)))),
        symbol="tau",
        source="the public code",
    )
    """A matrix is mixed if its cosine is below this; `auto`: below its own chance level."""

    w: float = parameter(0.8, Real(0.0, 1.0), symbol="w", source="the public code")
    """Share of the fine-tune in a mixed matrix; the safety model has the rest."""

    safety_model: str = parameter(
        "auto", Choice(("auto", "safety", "aligned")), symbol="W_safety", source="our choice"
    )
    """The model of --safety-model, or the aligned one; `auto`: the former if it is given."""

    safety_vector: str = parameter(
        "base", Choice(("base", "unaligned", "auto")), symbol="V", source="the public code"
    )
    """Aligned minus base, or aligned minus unaligned."""

    def check_settings(self) -> None:
        """Refuse to select nothing, or to mix in nothing."""
        if self.tau == 0.0:
            raise UsageError(
                "tau = 0 selects no matrix: safemerge would change nothing",
                "give a number above 0, or tau = auto",
            )
        if self.w == 1.0:
            raise UsageError(
                "w = 1 keeps the fine-tune whole: safemerge would change nothing",
                "give a number in [0, 1)",
            )

    @property
    def threshold(self) -> float | str:
        """See `CosineMethod.threshold`."""
        return self.tau

    def required_roles(self) -> frozenset[Role]:
        """The safety model only where it is used."""
        extra: frozenset[Role] = frozenset({"safety"} if self.safety_model == "safety" else ())
        return super().required_roles() | extra

    def settled(self, given: Given) -> Settled:
        """Decide what stands for the safety model, and the safety vector."""
        chosen, note = self.safety_model, ""
        if chosen == "auto":
            chosen = "safety" if "safety" in given.roles else "aligned"
            if chosen == "aligned":
                note = (
                    "no safety model is given (--safety-model): safemerge mixes with the aligned "
                    "model, safety_model = aligned"
                )
        elif chosen == "safety" and "safety" not in given.roles:
            raise UsageError(
                "safemerge with safety_model = safety needs the safety model",
                "give the aligned model after a fine-tune on safe data with --safety-model, or use "
                "--set safety_model=aligned",
            )
        inner = super(Safemerge, with_settings(self, safety_model=chosen)).settled(given)
        return Settled(inner.method, "; ".join(each for each in (inner.note, note) if each))

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = (1 - w) (W_safety - W_finetuned) of a selected matrix."""
        if self.w == 1.0:
            return Unchanged("w is 1")
        reason = self.not_selected(layer, statistics)
        if reason is not None:
            return reason
        if self.filter_of(layer) is None:
            return UNTOUCHED
        task = layer.task_vector()
        if not bool(task.any()):
            return NO_TASK
        return self._mixed(layer, task, self.score_facts(layer, statistics))

    def _mixed(self, layer: Layer, task: Tensor, facts: Facts) -> Edit:
        share, own, other = 1.0 - self.w, layer.lora, layer.safety_lora
        aligned = layer.require("aligned")
        safe = layer.require("safety") if self.safety_model == "safety" else aligned
        moved = safe is not aligned and bool(difference(safe, aligned).any())
        if own is not None and not moved:
            up = -share * own.scale * own.up.to(task)
            return from_factors(up, own.down.to(task), facts)
        if own is not None and other is not None:
            ups = (-share * own.scale * own.up.to(task), share * other.scale * other.up.to(task))
            downs = (own.down.to(task), other.down.to(task))
            return from_factors(torch.cat(ups, dim=1), torch.cat(downs, dim=0), facts)
        towards = difference(safe, layer.finetuned)
        if not bool(towards.any()):
            return Unchanged("the safety model agrees with the fine-tune")
        if share == 1.0:
            return Dense(towards, target=safe, facts=facts)
        return Dense(towards.mul_(share), facts=facts)
