"""IRR: identify the entries that work against safety, remove them, recalibrate the rest.

arXiv 2412.11041. The sweep that recalibrates is in `realign.subspace.obs`. Suffixes: o is d_out,
i is d_in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.repair.demands import Measurement
from realign.repair.edit import Edit, Layer, Unchanged, VectorKind
from realign.repair.method import Card, CostClass, Given, Method
from realign.repair.methods.exact import rewritten
from realign.repair.methods.inputs import home_of, missing_inputs, second_moments
from realign.repair.parameters import Choice, Flag, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench
from realign.subspace.masks import count_down, lowest
from realign.subspace.obs import inverse_factor, sweep

CARD = Card(
    title="IRR: identify, remove, recalibrate",
    source="Wu et al., arXiv 2412.11041, ACL 2025 Findings",
    summary="take back the entries of the fine-tune that go against the safety vector, and let the "
    "others make up for them on the task",
    idea="Where the task vector and the safety vector have opposite signs, fine-tuning worked "
    "against alignment. These entries return to their aligned values, the more so the more the "
    "loss of a refusal depends on them. The entries behind them move so that the outputs on the "
    "task change as little as they can.",
    equations="""\
D = W_finetuned - W_aligned;  v = W_aligned - W_unaligned
F_ij = mean over refusals of (dL / dW_aligned,ij)^2
conflicts = { ij : D_ij v_ij < 0 };  R = conflicts without the floor(keep_fraction n) of lowest F
H = X X^T of the fine-tune's inputs on the task;  U^T U = (H + damp mean(diag H) I)^-1;  d_j = U_jj
column by column: q = 0 on R, else D;  err = (D - q) / d_j;
D_k <- D_k - err U_jk for all later columns k
W' = W_aligned + D'""",
    inputs="fine-tuned, aligned, unaligned (or base); task rows (--task-data) to recalibrate; safe "
    "dialogues, with refusals (--safe-data or the anchors), where keep_fraction is not 0",
    touches="of an adapter the q and v projections, else all linear layers in decoder blocks "
    "(`targets`)",
    edit_kind="dense: it decides entry by entry",
    cost="one forward pass of the fine-tune over the task rows, one backward pass of the aligned "
    "model for every refusal where keep_fraction is not 0; per matrix one Cholesky factor of "
    "[d_in, d_in] and a sweep, in float64, as for `safe_delta`",
    deviations=(
        "A conflict is D_ij v_ij < 0: where v is zero there is none, and the task delta stays. In "
        "the public code a zero conflicts with every sign.",
        "One mask per matrix, made from the original D. In the public code the signs are taken "
        "again from compensated values in every block of 128 columns.",
        "The Fisher information is the mean of squared gradients of single examples, not the "
        "square of a mean over a batch of eight.",
        "H comes from one pass of the fine-tune, not collected anew after every repaired layer.",
        "With keep_fraction = 0 all conflicts go, whatever their F: none is computed.",
        "safety_vector = base, which the paper does not have, is offered as well.",
    ),
    defects=(
        "A matrix that the unaligned model never touched keeps its task delta.",
        "The result does not depend on the width of a block.",
        "Gradients are squared before they are averaged.",
        "A failed Cholesky factorisation raises the damping, and in the end one clear error, not a "
        "debugger.",
        "The share that is kept is called keep_fraction; the public code calls it sparsity.",
    ),
    cautions=(
        "Half of two unrelated directions' signs conflict: with keep_fraction = 0 about half of "
        "the task vector goes, whether it hurts safety or not. Measure the task.",
        "Published for CATQA: safety 99.7 at GSM8K 42.91, against 41.93 of RESTA.",
        "Compensation serves the task, and may write into directions that safety uses.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Irr(Method):
    """Identify, remove, recalibrate."""

    name: ClassVar[str] = "irr"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "gradients"
    paper_vector: ClassVar[VectorKind | None] = "unaligned"
    data: ClassVar[frozenset[Data]] = frozenset({"safe", "task"})
    max_strength: ClassVar[float] = 1.0  # beyond, what was removed comes back with the other sign

    keep_fraction: float = parameter(0.0, Real(0.0, 1.0), source="public code, as `sparsity`")
    """Share of the conflicts, those of lowest F, that stay; 0 removes them all."""

    recalibrate: bool = parameter(True, Flag(), source="public code")
    """Let later entries make up for those that were removed."""

    nsamples: int = parameter(128, Integer(1), source="public parser; its page says 10")
    """How many task rows H is measured on, the first ones."""

    fisher_samples: int = parameter(1000, Integer(1), source="public code")
    """How many refusals F is measured on at most, the first ones."""

    block: int = parameter(128, Integer(1), source="public code")
    """Columns between two updates of the rest; the result does not depend on it."""

    damp: float = parameter(0.01, Real(0.0), source="public code")
    """Damping of H, as a multiple of its mean diagonal."""

    targets: str = parameter("auto", Choice(("auto", "qv", "all")), source="public code")
    """What is edited: the q and v projections (`qv`), or `all`; `auto`: qv for an adapter."""

    safety_vector: str = parameter(
        "auto",
        Choice(("auto", "unaligned", "base")),
        symbol="v",
        source="the paper takes `unaligned`",
    )
    """Aligned minus unaligned or aligned minus base; `auto` takes the paper's if it was given."""

    def required_data(self) -> frozenset[Data]:
        """Only what decides something with these settings."""
        wanted: set[Data] = set()
        if 0.0 < self.keep_fraction < 1.0:
            wanted.add("safe")
        if self.recalibrate:
            wanted.add("task")
        return frozenset(wanted)

    def prepares(self) -> bool:
        """Whether any statistic decides something."""
        return bool(self.required_data())

    def target_modules(self, given: Given) -> frozenset[str] | None:
        """The q and v projections of an adapter."""
        few = given.adapter if self.targets == "auto" else self.targets == "qv"
        return frozenset({"q_proj", "v_proj"}) if few else None

    def prepare(self, workbench: Workbench) -> Statistics:
        """Collect the fine-tune's input moments on the task, and the aligned model's Fisher."""
        wanted, statistics = self.required_data(), Statistics()
        if "task" in wanted:
            statistics = workbench.input_moments(
                role="finetuned", data="task", tokens="all", limit=self.nsamples
            )
        if "safe" in wanted:
            fisher = workbench.gradients(
                role="aligned", data="safe", kind="fisher", limit=self.fisher_samples
            )
            statistics = replace(statistics, tables={**statistics.tables, "fisher": fisher})
        return statistics

    def check_settings(self) -> None:
        """Refuse to keep every conflict."""
        if self.keep_fraction == 1.0:
            raise UsageError(
                "keep_fraction = 1 keeps every conflict: irr would change nothing",
                "give a number in [0, 1), 0 removes them all",
            )

    def measures(self) -> tuple[Measurement, ...]:
        """Return what `prepare` measures with these settings."""
        found = {
            "task": Measurement("finetuned", "inputs"),
            "safe": Measurement("aligned", "gradients"),
        }
        return tuple(found[data] for data in sorted(self.required_data()) if data in found)

    def edit_bytes(self, d_out: int, d_in: int) -> int | None:
        """H as it is read, factored and turned round, beside D; or F in order."""
        return max(24 * d_in**2 + 10 * d_out * d_in, 36 * d_out * d_in)

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = Wa + D' - Wf [d_out, d_in]."""
        kind = self.vector_kind
        assert kind is not None
        aligned = layer.require("aligned")
        home = home_of(layer.finetuned)
        task_oi = layer.finetuned.to(home, torch.float64, copy=True)
        task_oi.sub_(aligned.to(home))
        if not bool(task_oi.any()):
            return Unchanged("task vector is zero")
        safety_oi = layer.safety_vector(kind).to(home)
        if not bool(safety_oi.any()):
            return Unchanged("safety vector is zero")
        conflicts_oi = (task_oi > 0) & (safety_oi < 0) | (task_oi < 0) & (safety_oi > 0)
        del safety_oi
        found = int(conflicts_oi.sum())
        if not found:
            return Unchanged("the fine-tune goes against the safety vector nowhere")
        removed_oi = self._removed(conflicts_oi, found, layer, statistics)
        if isinstance(removed_oi, Unchanged):
            return removed_oi
        facts: dict[str, float | int | str | None] = {
            "conflict_share": found / task_oi.numel(),
            "removed_share": int(removed_oi.sum()) / task_oi.numel(),
        }
        if self.recalibrate:
            moments = statistics.moments(layer.key)
            reason = missing_inputs(moments)
            if moments is None or reason:
                return Unchanged(reason)
            facts["tokens"] = moments.n
            scatter_ii = second_moments(moments, layer)
            factor = inverse_factor(scatter_ii, damp=self.damp, overwrite=statistics.disposable)
            del moments, scatter_ii
            facts["damping"] = factor.damping
            nothing = torch.zeros((), dtype=torch.float64, device=home)
            sweep(
                task_oi,
                factor.u_ii,
                choose=lambda columns, present: (
                    removed_oi[:, columns],
                    nothing.expand_as(present),
                ),
                block=self.block,
            )
        else:
            task_oi[removed_oi] = 0.0
        weight_oi = task_oi.add_(aligned.to(home))
        return rewritten(weight_oi, layer.finetuned, facts=facts)

    def _removed(
        self, conflicts_oi: Tensor, found: int, layer: Layer, statistics: Statistics
    ) -> Tensor | Unchanged:
        """Return R [d_out, d_in]: the conflicts but those of lowest F."""
        kept = count_down(self.keep_fraction, found)
        if kept == 0:
            return conflicts_oi
        if kept == found:
            return Unchanged("keep_fraction keeps every conflict")
        fisher = statistics.tensor("fisher", layer.key)
        if fisher is None:
            return Unchanged("no gradients of refusals")
        fisher_oi = fisher.to(conflicts_oi.device)
        return conflicts_oi & ~lowest(fisher_oi, kept, among_oi=conflicts_oi)
