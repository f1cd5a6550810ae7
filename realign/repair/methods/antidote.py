"""Antidote: zero the entries that harmful data use most (arXiv 2408.09600).

Scores are those of Wanda: |W_ij| times the norm of input feature j. Of an adapter the two factors
are pruned, each with its own inputs. Suffixes: o is d_out, i is d_in, r the rank of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.repair.demands import Measurement
from realign.repair.edit import Edit, Layer, LoraFactors, Unchanged, from_factors
from realign.repair.method import Card, CostClass, Given, Method, Role, Settled, with_settings
from realign.repair.methods.exact import rewritten
from realign.repair.methods.inputs import (
    feature_norms,
    home_of,
    missing_inputs,
    second_moments,
    used_most,
)
from realign.repair.parameters import Choice, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench

CARD = Card(
    title="Antidote: pruning what harmful data use",
    source="Huang et al., arXiv 2408.09600, ICML 2025",
    summary="zero the entries of every output row that harmful samples use most; needs no other "
    "model",
    idea="Whatever the fine-tune learned of harm shows in the entries that its harmful answers run "
    "through. The largest contributions of every row, by weight times the norm of the input "
    "feature on harmful data, are set to zero, after training and whatever its "
    "hyper-parameters were.",
    equations="""\
h_ij = |W_ij| norm(x_j), x the inputs of W = W_finetuned on harmful samples
m = the k = ceil(alpha row length) largest of every row, equal ones by the smaller index
W' = W_finetuned (.) (1 - m)                                        (prune_to = zero)
W' = W_finetuned (.) (1 - m) + W_aligned (.) m                      (prune_to = aligned)
of an adapter: A and B are pruned, A by its inputs x, B by its inputs A x; E = s (B' A' - B A)""",
    inputs="fine-tuned; harmful prompts with compliant answers (--harmful-data); aligned for "
    "prune_to = aligned only",
    touches="of an adapter its factors A and B; of full weights the q, k and v projections "
    "(`targets`)",
    edit_kind="dense; low-rank for an adapter, of twice its rank",
    cost="one forward pass of the fine-tune over the harmful samples; of the moments only the "
    "diagonal is needed, for an adapter all of them (up to 24 d_in^2 bytes)",
    deviations=(
        "k is rounded up, which is the public code's floor of the complement.",
        "alpha = 0.05 is the middle of what public scripts use: 0.1 for SST2, 0.01 to 0.05 for "
        "GSM8K.",
        "prune_to = aligned, ours, puts the aligned weight back instead of zero: zeroing also "
        "removes what the aligned model knew.",
        "Equal scores go to the smaller column.",
    ),
    defects=(
        "The highest scores are pruned, not the lowest, as the remark in a library has it.",
        "A row of B has only r entries: where rounding up prunes more than twice the share that "
        "was asked for, the report says so; the public code is silent.",
        "Zeroing entries of A and B is not zeroing entries of their product: the report gives the "
        "edit of the product.",
    ),
    cautions=(
        "Published: 11.56 points less harm on average for 1.45 points of accuracy; on GSM8K with "
        "20 % poison alpha = 0.01 / 0.05 / 0.1 gives harm 71.8 / 65.3 / 60.9 at accuracy 23.2 / "
        "16.1 / 10.0; an independent test has harm 11.5 to 1.5, accuracy 92.4 to 84.9.",
        "Whatever harmless text needs the same entries loses them as well. Measure the task, and "
        "whether the text still reads.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Antidote(Method):
    """Pruning what harmful data use."""

    name: ClassVar[str] = "antidote"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "forward"
    needs: ClassVar[frozenset[Role]] = frozenset()
    data: ClassVar[frozenset[Data]] = frozenset({"harmful"})
    max_strength: ClassVar[float] = 1.0  # beyond, pruned entries get the other sign

    alpha: float = parameter(
        0.05, Real(0.0, 1.0), symbol="alpha", source="the middle of the public scripts' values"
    )
    """Share of every row that is pruned, rounded up."""

    space: str = parameter("auto", Choice(("auto", "adapter", "merged")), source="public code")
    """Prune the factors of an adapter, or whole weights; `auto`: by what the fine-tune is."""

    prune_to: str = parameter("zero", Choice(("zero", "aligned")), source="`aligned` is ours")
    """What pruned entries become; `aligned` for whole weights only."""

    targets: str = parameter("auto", Choice(("auto", "qkv", "all")), source="public code")
    """What is pruned of whole weights: q, k and v (`qkv`, and `auto`), or `all` projections."""

    samples: int = parameter(2000, Integer(1), source="paper")
    """How many harmful samples are used at most, the first ones."""

    def validate(self) -> None:
        """Check every hyper-parameter, and that the two modes go together."""
        super().validate()
        if self.space == "adapter" and self.prune_to == "aligned":
            raise UsageError(
                "antidote prunes an adapter to zero only: its aligned counterpart is no entry of A "
                "or B",
                "use --set space=merged with prune_to = aligned",
            )

    def check_settings(self) -> None:
        """Refuse to prune nothing, or everything."""
        if self.alpha == 0.0:
            raise UsageError(
                "alpha = 0 prunes nothing: antidote would change nothing",
                "give a number in (0, 1) (default 0.05)",
            )
        if self.alpha == 1.0 and self.prune_to == "zero":
            raise UsageError(
                "alpha = 1 prunes every entry: nothing of the matrices would be left",
                "give a number in (0, 1) (default 0.05), or prune_to = aligned",
            )

    def settled(self, given: Given) -> Settled:
        """Decide the space by what the fine-tune is."""
        if self.space == "adapter" and not given.adapter:
            raise UsageError(
                "antidote with space = adapter needs a LoRA adapter, the fine-tune has full "
                "weights",
                "use --set space=merged, or give the adapter itself",
            )
        if self.space != "auto":
            return Settled(self, "")
        in_factors = given.adapter and self.prune_to == "zero"
        method = with_settings(self, space="adapter" if in_factors else "merged")
        note = ""
        if given.adapter and not in_factors:
            note = "antidote prunes whole weights, space = merged: prune_to = aligned needs them"
        return Settled(method, note)

    def required_roles(self) -> frozenset[Role]:
        """The aligned model only where its entries are put back."""
        return frozenset({"aligned"} if self.prune_to == "aligned" else ())

    def target_modules(self, given: Given) -> frozenset[str] | None:
        """Of whole weights the query, key and value projections."""
        if self.targets == "all" or (self.targets == "auto" and self.space == "adapter"):
            return None
        return frozenset({"q_proj", "k_proj", "v_proj"})

    def prepare(self, workbench: Workbench) -> Statistics:
        """Collect the fine-tune's input moments on harmful samples, all tokens."""
        return workbench.input_moments(
            role="finetuned",
            data="harmful",
            tokens="all",
            diagonal=self.space != "adapter",
            limit=self.samples,
        )

    def measures(self) -> tuple[Measurement, ...]:
        """Return what `prepare` measures."""
        return (Measurement("finetuned", "inputs" if self.space == "adapter" else "diagonal"),)

    def edit_bytes(self, d_out: int, d_in: int) -> int | None:
        """Scores and their order; of an adapter, all moments of its inputs."""
        return 24 * d_in**2 if self.space == "adapter" else 34 * d_out * d_in

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = W' - Wf [d_out, d_in]."""
        if self.alpha == 0.0:
            return Unchanged("alpha is 0")
        moments = statistics.moments(layer.key)
        reason = missing_inputs(moments)
        if moments is None or reason:
            return Unchanged(reason)
        s2 = second_moments(moments, layer)
        facts: dict[str, float | int | str | None] = {"tokens": moments.n}
        if self.space == "adapter":
            if layer.lora is None:
                return Unchanged("the adapter has no factors here")
            return self._edit_factors(layer.lora, s2, facts)
        marked_oi, count = used_most(layer.finetuned, feature_norms(s2), self.alpha)
        facts["pruned_share"] = count / layer.finetuned.shape[1]
        weight_oi = layer.finetuned.to(marked_oi.device, copy=True)
        if self.prune_to == "zero":
            weight_oi[marked_oi] = 0.0
        else:
            back = layer.require("aligned").to(weight_oi)
            weight_oi = torch.where(marked_oi, back, weight_oi)
        return rewritten(weight_oi, layer.finetuned, facts=facts)

    def _edit_factors(
        self, lora: LoraFactors, s2_ii: Tensor, facts: dict[str, float | int | str | None]
    ) -> Edit:
        """Return s (B' A' - B A) as factors of rank 2 r."""
        assert s2_ii.dim() == 2, "B is fed by A x: the diagonal of x's moments does not say how"
        home = home_of(s2_ii)
        down_ri, up_or = (each.to(home, torch.float64) for each in (lora.down, lora.up))
        between_r = ((down_ri @ s2_ii) * down_ri).sum(1)
        marked_ri, in_down = used_most(down_ri, feature_norms(s2_ii), self.alpha)
        marked_or, in_up = used_most(up_or, feature_norms(between_r), self.alpha)
        shares = {"A": in_down / down_ri.shape[1], "B": in_up / up_or.shape[1]}
        facts["pruned_share_a"], facts["pruned_share_b"] = shares["A"], shares["B"]
        excess = [name for name, share in shares.items() if share > 2.0 * self.alpha]
        if excess:
            facts["pruned_more"] = ", ".join(excess)
        new_ri = down_ri.masked_fill(marked_ri, 0.0)
        new_or = up_or.masked_fill(marked_or, 0.0)
        if torch.equal(new_ri, down_ri) and torch.equal(new_or, up_or):
            return Unchanged("the marked entries are zero already")
        left_or = torch.cat([lora.scale * new_or, -lora.scale * up_or], dim=1)
        right_ri = torch.cat([new_ri, down_ri], dim=0)
        kept = torch.float64 if lora.down.dtype == torch.float64 else torch.float32
        return from_factors(left_or.to(kept), right_ri.to(kept), facts)
