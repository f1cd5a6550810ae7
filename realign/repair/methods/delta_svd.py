"""Data-free low-rank fusion: put back the leading singular directions of the safety vector.

Not LSSF: the subspace comes from the weights, not from activations. With the base vector and
alpha1 = 1 it is LoX (arXiv 2506.15606) applied after fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from realign.repair.edit import Edit, Layer, Unchanged, VectorKind, from_factors
from realign.repair.method import Card, CostClass
from realign.repair.methods.ranks import check_eta, choose_rank, spectrum_facts
from realign.repair.methods.spectral import SpectralMethod
from realign.repair.parameters import Choice, Either, Integer, Real, parameter
from realign.subspace.projector import direction_weights, energy_share
from realign.subspace.spectrum import Decomposition

CARD = Card(
    title="Data-free low-rank fusion",
    source="ours, built from arXiv 2602.00038 (weights) and arXiv 2506.15606 (truncation)",
    summary="add the leading singular directions of the safety vector; no data",
    idea="Alignment writes into few directions of a weight matrix. Add the top of the safety "
    "vector's own spectrum and leave out its tail. With the base vector, rank k and alpha1 = 1 "
    "this is LoX, which was published for hardening a model before fine-tuning, used afterwards.",
    equations="""\
delta_safe = W_aligned - W_base (or - W_unaligned) = U S V^T
alpha_i = 1 + (alpha1 - 1)(S_i - S_r) / (S_1 - S_r)          (eq. 11 of arXiv 2602.00038)
W' = W_finetuned + alpha sum_{i <= r} alpha_i^2 S_i u_i v_i^T""",
    inputs="fine-tuned, aligned, base or unaligned; no data",
    touches="weights of linear layers in decoder blocks",
    edit_kind="low-rank of rank r; dense where r is too large for that to be smaller",
    cost="one symmetric eigendecomposition of the smaller side per matrix",
    deviations=(
        "This is data-free low-rank fusion, not LSSF: the subspace is the weight delta's own.",
        "A fixed rank is capped at the numerical rank of the safety vector.",
    ),
    cautions=(
        "Weight deltas have flat spectra: the entropy rule keeps a third of all directions and "
        "more, and hardly filters.",
        "The edit adds to whatever the fine-tune still has of the safety vector and can overshoot: "
        "sweep the strength with a check of over-refusal and of the task.",
        "Not idempotent: running it twice adds twice.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DeltaSvd(SpectralMethod):
    """Data-free low-rank fusion of the safety vector."""

    name: ClassVar[str] = "delta_svd"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "decomposition"
    paper_vector: ClassVar[VectorKind | None] = "base"

    rank: int | str = parameter(
        8,
        Either((Integer(1), Choice(("energy", "entropy")))),
        symbol="r",
        source="our choice; LoX uses 3 to 6",
    )
    """How many directions are added: a number, or `energy` or `entropy` at the threshold eta."""

    eta: float = parameter(
        0.85, Real(0.0, 1.0), symbol="eta", source="as in LSSF; read by `energy` and `entropy` only"
    )
    """Threshold of the rank rules."""

    alpha1: float = parameter(
        1.0, Real(0.0), symbol="alpha_1", source="eq. 11 of arXiv 2602.00038; 1 is plain truncation"
    )
    """Weight of the first direction, falling to 1 at the last kept one; acts squared."""

    alpha: float = parameter(1.0, Real(0.0), symbol="alpha", source="our choice")
    """Factor of the whole edit; the same as the strength t."""

    safety_vector: str = parameter(
        "auto",
        Choice(("auto", "base", "unaligned")),
        symbol="delta_safe",
        source="LoX takes `base`",
    )
    """Aligned minus base or aligned minus unaligned; `auto` takes `base` if it was given."""

    def check_settings(self) -> None:
        """Refuse an eta of 0 or 1 where a rule reads it."""
        check_eta(self.rank, self.eta)

    def safety_matrix(self, layer: Layer) -> Tensor | Unchanged:
        """Return delta_safe, or why the layer is left alone."""
        return Unchanged("alpha is 0") if self.alpha == 0.0 else self.nonzero_vector(layer)

    def edit_spectrum(self, layer: Layer, decomposition: Decomposition) -> Edit:
        """Return E = alpha sum_{i <= r} alpha_i^2 S_i u_i v_i^T [d_out, d_in]."""
        energies = decomposition.energies
        rank = choose_rank(energies, self.rank, eta=self.eta)
        weights = direction_weights(energies[:rank].sqrt(), self.alpha1).square()
        left, right, basis = self._factors(layer, decomposition, rank)
        weighted = (weights.square() * energies[:rank]).sum() / energies.sum()
        task_share = energy_share(basis, layer.task_vector())
        facts = {
            **spectrum_facts(energies, rank),
            "projected_safety": float(weighted) ** 0.5,
            "projected_task": None if task_share is None else task_share**0.5,
        }
        return from_factors(left * (self.alpha * weights).to(left), right, facts)
