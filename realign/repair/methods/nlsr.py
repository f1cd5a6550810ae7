"""NLSR: put the values of a safer reference into the safety regions of the modules that broke.

arXiv 2412.12497. Regions are in `regions`. Suffixes: o is d_out, i is d_in, r an adapter's rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from realign.errors import MismatchError, UsageError
from realign.repair.demands import Measurement
from realign.repair.edit import Edit, Layer, LoraFactors, Unchanged, from_factors
from realign.repair.method import Card, CostClass, Given, Method, Role, Settled, with_settings
from realign.repair.methods.exact import rewritten
from realign.repair.methods.inputs import home_of, missing_inputs
from realign.repair.methods.regions import (
    adapter_regions,
    cosine_inside,
    cosine_of_products,
    region_of,
)
from realign.repair.parameters import Choice, Integer, Real, parameter
from realign.repair.preparation import Data, Scores, Selection, Statistics, Workbench
from realign.subspace.keyed import uniforms
from realign.subspace.masks import count_up

if TYPE_CHECKING:
    from realign.model.moments import Moments

NO_OUTPUTS = "the reference gives no outputs here"

CARD = Card(
    title="NLSR: neuron-level safety realignment",
    source="Yi et al., arXiv 2412.12497, AAAI 2025",
    summary="transplant the entries of a safer reference that its refusals run through, in the "
    "modules that strayed most from it",
    idea="A reference that is safer than the aligned model is made by extrapolation. In every "
    "module the entries that carry its answers to harm are its safety region. Where the "
    "fine-tune's change inside the region is least like the reference's, the module broke, and "
    "the region gets the reference's values.",
    equations="""\
