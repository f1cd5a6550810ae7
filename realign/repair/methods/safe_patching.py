"""SafePatching: two patches from harmful texts, merged where they do not contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.repair.demands import ModelSize
from realign.repair.edit import Dense, Edit, Layer, Unchanged
from realign.repair.kept_tensors import tables_of
from realign.repair.method import Card, Method
from realign.repair.parameters import Integer, Real, parameter
from realign.repair.preparation import Statistics, Workbench
from realign.subspace.masks import count_down, largest

CARD = Card(
    title="SafePatching",
    source="Zhao et al., arXiv 2405.13820 (v2, 2024); equations reconstructed from reviews",
    summary="unlearn harmful answers; keep the entries that do not make refusals excessive",
    idea=(
        "Gradient ascent on harmful answers makes a patch that enhances safety, descent on the "
        "same texts one that takes over-safety off. Both are thinned out at random and kept on "
        "the entries that matter for one of them but not for the other."
    ),
    equations=(
        "NLL over harmful (question, answer) pairs, theta = W_f\n"
        "P_SE  = theta_SE  - theta    theta_SE by gradient ascent on NLL\n"
        "P_OSM = theta_OSM - theta    theta_OSM by gradient descent on NLL\n"
        "P' = M (.) P,  M ~ Bernoulli(p)\n"
        "I = mean over texts of |W (.) dL/dW|     SNIP, at theta_SE and at theta_OSM\n"
        "d_SE  = P'_SE  on Top_a(I_SE)  minus Top_b(I_OSM)\n"
        "d_OSM = P'_OSM on Top_b(I_OSM) minus Top_a(I_SE)\n"
        "W' = theta + alpha d_SE + beta d_OSM"
    ),
    inputs="the fine-tune alone, in memory in float32 with gradients; --harmful-data",
    touches="block_linear: the linear layers of the decoder blocks",
    edit_kind="dense: entry by entry",
    cost="two short trainings, and one backward pass per text and patched model",
    deviations=(
        "theta is the fine-tune: the paper patches aligned models.",
        "p, a, b, alpha and beta are not published: the values are ours. beta = 0.5 switches the "
        "over-safety patch on.",
        "With beta = 0 that patch is not made at all, and Top_b is empty.",
        "Ascent stops when NLL has risen by `rise` nats per token, at the latest after `steps`; "
        "descent takes `steps`. AdamW without decay, gradient norms cut at 1.",
        "The top fractions are taken per matrix; equal scores are told apart by place.",
    ),
    cautions=(
        "Never measure on the texts given here: the plan refuses suites that share prompts with "
        "them.",
        "The over-safety patch is a jailbreak by construction: it stays in memory and is never "
        "kept.",
        "Its authors evaluated it on aligned models, not on drifted fine-tunes.",
    ),
    defects=(
        "Bernoulli masks without a seed.",
        "Absolute values taken after averaging over texts, where gradients cancel.",
        "Evaluation on the prompts of the harmful data.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class SafePatching(Method):
    """Merge a patch that enhances safety with one that takes over-safety off."""

    name: ClassVar[str] = "safe_patching"
    card: ClassVar[Card] = CARD
    needs = frozenset()
    data = frozenset({"harmful"})
    cost_class = "training"
    trains = True

    p: float = parameter(0.5, Real(0.0, 1.0), symbol="p", source="our decision (not published)")
    """Chance of an entry of a patch to be kept."""
    top_se: float = parameter(0.3, Real(0.0, 1.0), symbol="a", source="our decision")
    """Share of entries, by score, on which the safety patch may act."""
    top_osm: float = parameter(0.3, Real(0.0, 1.0), symbol="b", source="our decision")
    """The same of the over-safety patch."""
    alpha: float = parameter(1.0, Real(0.0), symbol="alpha", source="our decision")
    """Factor of the safety patch."""
    beta: float = parameter(0.0, Real(0.0), symbol="beta", source="our decision")
    """Factor of the over-safety patch; 0 skips its training."""
    lr: float = parameter(2e-5, Real(0.0), source="our decision")
    """Learning rate of both trainings."""
    steps: int = parameter(100, Integer(1), source="our decision")
    """Most steps of a training."""
    batch: int = parameter(8, Integer(1), source="our decision")
    """Texts per step."""
    rise: float = parameter(1.0, Real(0.0), source="our decision")
    """Ascent stops when NLL has risen by this much, in nats per token."""

    def check_settings(self) -> None:
        """Refuse settings under which nothing can change.

        Raises:
            UsageError: no patch has a factor, or no entry is kept.
        """
        reason = ""
        if self.alpha == 0.0 and self.beta == 0.0:
            reason = "alpha = beta = 0"
        elif self.p == 0.0:
            reason = "p = 0"
        elif self.top_se == 0.0 and (self.beta == 0.0 or self.top_osm == 0.0):
            reason = "top_se = 0"
        if reason:
            raise UsageError(
                f"safe_patching with {reason} keeps nothing of the patches",
                "give values above 0",
            )

    def prepare(self, workbench: Workbench) -> Statistics:
        """Make the patches in memory; what is kept on disk is the safety patch alone.

        With an over-safety patch nothing is kept on disk.
        """
        from realign.repair.methods.safe_patching_runs import make_patches

        if self.beta:
            made = make_patches(self, workbench)
        else:
            made = workbench.cached(
                "safe-patching",
                {"settings": self.settings()},
                lambda: make_patches(self, workbench),
            )
        tables, facts = tables_of(made)
        return Statistics(tables=tables, facts=facts)

    def training_bytes(self, size: ModelSize) -> int:
        """Model, gradients and moments in float32; the start, and a patch with its scores."""
        held = 4 * size.model + size.backward_bytes(size.batch("harmful", self.batch))
        return held + (20 if self.beta == 0.0 else 28) * size.edited

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return the merged patches of this matrix."""
        delta = statistics.tensor("delta", layer.key)
        if delta is None or not bool(delta.any()):
            return Unchanged("the patches keep nothing of this matrix")
        share = float(torch.count_nonzero(delta)) / delta.numel()
        return Dense(delta.to(layer.finetuned.device), facts={"kept_share": share})

    def merged(
        self,
        safety: Tensor,
        safety_scores: Tensor,
        *,
        over: Tensor | None = None,
        over_scores: Tensor | None = None,
    ) -> Tensor:
        """Return alpha d_SE + beta d_OSM of one matrix [d_out, d_in].

        Args:
            safety: P'_SE, thinned out.
            safety_scores: I_SE.
            over: P'_OSM; None with beta = 0.
            over_scores: I_OSM.
        """
        count = safety.numel()
        top = largest(safety_scores, count_down(self.top_se, count))
        if over is None or over_scores is None:
            return self.alpha * safety.where(top, 0.0)
        other = largest(over_scores, count_down(self.top_osm, count))
        enhanced = self.alpha * safety.where(top & ~other, 0.0)
        return enhanced + self.beta * over.where(other & ~top, 0.0)
