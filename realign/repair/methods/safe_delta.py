"""Safe Delta: keep as much of the task vector as a safety budget affords, and make up for it.

arXiv 2505.12038. Every entry of the fine-tune has a price, its effect on the aligned model's
outputs on safe dialogues; entries outside the budget go back, and counteract those that stay.
The sweep is in `realign.subspace.obs`. Suffixes: o is d_out, i is d_in, b the columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.repair.demands import Measurement
from realign.repair.edit import Edit, Layer, Unchanged
from realign.repair.method import Card, CostClass, Method
from realign.repair.methods.exact import rewritten
from realign.repair.methods.inputs import missing_inputs, second_moments
from realign.repair.parameters import Choice, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench
from realign.subspace.masks import count_down, prefix_within
from realign.subspace.obs import inverse_factor, sweep

KEPT_ALL = "the whole task vector is within the budget"
SCALES = "; budget=relative scales with the size of the fine-tune"

UNIT = 4096
"""The width at which the published s is stated."""

CARD = Card(
    title="Safe Delta: the task vector within a safety budget",
    source="Lu et al., arXiv 2505.12038, ICML 2025",
    summary="keep the fine-tune's entries that safe dialogues notice least, let the others "
    "counteract them",
    idea="What an entry of the task vector does to the aligned model's outputs on safe dialogues "
    "is its price. Entries are kept in the order of their gain per price until a budget is spent; "
    "the others return to the aligned values, and then move a little so that the outputs on safe "
    "dialogues change as little as they can.",
    equations="""\
dw = W_finetuned - W_aligned;  H = X X^T of the aligned model on safe dialogues
U^T U = (H + damp mean(diag H) I)^-1;  d_j = U_jj;  cost_j = 1 / d_j^2
per block of b columns, W being the present, compensated values:
  loss_ij = (W_finetuned - W)_ij^2 cost_j;  eps = s (b / 4096) (d_out / 4096) mean_j cost_j
  order by cost_j, then column, then row; the last floor(drop_fraction count) are rejected;
  M = longest prefix whose summed loss is at most eps
  column by column: q = W_finetuned where M, else W;  err = (W - q) / d_j;
  W_k <- W_k - err U_jk for all later columns k