W_e = W_strong + b (W_strong - W_weak)
W_hat = Q_r Q_r^T W_e,  Q_r the top r output directions of W_e X,  r = floor(q min(d_out, d_in))
M = the count - ceil(q count) entries of largest |W_hat|
c_l = cos(M (.) (W_finetuned - W_aligned), M (.) (W_e - W_aligned))
selected: the ceil(fraction L) modules of lowest c_l
W' = (1 - M) (.) W_finetuned + M (.) W_e;  the other modules keep W_finetuned""",
    inputs="fine-tuned, aligned; reference (a model of stronger safety, say the aligned one after "
    "preference tuning) or unaligned, if there is one; safe dialogues, with refusals (--safe-data, "
    "or the anchors)",
    touches="weights of linear layers in decoder blocks; of an adapter its factors A and B",
    edit_kind="dense; low-rank for an adapter, of twice its rank",
    cost="one forward pass of the reference over the dialogues; one eigendecomposition per matrix "
    "for the scores, and another for each selected matrix; 8 d_in^2 "
    "bytes for moments and up to 60 for every entry of the matrix",
    deviations=(
        "A given reference is W_strong, the aligned model W_weak: set b = 0 to take it as it is. "
        "Without one, W_e = W_aligned + b (W_aligned - W_unaligned), or W_aligned itself.",
        "Where W_e is the aligned weight, its own change is zero and has no direction: c_l is then "
        "the cosine of the weights themselves inside the region, lowest where the fine-tune moved "
        "them most.",
        "Selection is deterministic by default; selection = bernoulli draws every module with a "
        "probability that rises from fraction - spread at the most similar one to "
        "fraction + spread at the least, by draws keyed by the module's name.",
        "Modules that the fine-tune or the reference left alone are not counted.",
        "Q_r comes from the inputs of W_strong in every case: extrapolated with b > 0, W_e is no "
        "checkpoint that could be run.",
        "Equal entries go by column, then row: a region has exactly its size.",
        "Directions without energy do not enter Q_r, so r is smaller where there are few tokens.",
        "Of an adapter, the amplification 1 + b stands on the product, as a factor of B; space = "
        "adapter needs a reference that is an adapter of the same rank.",
    ),
    defects=(
        "The least similar modules are repaired; in the public code the ranking is inverted, and "
        "similarities .9, .1, .5 give probabilities .7, .3, .5.",
        "An adapter is amplified by 1.9 on its product, not by 1.8 on A and on B, which is 3.24.",
        "Draws do not depend on the order of the modules.",
        "A matrix without outputs has no region; there is no random mask in its stead.",
        "It is no half-and-half blend of two models, which a library offers under this name.",
    ),
    cautions=(
        "Its repair is as good as the reference. The paper's first step alone takes the harmful "
        "score from 26.0 to 10.5 (DPO), 15.1 to 11.6 (KTO), 26.8 to 9.0 (SimPO), 34.6 to 27.8 "
        "(ORPO).",
        "An extrapolated reference may refuse too much; measure over-refusal, too.",
        "With fraction = 0.5 half of the modules keep whatever they learned.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Nlsr(Method):
    """Neuron-level safety realignment."""

    name: ClassVar[str] = "nlsr"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "forward"
    data: ClassVar[frozenset[Data]] = frozenset({"safe"})
    max_strength: ClassVar[float] = 1.0  # beyond, regions overshoot the reference

    b: float = parameter(0.9, Real(0.0), symbol="b", source="public code")
    """How far the reference is extrapolated beyond the strong model."""

    q: float = parameter(0.8, Real(0.0, 1.0), symbol="q", source="public code, as `sparsity`")
    """Share of a matrix outside its safety region; also sets r."""

    fraction: float = parameter(0.5, Real(0.0, 1.0), source="public code, as `prune_rate`")
    """Share of the modules that are repaired, rounded up."""

    selection: str = parameter("lowest", Choice(("lowest", "bernoulli")), source="ours")
    """The modules of lowest c_l, or drawn at random with a bias towards these."""

    spread: float = parameter(0.2, Real(0.0, 1.0), source="public code")
    """How far the probabilities of `bernoulli` reach below and above `fraction`."""

    reference: str = parameter(
        "auto", Choice(("auto", "reference", "unaligned", "aligned")), source="ours"
    )
    """What W_e is made from: a `reference` model, aligned minus `unaligned`, or the `aligned` one.

    `auto` takes the first of them that was given.
    """

    space: str = parameter("auto", Choice(("auto", "adapter", "merged")), source="public code")
    """Transplant entries of an adapter's factors, or of whole weights; `auto`: by what is given."""

    samples: int = parameter(2000, Integer(1), source="paper")
    """How many safe dialogues are used at most, the first ones."""

    def check_settings(self) -> None:
        """Refuse to repair no module, or no entry."""
        for name, empty in (("fraction", 0.0), ("q", 1.0)):
            if getattr(self, name) == empty:
                raise UsageError(
                    f"{name} = {empty:g} leaves nothing to repair: nlsr would change nothing",
                    f"give {'a number in (0, 1]' if empty == 0.0 else 'a number in [0, 1)'}",
                )

    def settled(self, given: Given) -> Settled:
        """Decide what the reference is made from, and the space."""
        made_from, notes = self.reference, list[str]()
        if made_from == "auto":
            roles = ("reference", "unaligned", "aligned")
            made_from = next(each for each in roles if each in given.roles or each == "aligned")
            if made_from != "reference":
                formula = (
                    "aligned" if made_from == "aligned" else "aligned + b (aligned - unaligned)"
                )
                notes.append(f"no --reference is given: nlsr takes {formula} as its reference")
        elif made_from != "aligned" and made_from not in given.roles:
            raise UsageError(
                f"nlsr with reference = {made_from} needs the {made_from} model",
                f"give it with --{made_from}, or use --set reference=auto",
            )
        factored = given.adapter and given.reference_adapter and made_from == "reference"
        space = self.space
        if space == "adapter" and not factored:
            raise UsageError(
                "nlsr with space = adapter needs a fine-tune and a reference that are both LoRA "
                "adapters of the aligned model",
                "use --set space=merged, or give adapters",
            )
        if space == "auto":
            space = "adapter" if factored else "merged"
        return Settled(with_settings(self, reference=made_from, space=space), "; ".join(notes))

    def required_roles(self) -> frozenset[Role]:
        """The aligned model, and what its reference is made from."""
        extra: frozenset[Role] = frozenset()
        if self.reference == "reference":
            extra = frozenset({"reference"})
        elif self.reference == "unaligned" and self.b > 0.0:
            extra = frozenset({"unaligned"})
        return self.needs | extra

    def must_differ(self) -> tuple[tuple[Role, Role], ...]:
        """What the reference is made from, and the aligned model."""
        extra = self.required_roles() - self.needs
        return tuple((role, "aligned") for role in sorted(extra))

    @property
    def is_aligned(self) -> bool:
        """Whether W_e is the aligned weight itself."""
        return self.reference == "aligned" or (self.reference == "unaligned" and self.b == 0.0)

    def prepare(self, workbench: Workbench) -> Statistics:
        """Collect the reference's input moments on its refusals, and score every module."""
        statistics = workbench.input_moments(
            role="reference" if self.reference == "reference" else "aligned",
            data="safe",
            tokens="response",
            limit=self.samples,
        )
        scores: dict[str, dict[str, float]] = {}
        total = len(workbench.slots)
        with workbench.progress.task("safety regions", total=total, unit="matrices") as task:
            for layer in workbench.layers():
                cosine = self.score(layer, statistics)
                if isinstance(cosine, float):
                    drawn = uniforms(
                        1, seed=workbench.seed, method=self.name, key=layer.key, role="selection"
                    )
                    scores[layer.key] = {"cosine": cosine, "draw": float(drawn)}
                task.advance(1)
        return replace(statistics, scores=scores)

    def select(self, scores: Scores) -> Selection:
        """Choose the modules to repair; equal scores go by name."""
        if self.selection == "lowest":
            order = sorted(scores, key=lambda key: (scores[key]["cosine"], key))
            return frozenset(order[: count_up(self.fraction, len(order))])
        chances = self.probabilities({key: each["cosine"] for key, each in scores.items()})
        return frozenset(key for key, p in chances.items() if scores[key]["draw"] < p)

    def probabilities(self, cosines: dict[str, float]) -> dict[str, float]:
        """Return p_l = fraction - spread + 2 spread rank_l / (L - 1), rank 0 the most similar."""
        order = sorted(cosines, key=lambda key: (-cosines[key], key))
        last = len(order) - 1
        found: dict[str, float] = {}
        for rank, key in enumerate(order):
            tilt = 2.0 * rank / last - 1.0 if last else 0.0
            found[key] = min(max(self.fraction + self.spread * tilt, 0.0), 1.0)
        return found

    def score(self, layer: Layer, statistics: Statistics) -> float | Unchanged:
        """Return c_l, or why the module is not counted."""
        reason = self._uncounted(layer)
        moments = None if reason else statistics.moments(layer.key)
        reason = reason or missing_inputs(moments)
        if moments is None or reason:
            return Unchanged(reason)
        if self.space == "adapter":
            own, reference = self._factors(layer)
            regions = adapter_regions(reference, moments, self.q, overwrite=statistics.disposable)
            if regions is None:
                return Unchanged(NO_OUTPUTS)
            return cosine_of_products(own, reference, regions)
        reference_oi = self.reference_weight(layer)
        mask_oi = region_of(reference_oi, moments, self.q, overwrite=statistics.disposable)
        if mask_oi is None:
            return Unchanged(NO_OUTPUTS)
        finetuned = layer.finetuned.to(mask_oi.device)
        if self.is_aligned:
            return cosine_inside(mask_oi, finetuned, reference_oi)
        aligned = layer.require("aligned").to(mask_oi.device)
        return cosine_inside(mask_oi, finetuned.double() - aligned, reference_oi.double() - aligned)

    def edit_bytes(self, d_out: int, d_in: int) -> int | None:
        """The moments, the outputs' directions, W_hat and its order."""
        return 8 * d_in**2 + 60 * d_out * d_in

    def measures(self) -> tuple[Measurement, ...]:
        """Return what `prepare` measures."""
        return (Measurement("reference" if self.reference == "reference" else "aligned", "inputs"),)

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = M (.) (We - Wf) [d_out, d_in] of a selected module."""
        if self.fraction == 0.0:
            return Unchanged("fraction is 0")
        reason = self._uncounted(layer)
        if reason:
            return Unchanged(reason)
        score = statistics.scores.get(layer.key, {})
        facts: dict[str, float | int | str | None] = {
            name: score[name] for name in ("cosine",) if name in score
        }
        if not statistics.selects(layer.key):
            known = f": cosine {score['cosine']:.3f}" if score else ""
            return Unchanged(f"not among the least similar modules{known}")
        moments = statistics.moments(layer.key)
        reason = missing_inputs(moments)
        if moments is None or reason:
            return Unchanged(reason)
        facts["tokens"] = moments.n
        if self.space == "adapter":
            return self._edit_factors(layer, moments, facts, overwrite=statistics.disposable)
        reference_oi = self.reference_weight(layer)
        mask_oi = region_of(reference_oi, moments, self.q, overwrite=statistics.disposable)
        del moments
        if mask_oi is None:
            return Unchanged(NO_OUTPUTS)
        facts["region_share"] = int(mask_oi.sum()) / mask_oi.numel()
        wide = torch.promote_types(reference_oi.dtype, layer.finetuned.dtype)
        own_oi = layer.finetuned.to(reference_oi.device, wide)
        weight_oi = torch.where(mask_oi, reference_oi.to(wide), own_oi)
        return rewritten(weight_oi, layer.finetuned, facts=facts)

    def reference_weight(self, layer: Layer) -> Tensor:
        """Return We [d_out, d_in]: a checkpoint's own weight, or float64 where extrapolated."""
        home = home_of(layer.finetuned)
        aligned = layer.require("aligned").to(home)
        if self.is_aligned:
            return aligned
        if self.reference == "reference":
            strong, weak = layer.require("reference").to(home), aligned
            if self.b == 0.0:
                return strong
        else:
            strong, weak = aligned, layer.require("unaligned").to(home)
        return strong.double() + self.b * (strong.double() - weak.double())

    def _uncounted(self, layer: Layer) -> str:
        """Say why a module has nothing to compare or to transplant; empty where it has."""
        if self.space == "adapter":
            both = layer.lora is not None and layer.reference_lora is not None
            return "" if both else "no factors of both adapters here"
        aligned = layer.require("aligned")
        if torch.equal(layer.finetuned, aligned):
            return "task vector is zero"
        if not self.is_aligned:
            role = "reference" if self.reference == "reference" else "unaligned"
            if torch.equal(layer.require(role), aligned):
                return "the reference does not differ from the aligned model here"
        return ""

    def _factors(self, layer: Layer) -> tuple[LoraFactors, LoraFactors]:
        """Return the fine-tune's factors, and the reference's in the fine-tune's scale."""
        own, strong = layer.lora, layer.reference_lora
        assert own is not None
        assert strong is not None
        if own.down.shape != strong.down.shape:
            raise MismatchError(
                f"{layer.key}: the fine-tune's adapter has rank {own.down.shape[0]}, the "
                f"reference's {strong.down.shape[0]}: their entries do not correspond",
                "use --set space=merged",
            )
        up = strong.up.double() * ((1.0 + self.b) * strong.scale / own.scale)
        return own, LoraFactors(strong.down.double(), up, own.scale)

    def _edit_factors(
        self,
        layer: Layer,
        moments: Moments,
        facts: dict[str, float | int | str | None],
        *,
        overwrite: bool,
    ) -> Edit:
        """Return s (B' A' - B A) as factors of rank 2 r."""
        own, reference = self._factors(layer)
        regions = adapter_regions(reference, moments, self.q, overwrite=overwrite)
        if regions is None:
            return Unchanged(NO_OUTPUTS)
        down, up = own.down.double(), own.up.double()
        new_down = torch.where(regions.down, reference.down, down)
        new_up = torch.where(regions.up, reference.up, up)
        left_or = torch.cat([own.scale * new_up, -own.scale * up], dim=1)
        right_ri = torch.cat([new_down, down], dim=0)
        kept = torch.float64 if own.down.dtype == torch.float64 else torch.float32
        return from_factors(left_or.to(kept), right_ri.to(kept), facts)
