"""LoX: extrapolate the leading directions of alignment (arXiv 2506.15606).

Published for hardening an aligned model before anybody fine-tunes it; offered for that, and
re-purposed for repair afterwards. Shape suffixes: o is d_out, i is d_in, k the directions kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from realign.repair.edit import Dense, Edit, Facts, Layer, Unchanged, VectorKind, from_factors
from realign.repair.method import Card, CostClass, Given, Role, Settled, with_settings
from realign.repair.methods.ranks import choose_rank, spectrum_facts
from realign.repair.methods.spectral import SpectralMethod
from realign.repair.parameters import Choice, Either, Integer, Nothing, Real, parameter
from realign.repair.preparation import Statistics
from realign.subspace.keyed import generator
from realign.subspace.projector import energy_share
from realign.subspace.randomised import randomised_triplets
from realign.subspace.spectrum import Decomposition
from realign.subspace.vectors import difference, squared_norm

ALPHA = {"harden": 1.25, "posthoc": 1.0}
"""What `alpha = auto` stands for."""

CARD = Card(
    title="LoX: low-rank extrapolation of alignment",
    source="Perin et al., arXiv 2506.15606, COLM 2025",
    summary="add a multiple of the alignment vector's leading singular directions; no data",
    idea="Alignment writes its safety into few directions of a weight matrix. Moving further along "
    "them makes a model whose safety survives fine-tuning (hardening, as published). Used "
    "afterwards, the same edit puts back what a fine-tune has worn off: a re-purposing.",
    equations="""\
