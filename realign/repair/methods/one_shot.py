"""Safety at One Shot: a few steps down the gradient of one refusal, on its leading directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from realign.repair.demands import ModelSize
from realign.repair.edit import Dense, Edit, Layer, Unchanged, from_factors
from realign.repair.kept_tensors import tables_of
from realign.repair.method import Card, Given, Method, Settled, with_settings
from realign.repair.parameters import Choice, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench

CARD = Card(
    title="Safety at One Shot",
    source="Zhang et al., arXiv 2601.01887 (ICLR 2026); formulas second-hand, choices ours",
    summary="a few steps along the top-k directions of one refusal's gradient",
    idea=(
        "One example of a refusal is enough to restore alignment, because the gradient of safety "
        "is low-rank: a few directions per matrix hold most of its energy. A step on these alone "
        "moves refusal and little else."
    ),
    equations=(
        "L = mean cross-entropy of the refusal's tokens, given one harmful prompt\n"
        "projected:  G = dL/dW = U S V^T ;  W <- W - eta sum_{i<=k} s_i u_i v_i^T\n"
        "            one eta for all matrices, halved from 1 until L falls;\n"
        "            up to `rounds` times, or until L <= `target_loss`\n"
        "sft:        AdamW on L, one step per epoch"
    ),
    inputs=(
        "the fine-tune alone, in memory in float32 with gradients; one example of a refusal: our "
        "own generic one, or the first row of --safe-data"
    ),
    touches="block_linear: the linear layers of the decoder blocks",
    edit_kind="low-rank (projected, rank <= rounds x k) or dense (sft)",
    cost="one forward and backward pass per round and one decomposition per matrix and round",
    deviations=(
        "eta is found by backtracking from 1: the paper's step size and its extra scale are "
        "unclear to us.",
        "A fixed example instead of the bi-level search among 256 candidates.",
        "k is cut at the numerical rank of the gradient, so that no direction of noise enters.",
        "sft trains the tensors of the scope only, with the gradient's norm cut at 1.",
    ),
    cautions=(
        "One example says what to refuse by its topic: measure over-refusal on look-alike prompts.",
        "An independent test found that the effect weakens as the share of poison grows.",
        "A vocabulary that lacks the words of the generic example needs one of its own "
        "(--safe-data).",
    ),
)


@dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """Steps along the leading directions of one refusal's gradient."""

    name: ClassVar[str] = "one_shot"
    card: ClassVar[Card] = CARD
    needs = frozenset()
    data: ClassVar[frozenset[Data]] = frozenset({"safe"})
    cost_class = "gradients"
    trains = True

    mode: str = parameter(
        "projected",
        Choice(("projected", "sft")),
        source="our decision; sft is the paper's plain form",
    )
    """`projected`: on the top-k directions; `sft`: plain AdamW."""
    k: int = parameter(20, Integer(1), symbol="k", source="Zhang et al.: 20 hold .86 to .95")
    """Directions per matrix and round, with `projected`."""
    rounds: int = parameter(10, Integer(0), source="our decision")
    """Most steps, with `projected`."""
    target_loss: float = parameter(0.1, Real(0.0), source="our decision")
    """Stop when the loss is no larger, in nats per token, with `projected`."""
    lr: float = parameter(2e-5, Real(0.0), source="Zhang et al. (second-hand)")
    """Learning rate, with `sft`."""
    epochs: int = parameter(10, Integer(0), source="Zhang et al. (second-hand)")
    """Steps, with `sft`."""
    example: str = parameter("auto", Choice(("auto", "generic", "safe")), source="our decision")
    """`generic`: our own sentence; `safe`: the first row of --safe-data, or of the anchors with the
    aligned model's refusals; `auto`: `safe` where --safe-data is given."""

    def required_data(self) -> frozenset[Data]:
        """Return "safe" where the example is taken from there."""
        safe: frozenset[Data] = frozenset({"safe"})
        return safe if self.example == "safe" else frozenset()

    def settled(self, given: Given) -> Settled:
        """Decide where the example comes from."""
        if self.example != "auto":
            return Settled(self, "")
        source = "safe" if "safe" in given.data else "generic"
        return Settled(with_settings(self, example=source), "")

    def prepare(self, workbench: Workbench) -> Statistics:
        """Train in memory and keep the change of every matrix."""
        from realign.repair.methods.one_shot_steps import train_on_refusal

        made = workbench.cached(
            "one-shot", {"settings": self.settings()}, lambda: train_on_refusal(self, workbench)
        )
        tables, facts = tables_of(made)
        return Statistics(tables=tables, facts=facts)

    def training_bytes(self, size: ModelSize) -> int:
        """Model, gradients or then a copy in float32; with `sft` two moments and the change."""
        positions = size.batch("safe", 1) if self.example == "safe" else 128
        held = 4 * size.model + size.backward_bytes(positions)
        return held + (4 if self.mode == "projected" else 20) * size.edited

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return the change that `prepare` found for this matrix."""
        found = [statistics.tensor(name, layer.key) for name in ("delta", "left", "right")]
        place = layer.finetuned.device
        delta, left, right = (None if each is None else each.to(place) for each in found)
        if delta is not None:
            return Dense(delta) if bool(delta.any()) else Unchanged("no step was taken")
        if left is None or right is None or not left.shape[1]:
            return Unchanged("no step was taken")
        return from_factors(left, right, {"rank": left.shape[1]})