W' = the q's: rejected entries hold W_aligned plus compensation""",
    inputs="fine-tuned, aligned; safe dialogues, that is prompts with refusals (--safe-data, or "
    "the anchors with the aligned model's own refusals)",
    touches="weights of linear layers in decoder blocks",
    edit_kind="dense: it decides entry by entry",
    cost="one forward pass of the aligned model over the dialogues; per matrix one Cholesky factor "
    "of [d_in, d_in] and a sweep of about d_out d_in^2 multiplications, in float64; up to "
    "24 d_in^2 bytes while the moments are read and the factor is made in their place (4.9 GB for "
    "d_in = 14336)",
    deviations=(
        "The budget of a block is proportional to its width, also of a narrow last one; the public "
        "code halves s for every block.",
        "sub_block = 1 compensates exactly; the public code takes groups of four columns that do "
        "not compensate each other (sub_block = 4).",
        "Order and ties are fixed by cost, column and row: the result does not depend on the "
        "machine.",
        "budget = relative, ours, takes s as a share of the block's whole loss: it carries over "
        "between adapters and full fine-tunes.",
        "An input that is never active gets H_jj = 1, as published, in the scale of the plain sum "
        "over tokens.",
        "A matrix that no token reached (a cold expert) is left alone.",
        "All in float64, with one rounding to the fine-tune's own dtype.",
    ),
    defects=(
        "A tiny block rejects floor(drop_fraction count) entries, possibly none; the public code's "
        "slice by -int(0.15 n) = 0 then empties the list of candidates.",
        "A narrow last block does not get a full share of the budget.",
        "The rejected entries are the costliest; a port keeps them unconditionally instead, and "
        "spends one budget for the whole model.",
        "Any architecture and chat template, not Llama-2 with a hard-coded one; the output keeps "
        "its dtype instead of being forced to float16.",
        "The options are those named here; the public page names a script and a flag that do not "
        "exist.",
    ),
    cautions=(
        "With flat costs the absolute budget allows a root mean square of 7.7e-5 per entry at "
        "s = 0.1, 1.5e-4 at 0.4, whatever the fine-tune: adapters are kept almost whole, full "
        "fine-tunes are not. The report shows the share that was kept; above 95 % take "
        "budget=relative.",
        "The published 5.45 % attack success against 5.15 % of the aligned model is one model, one "
        "keyword judge, one harmful data set.",
        "Greedy, column after column: compensation lowers the loss on average, not in every case.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class SafeDelta(Method):
    """The task vector within a safety budget."""

    name: ClassVar[str] = "safe_delta"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "forward"
    data: ClassVar[frozenset[Data]] = frozenset({"safe"})
    max_strength: ClassVar[float] = 1.0  # beyond, what was rejected is pushed past its answer

    s: float = parameter(
        0.1, Real(0.0), symbol="s", source="public scripts take 0.1 to 0.11; a share if relative"
    )
    """The budget: more keeps more of the fine-tune. 0 gives the aligned weights."""

    budget: str = parameter(
        "absolute",
        Choice(("absolute", "relative")),
        symbol="eps",
        source="the public code's; `relative` is ours",
    )
    """`absolute` as published, or `relative`: s in [0, 1] is a share of each block's whole loss."""

    drop_fraction: float = parameter(0.15, Real(0.0, 1.0), source="public code")
    """Share of the entries of a block, the costliest, that are rejected whatever the budget."""

    block: int = parameter(2048, Integer(1), symbol="b", source="public code")
    """Columns that share one budget."""

    sub_block: int = parameter(1, Integer(1), source="1 is exact; the public code takes 4")
    """Groups of so many columns do not compensate each other."""

    damp: float = parameter(0.01, Real(0.0), source="public code")
    """Damping of H, as a multiple of its mean diagonal."""

    samples: int = parameter(128, Integer(1), source="paper")
    """How many safe dialogues are used, the first ones."""

    length: int = parameter(512, Integer(1), source="public code")
    """Tokens of a dialogue, prompt and refusal together; what lies behind them is cut off."""

    def validate(self) -> None:
        """Check every hyper-parameter, and that a relative budget is a share."""
        super().validate()
        if self.budget == "relative" and self.s > 1.0:
            raise UsageError(
                f"s = {self.s:g} is out of range for safe_delta with budget = relative",
                "s must be a number in [0, 1]: a share of the whole loss",
            )

    def check_settings(self) -> None:
        """Refuse to keep everything, and to keep nothing: no method is needed for either."""
        if self.s == 0.0:
            raise UsageError(
                "s = 0 keeps nothing of the task vector: the result would be the aligned model",
                f"give a number above 0{' and at most 1' if self.budget == 'relative' else ''} "
                "(default 0.1)",
            )
        if self.drop_fraction == 1.0:
            raise UsageError(
                "drop_fraction = 1 rejects every entry: the result would be the aligned model",
                "give a number in [0, 1) (default 0.15)",
            )
        if self.budget == "relative" and self.s == 1.0 and self.drop_fraction == 0.0:
            raise UsageError(
                "s = 1 of a relative budget with drop_fraction = 0 keeps the whole task vector: "
                "safe_delta would change nothing",
                "give s below 1, or a drop_fraction above 0",
            )

    def prepare(self, workbench: Workbench) -> Statistics:
        """Collect the input moments of the unmodified aligned model, all tokens."""
        return workbench.input_moments(
            role="aligned",
            data="safe",
            tokens="all",
            limit=self.samples,
            length=self.length,
        )

    def measures(self) -> tuple[Measurement, ...]:
        """Return what `prepare` measures."""
        return (Measurement("aligned", "inputs"),)

    def edit_bytes(self, d_out: int, d_in: int) -> int | None:
        """H as it is read, factored and turned round; or U, W and what a block is chosen from."""
        block = d_out * min(self.block, d_in)
        return max(24 * d_in**2, 8 * d_in**2 + 8 * d_out * d_in + 20 * block)

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = W' - Wf [d_out, d_in]."""
        if not bool((layer.finetuned != layer.require("aligned")).any()):
            return Unchanged("task vector is zero")
        moments = statistics.moments(layer.key)
        reason = missing_inputs(moments)
        if moments is None or reason:
            return Unchanged(reason)
        tokens = moments.n
        scatter_ii = second_moments(moments, layer)
        factor = inverse_factor(scatter_ii, damp=self.damp, overwrite=statistics.disposable)
        del moments, scatter_ii
        cost_i = factor.costs()
        finetuned = layer.finetuned.to(cost_i.device)
        d_out, d_in = finetuned.shape
        kept_entries = 0

        def choose(columns: slice, present_ob: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal kept_entries
            goal_ob, cost_b = finetuned[:, columns].to(torch.float64), cost_i[columns]
            kept_ob = self._affordable((goal_ob - present_ob).square_().mul_(cost_b), cost_b)
            kept_entries += int(kept_ob.sum())
            return kept_ob, goal_ob

        weight_oi = layer.require("aligned").to(cost_i.device, torch.float64, copy=True)
        sweep(weight_oi, factor.u_ii, choose=choose, block=self.block, group=self.sub_block)
        if kept_entries == d_out * d_in:
            return Unchanged(KEPT_ALL + (SCALES if self.budget == "absolute" else ""))
        facts = {
            "kept_share": kept_entries / (d_out * d_in),
            "budget": self.budget,
            "tokens": tokens,
            "damping": factor.damping,
        }
        return rewritten(weight_oi, layer.finetuned, facts=facts)

    def _affordable(self, loss_ob: Tensor, cost_b: Tensor) -> Tensor:
        """Return M of one block [d_out, b]."""
        rows, width = loss_ob.shape
        eps = self.s
        if self.budget == "absolute":
            eps *= (width / UNIT) * (rows / UNIT) * float(cost_b.mean())
        rejected = count_down(self.drop_fraction, loss_ob.numel())
        return prefix_within(
            loss_ob,
            cost_b,
            budget=eps,
            relative=self.budget == "relative",
            most=loss_ob.numel() - rejected,
        )