D = W_aligned - W_base = U S V^T;  trunc_k(D) = U_k S_k V_k^T;  Proj_k(M) = U_k U_k^T M
R_align = norm(Proj_k(D)) / norm(D)
R_ft = norm(Proj_k(W_finetuned - W_base)) / norm(W_finetuned - W_base)
mode = harden (published):  W_LoX = W_aligned + alpha trunc_k(D), before any fine-tuning
mode = posthoc (ours):      W' = W_finetuned + alpha trunc_k(D)""",
    inputs="posthoc: fine-tuned, aligned, base; harden: aligned (as the model to edit), base",
    touches="weights of linear layers in decoder blocks; `--scope matrices` adds embeddings and "
    "output head, which is what the public code edits; vectors are never touched",
    edit_kind="low-rank of rank k; dense where k is too large for that to be smaller",
    cost="one decomposition of the smaller side per matrix, or a few passes with svd=randomised",
    deviations=(
        "Published for hardening only: using it after the fine-tune is our re-purposing.",
        "k = 6 and alpha = 1.25 for hardening are remembered as the paper's but not confirmed; "
        "alpha = 1 after the fine-tune is our choice.",
        "safety_vector = unaligned, which the paper does not have, is offered as well.",
        "r_align and r_ft are reported per matrix; r_ft / r_align below 1 is the paper's sign of "
        "lost safety. `realign audit` sums them over matrices by energy.",
    ),
    defects=(
        "The difference is taken in float32, not in the 16 bits of the file.",
        "k = 0, which silently means full rank in the public code, is refused; full rank is none.",
        "Only the leading directions are worked out, not a full SVD of every matrix.",
        "Vocabulary and shapes are checked; rows that only one model has are copied.",
        "Shares are never averaged over matrices without weights.",
    ),
    cautions=(
        "Too large an alpha gives incoherent text: sweep the strength with a check of the task.",
        "It adds to whatever is there and is not idempotent: running it twice adds twice.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Lox(SpectralMethod):
    """Low-rank extrapolation of the alignment vector."""

    name: ClassVar[str] = "lox"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "decomposition"
    needs: ClassVar[frozenset[Role]] = frozenset()  # by mode: see `required_roles`
    paper_vector: ClassVar[VectorKind | None] = "base"

    mode: str = parameter(
        "posthoc", Choice(("posthoc", "harden")), source="arXiv 2506.15606 hardens; ours repairs"
    )
    """`posthoc` repairs a fine-tune; `harden` edits the aligned model itself, given as subject."""

    k: int | None = parameter(
        6,
        Either((Integer(1), Nothing())),
        symbol="k",
        source="our choice; ranks 3 to 6 are said to suffice",
    )
    """How many directions are added; `none` adds the whole vector."""

    alpha: float | str = parameter(
        "auto",
        Either((Real(0.0), Choice(("auto",)))),
        symbol="alpha",
        source="1.25 for hardening by public summaries; 1 post-hoc is our choice",
    )
    """Factor of the edit; `auto` is 1.25 for hardening and 1 post-hoc."""

    svd: str = parameter(
        "exact", Choice(("exact", "randomised")), source="our choice; see realign.subspace"
    )
    """`randomised` is faster and blurs the cut where the spectrum has no gap at k."""

    safety_vector: str = parameter(
        "base", Choice(("base", "unaligned", "auto")), symbol="D", source="arXiv 2506.15606"
    )
    """Aligned minus base, or aligned minus unaligned."""

    @property
    def factor(self) -> float:
        """Alpha, with `auto` decided."""
        return ALPHA[self.mode] if isinstance(self.alpha, str) else self.alpha

    @property
    def subject_is_aligned(self) -> bool:
        """When hardening, the aligned model is what is edited."""
        return self.mode == "harden"

    def required_roles(self) -> frozenset[Role]:
        """The vector's checkpoints; when hardening, the aligned model is the subject itself."""
        own: frozenset[Role] = frozenset() if self.subject_is_aligned else frozenset({"aligned"})
        return own | super().required_roles()

    def settled(self, given: Given) -> Settled:
        """Decide `alpha` and the safety vector."""
        return super(Lox, with_settings(self, alpha=self.factor)).settled(given)

    def safety_matrix(self, layer: Layer) -> Tensor | Unchanged:
        """Return D, or why the layer is left alone."""
        if self.factor == 0.0:
            return Unchanged("alpha is 0")
        return self.nonzero_vector(self._seen(layer))

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = alpha trunc_k(D) [d_out, d_in]."""
        if self.k is not None and self.svd == "exact":
            return super().edit(layer, statistics)
        d_oi = self.safety_matrix(layer)
        if isinstance(d_oi, Unchanged):
            return d_oi
        if self.k is None:
            return Dense(d_oi.mul_(self.factor))
        return self._randomised(layer, d_oi, self.k)

    def edit_batch(self, layers: Sequence[Layer], statistics: Statistics) -> list[Edit]:
        """Decompose several matrices in one call, where they are decomposed."""
        if self.k is not None and self.svd == "exact":
            return super().edit_batch(layers, statistics)
        return [self.edit(layer, statistics) for layer in layers]

    def edit_spectrum(self, layer: Layer, decomposition: Decomposition) -> Edit:
        """Return the edit from a decomposition of D."""
        assert self.k is not None
        energies = decomposition.energies
        k = choose_rank(energies, self.k, eta=1.0)
        left_ok, right_ki, u_ok = self._factors(layer, decomposition, k)
        facts = {
            **spectrum_facts(energies, k),
            **self._shares(layer, decomposition.matrix, u_ok),
        }
        return from_factors(left_ok * self.factor, right_ki, facts)

    def _randomised(self, layer: Layer, d_oi: Tensor, k: int) -> Edit:
        draw = generator(seed=layer.seed, method=self.name, key=layer.key, role="svd")
        found = randomised_triplets(d_oi, k, generator=draw)
        k = int((found.s > found.s[0] * 1e-7).sum())  # below, directions are arbitrary
        u_ok = found.u[:, :k].to(d_oi)
        facts = {
            "rank": k,
            "kept_energy": float(found.s[:k].square().sum()) / squared_norm(d_oi),
            **self._shares(layer, d_oi, u_ok),
        }
        return from_factors(u_ok * self.factor, u_ok.T @ d_oi, facts)

    def _seen(self, layer: Layer) -> Layer:
        """The layer as the equations name it: when hardening, the subject is the aligned model."""
        if self.mode == "harden":
            return dataclasses.replace(layer, aligned=layer.finetuned)
        return layer

    def _shares(self, layer: Layer, d_oi: Tensor, u_ok: Tensor) -> Facts:
        """R_align, R_ft and what the report asks of a vector that is added."""
        layer, kind = self._seen(layer), self.vector_kind
        assert kind is not None
        whole = difference(layer.finetuned, layer.require(kind))
        r_align, r_ft = _root(energy_share(u_ok, d_oi)), _root(energy_share(u_ok, whole))
        return {
            "r_align": r_align,
            "r_ft": r_ft,
            "projected_safety": r_align,
            "projected_task": _root(energy_share(u_ok, layer.task_vector())),
        }


def _root(share: float | None) -> float | None:
    return None if share is None else share**0.5
