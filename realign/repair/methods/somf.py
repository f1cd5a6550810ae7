"""SOMF: subspace-oriented model fusion; a mask on the task vectors, trained to keep safety."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from realign.errors import UsageError
from realign.repair.demands import ModelSize
from realign.repair.edit import Dense, Edit, Layer, LoraFactors, Unchanged, from_factors
from realign.repair.kept_tensors import tables_of
from realign.repair.method import Card, Given, Method, Settled, with_settings
from realign.repair.parameters import Choice, Either, Flag, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench
from realign.subspace.concrete import concrete, factor, hard
from realign.subspace.dare import kept_entries, rescale_kept
from realign.subspace.keyed import uniforms
from realign.subspace.merging import average, task_arithmetic, ties
from realign.subspace.vectors import difference

MICRO_TOKENS = 4096
"""Padded positions that are run at once while the mask is trained."""

AUTO = Choice(("auto",))

CARD = Card(
    title="SOMF: subspace-oriented model fusion",
    source="Yi et al., arXiv 2405.09055 (Knowledge-Based Systems)",
    summary="a trained mask keeps the part of the task vectors that does not hurt safety",
    idea=(
        "The task vectors of one or several fine-tunes are laid over the safe model under a mask "
        "shared by all of them. The mask is trained, the weights are not: where keeping the task "
        "vector costs safety, the mask goes to 0 and the weight returns to the aligned one."
    ),
    equations=(
        "delta_i = W_i - W_a\n"
        "m = sigmoid((log(u / (1 - u)) + x) / tau),  u ~ U(0, 1);  one logit x per weight or row\n"
        "delta~_i = (m (.) delta_i) / mean(m)\n"
        "W' = W_a + Merge(delta~_1, ..., delta~_T)\n"
        "min over x of L(W'(x))\n"
        "  dpo:      -log sigmoid(beta [(log pi(y+) - log pi_ref(y+)) - (log pi(y-) - log "
        "pi_ref(y-))])\n"
        "  refusal:  cross-entropy of refusals + kl * KL(pi_ref || pi) on benign prompts\n"
        "after training  m = 1[sigmoid(x) >= threshold]"
    ),
    inputs=(
        "the aligned model; --pairs (loss dpo), or --safe-data, else the anchors, with --keep-data "
        "(loss refusal); further fine-tunes with --also"
    ),
    touches="block_linear: the linear layers of the decoder blocks",
    edit_kind="dense (merged space) or low-rank (adapter space, with new factors)",
    cost=(
        "one training run on mask logits, with the model in float32: 12 bytes per masked weight "
        "and 16 more per logit; one logit per output neuron, or per weight with "
        "granularity=element"
    ),
    deviations=(
        "The mask of the result is deterministic: sigmoid(x) at least 0.5. `sample` draws it, to "
        "study what was published.",
        "The reference policy is the plain fusion, the fine-tune itself where there is one.",
        "The refusal loss is ours, for users who have no preference pairs.",
        "The logits with the best loss on a tenth of the texts, under the deterministic mask, are "
        "kept; they are measured at the start and after every pass.",
        "One logit per output neuron by default for merged weights.",
        "Adapters: up and down factors are masked separately, relative to no adapter at all; "
        "further fine-tunes need space=merged.",
    ),
    cautions=(
        "A mask that reverts much takes the task with it: see the kept share of each matrix.",
        "merge_lambda = 0.04, published for the sum of fully fine-tuned models, leaves little of "
        "each task.",
        "A third-party method of this name that keeps the largest tenth of W_f - W_base is another "
        "one.",
    ),
    defects=(
        "Inference drew the mask again, and the binary model was a threshold on one random draw: "
        "what was shipped depended on the generator.",
        "The reference of DPO was a second masked model with fresh random masks.",
        "The path for full models kept task vectors in half precision.",
        "DARE rescaled even a single model.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Somf(Method):
    """A trained mask over the task vectors."""

    name: ClassVar[str] = "somf"
    card: ClassVar[Card] = CARD
    data: ClassVar[frozenset[Data]] = frozenset({"safe", "keep", "pairs"})
    cost_class = "training"
    trains = True
    fuses = True

    loss: str = parameter("auto", Choice(("auto", "dpo", "refusal")), source="Yi et al.; ours")
    """`dpo` on --pairs, `refusal` on refusals and benign prompts; `auto`: `dpo` where there are
    pairs."""
    tau: float = parameter(0.5, Real(1e-3, 100.0), symbol="tau", source="authors' code")
    """Temperature of the mask while it is trained."""
    lr: float | str = parameter("auto", Either((Real(0.0), AUTO)), source="authors' code")
    """Learning rate of the logits; `auto`: 1e-3 for one adapter, 5e-3 for one full model, 1e-2 for
    several models."""
    batch: int = parameter(16, Integer(1), source="authors' code")
    """Examples per step."""
    epochs: int = parameter(3, Integer(0), source="the framework's default (second-hand)")
    """Passes over the texts."""
    beta: float = parameter(0.1, Real(0.0), symbol="beta", source="authors' code")
    """Of the loss `dpo`."""
    kl: float = parameter(0.1, Real(0.0), source="our decision")
    """Weight of the divergence on benign prompts, of the loss `refusal`; 0 needs no keep data."""
    mode: str = parameter("hard", Choice(("hard", "soft", "sample")), source="our decision")
    """The mask of the result: `hard` 0 or 1, `soft` sigmoid(x), `sample` one seeded draw."""
    threshold: float = parameter(0.5, Real(0.0, 1.0), source="our decision")
    """Of sigmoid(x), with `hard`; between 0 and 1."""
    rescale: bool = parameter(True, Flag(), source="authors' code")
    """Divide the mask by its mean over the matrix."""
    space: str = parameter("auto", Choice(("auto", "merged", "adapter")), source="our decision")
    """What is masked: the task vector, or the factors of an adapter; `auto`: these where there
    are any."""
    granularity: str = parameter("auto", Choice(("auto", "row", "element")), source="our decision")
    """One logit per output neuron or per weight; `auto`: `row` in merged space, else `element`."""
    merge: str = parameter(
        "task_arithmetic",
        Choice(("task_arithmetic", "average", "dare", "ties")),
        source="authors' code",
    )
    """How several task vectors become one; a single one stays as it is."""
    merge_lambda: float | str = parameter(
        "auto", Either((Real(0.0), AUTO)), symbol="lambda", source="authors' code"
    )
    """Factor of the merged vector, not used by `average`; `auto`: ties 0.4, task arithmetic of full
    models 0.04, else 0.3."""
    dare_drop: float = parameter(0.2, Real(0.0, 0.99), source="authors' code")
    """Share of entries that `dare` drops."""
    ties_keep: float = parameter(0.2, Real(1e-6, 1.0), source="authors' code")
    """Share of entries of each vector that `ties` keeps."""

    def check_settings(self) -> None:
        """Refuse a threshold that keeps everything or nothing.

        Raises:
            UsageError: it is 0 or 1.
        """
        if not 0.0 < self.threshold < 1.0:
            kept = "everything" if self.threshold == 0.0 else "nothing"
            raise UsageError(
                f"somf with threshold = {self.threshold:g} keeps {kept} whatever is trained",
                "give a number between 0 and 1 (default 0.5)",
            )

    def required_data(self) -> frozenset[Data]:
        """Return the texts of the loss in use."""
        if self.loss == "dpo":
            return frozenset({"pairs"})
        texts: frozenset[Data] = frozenset({"safe", "keep"}) if self.kl else frozenset({"safe"})
        return texts

    def settled(self, given: Given) -> Settled:
        """Decide loss, space, granularity, rate and factor by what was given.

        Raises:
            UsageError: adapter space without an adapter, or with further fine-tunes.
        """
        several = any(role.startswith("also") for role in given.roles)
        space = self.space
        if space == "auto":
            space = "adapter" if given.adapter and not several else "merged"
        if space == "adapter" and (several or not given.adapter):
            raise UsageError(
                "somf with space = adapter needs one fine-tune that is a LoRA adapter on the "
                "aligned model",
                "use --set space=merged",
            )
        loss = self.loss
        if loss == "auto":
            loss = "dpo" if "pairs" in given.data else "refusal"
        granularity = self.granularity
        if granularity == "auto":
            granularity = "row" if space == "merged" else "element"
        rate = self.lr
        if rate == "auto":
            rate = 1e-2 if several else 1e-3 if given.adapter else 5e-3
        scale = self.merge_lambda
        if scale == "auto":
            full = self.merge == "task_arithmetic" and not given.adapter
            scale = 0.4 if self.merge == "ties" else 0.04 if full else 0.3
        method = with_settings(
            self, loss=loss, space=space, granularity=granularity, lr=rate, merge_lambda=scale
        )
        return Settled(method, "")

    def prepare(self, workbench: Workbench) -> Statistics:
        """Train the logits, or take them from the cache."""
        from realign.repair.methods.somf_training import train_logits

        made = workbench.cached(
            "somf", {"settings": self.settings()}, lambda: train_logits(self, workbench)
        )
        tables, facts = tables_of(made)
        return Statistics(tables=tables, facts=facts)

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return W_a + Merge((m / mean(m)) (.) delta_i) - W_f."""
        if self.space == "adapter":
            return self._edit_factors(layer, statistics)
        x = statistics.tensor("logits", layer.key)
        vectors = task_vectors(layer)
        if x is None or not any(bool(vector.any()) for vector in vectors):
            return Unchanged("task vector is zero")
        x = x.to(vectors[0].device)
        mask = self.mask(x, layer, role="mask")
        facts = {"kept_share": float(mask.mean())}
        scale = factor(mask, rescale=self.rescale).to(vectors[0].dtype)
        if len(vectors) == 1:
            edit = (scale - 1.0) * vectors[0]
        else:
            thresholds = statistics.tensor("ties", "thresholds")
            masked = [scale * vector for vector in vectors]
            merged = self.merged(
                masked, layer, thresholds=None if thresholds is None else thresholds.tolist()
            )
            edit = merged - vectors[0]
        if not bool(edit.any()):
            return Unchanged("the mask keeps all of the task vector")
        # Wf - (Wf - Wa) is not Wa in every entry once it is rounded.
        reverted = None if bool(scale.any()) else layer.require("aligned")
        target = None if reverted is None else reverted.to(layer.finetuned)
        return Dense(edit, target=target, facts=facts)

    def training_bytes(self, size: ModelSize) -> int:
        """Model, task vector, masked weights and their gradients; logits with their moments."""
        kind, pair = ("pairs", 2) if self.loss == "dpo" else ("safe", 1)
        longest = pair * max(size.text(kind).longest, size.text("keep").longest)
        positions = min(self.batch * longest, max(MICRO_TOKENS, longest))
        held = 4 * size.model + 12 * size.edited + size.backward_bytes(positions)
        if self.space == "adapter":  # the factors are small beside the product
            return held
        if self.granularity == "row":
            return held + 16 * size.rows
        return held + 28 * size.edited

    def mask(self, x: Tensor, layer: Layer, *, role: str) -> Tensor:
        """Return the mask of the result from logits [d_out, d_in] or [d_out, 1]."""
        if self.mode == "soft":
            return torch.sigmoid(x)
        if self.mode == "sample":
            drawn = uniforms(x.numel(), seed=layer.seed, method=self.name, key=layer.key, role=role)
            return concrete(x, drawn.view(x.shape).to(x.device), self.tau)
        return hard(x, self.threshold)

    def merged(
        self, vectors: Sequence[Tensor], layer: Layer, *, thresholds: Sequence[float] | None
    ) -> Tensor:
        """Return Merge of the vectors of one matrix; a single one as it is, whatever the rule.

        Args:
            vectors: one per fine-tune.
            layer: for its key and the seed.
            thresholds: of TIES, one per fine-tune.
        """
        if len(vectors) == 1:
            return vectors[0]
        scale = cast(float, self.merge_lambda)
        if self.merge == "average":
            return average(vectors)
        if self.merge == "ties":
            assert thresholds is not None, "the preparation finds them"
            return ties(vectors, scale, thresholds)
        if self.merge == "dare":
            vectors = [self._thinned(vector, layer, task=i) for i, vector in enumerate(vectors)]
        return task_arithmetic(vectors, scale)

    def _thinned(self, vector: Tensor, layer: Layer, *, task: int) -> Tensor:
        kept = kept_entries(
            vector,
            self.dare_drop,
            seed=layer.seed,
            method=self.name,
            key=layer.key,
            role=f"task {task}",
        )
        return rescale_kept(vector, kept, self.dare_drop)

    def _edit_factors(self, layer: Layer, statistics: Statistics) -> Edit:
        ups, downs = (statistics.tensor(f"logits_{side}", layer.key) for side in ("up", "down"))
        if layer.lora is None or ups is None or downs is None:
            return Unchanged("no adapter factors for this matrix")
        lora = layer.lora
        masks = [
            self.mask(x.to(lora.up.device), layer, role=f"mask {side}")
            for x, side in ((ups, "up"), (downs, "down"))
        ]
        up, down = (factor(mask, rescale=self.rescale) for mask in masks)
        if bool((up == 1.0).all()) and bool((down == 1.0).all()):
            return Unchanged("the mask keeps all of the adapter")
        facts: dict[str, Any] = {"kept_share": float(sum(mask.mean() for mask in masks) / 2)}
        left, right = factor_edit(lora, up * lora.up.float(), down * lora.down.float())
        return from_factors(left, right, facts)


def task_vectors(layer: Layer) -> list[Tensor]:
    """Return W_i - W_a of the fine-tune and of those that are fused with it."""
    aligned = layer.require("aligned")
    return [difference(each, aligned) for each in (layer.finetuned, *layer.also)]


def factor_edit(lora: LoraFactors, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return (left, right) with left @ right = s (B' A' - B A), of rank 2 r."""
    left = lora.scale * torch.cat([up, -lora.up.float()], dim=1)
    return left, torch.cat([down, lora.down.float()])
