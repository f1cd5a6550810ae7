"""LSSF: put back the part of the safety vector that lies where a refusing model's outputs live.

The one method here that looks at activations. Its subspace comes from the aligned model's outputs
on anchor prompts (`scatter`), its rank from the entropy of their spectrum (arXiv 2602.00038).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from realign.repair.demands import Measurement
from realign.repair.edit import Edit, Layer, Unchanged, VectorKind, from_factors
from realign.repair.method import Card, CostClass, Method
from realign.repair.methods.ranks import check_eta, choose_rank, spectrum_facts
from realign.repair.methods.scatter import output_spectrum
from realign.repair.parameters import Choice, Either, Integer, Nothing, Real, parameter
from realign.repair.preparation import Statistics, Workbench
from realign.subspace.projector import direction_weights, energy_share
from realign.subspace.vectors import squared_norm

CARD = Card(
    title="Low-rank safety subspace fusion",
    source="Zhou et al., arXiv 2602.00038, ACL 2025",
    summary="add the safety vector, projected on the subspace of the aligned model's own outputs "
    "while it refuses",
    idea="The full safety vector also carries directions that hurt general ability. Keep only the "
    "part of it inside the low-dimensional space in which the aligned model's outputs live while "
    "it refuses; the rank of that space follows, layer by layer, from the entropy of its spectrum.",
    equations="""\
delta_safe = W_aligned - W_unaligned                                          (1)
Z = W_aligned X on the anchors;  Z~ = (Z - mu) / s;  U S V^T = Z~             (3, 4)
p_i = sigma_i^2 / sum sigma_j^2;  H_rho = - sum_{i <= rho} p_i log p_i        (5, 6)
r = smallest rho with H_rho / H_n > eta                                       (7)
alpha_i = 1 + (alpha1 - 1)(sigma_i - sigma_r) / (sigma_1 - sigma_r)           (11)
P' = U_r diag(alpha_i^2) U_r^T                                                (8 - 10)
W' = W_finetuned + alpha P' delta_safe                                        (13)""",
    inputs="fine-tuned, aligned, unaligned (or base); anchor prompts that the aligned model "
    "refuses",
    touches="weights of linear layers in decoder blocks",
    edit_kind="low-rank of rank r; dense where r is too large for that to be smaller",
    cost="one forward pass of the aligned model over the anchors, with the model (with --offload, "
    "three of its blocks) and the float64 moments of one block in memory; one symmetric "
    "eigendecomposition per matrix",
    deviations=(
        "No official code exists; the equations follow public summaries that agree with one "
        "another.",
        "Standardisation runs over tokens for each neuron (`neuron`). The paper's index can also "
        "be read per token (`token`); `none` is the uncentred scatter.",
        "The basis lives in standardised coordinates and multiplies the raw safety vector, as "
        "written; no diag(s) is inserted.",
        "The factor alpha of equation 13 is 1 by default, and apart from alpha1 of equation 11.",
        "Only the reply's own positions count by default (`tokens = response`).",
        "A neuron whose variance is rounding error of its mean square counts as dead.",
    ),
    cautions=(
        "In the laboratory the subspace is stable under fine-tuning, as the paper claims, but not "
        "isolated: training on general skills alone writes into it above chance. "
        "[The claims, measured](../claims.md).",
        "The paper reports no over-refusal; other work (arXiv 2505.14185) finds that subspaces "
        "which amplify safe behaviour also amplify useful behaviour. Measure both.",
        "The rank cannot exceed the number of anchor tokens; the report shows tokens / d_out.",
        "A repair from the weights alone that goes by the same name elsewhere is `delta_svd` here.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Lssf(Method):
    """Low-rank safety subspace fusion."""

    name: ClassVar[str] = "lssf"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "forward"
    paper_vector: ClassVar[VectorKind | None] = "unaligned"
    needs_anchors: ClassVar[bool] = True

    eta: float = parameter(
        0.85,
        Real(0.0, 1.0),
        symbol="eta",
        source="eq. 7; 0.8 to 0.9 is usual, the midpoint is ours",
    )
    """Share of the spectrum's entropy that the kept directions must exceed; more keeps more."""

    alpha1: float = parameter(
        1.0, Real(0.0), symbol="alpha_1", source="eq. 11; tuned in the paper, 1 is our default"
    )
    """Weight of the first direction, falling to 1 at the last kept one; acts squared."""

    alpha: float = parameter(1.0, Real(0.0), symbol="alpha", source="eq. 13; 1 is our default")
    """Factor of the whole edit; the same as the strength t."""

    standardize: str = parameter(
        "neuron",
        Choice(("neuron", "token", "none")),
        source="before eq. 4; the axis is our reading",
    )
    """How outputs are scaled: each neuron over tokens, each token over neurons, or not at all."""

    tokens: str = parameter("response", Choice(("response", "prompt", "all")), source="our choice")
    """Positions that count, by their own input token: the reply's, the prompt's, or all."""

    rank_rule: int | str = parameter(
        "entropy",
        Either((Integer(1), Choice(("entropy", "energy")))),
        symbol="r",
        source="eq. 7; `energy` and a fixed number are for ablation",
    )
    """How r is chosen: `entropy` or `energy` at the threshold eta, or a fixed number."""

    max_rank: int | None = parameter(None, Either((Nothing(), Integer(1))), source="our addition")
    """Upper limit of r."""

    safety_vector: str = parameter(
        "auto",
        Choice(("auto", "unaligned", "base")),
        symbol="delta_safe",
        source="eq. 1 takes `unaligned`",
    )
    """Aligned minus unaligned or aligned minus base; `auto` takes the paper's if it was given."""

    min_tokens: int = parameter(256, Integer(1), symbol="N", source="our addition")
    """Matrices with fewer counted tokens (a cold expert) are left unchanged."""

    def check_settings(self) -> None:
        """Refuse an eta of 0 or 1 where a rule reads it."""
        check_eta(self.rank_rule, self.eta)

    def prepare(self, workbench: Workbench) -> Statistics:
        """Collect the moments of the aligned model on the anchors."""
        return workbench.moments(role="aligned", standardize=self.standardize, tokens=self.tokens)

    def measures(self) -> tuple[Measurement, ...]:
        """Return what `prepare` measures."""
        return (Measurement("aligned", "smaller"),)

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = alpha U_r diag(alpha_i^2) U_r^T delta_safe [d_out, d_in]."""
        kind = self.vector_kind
        assert kind is not None
        moments = statistics.moments(layer.key)
        if moments is None:
            return Unchanged("no activation statistics")
        if moments.n == 0:
            return Unchanged("no activation variance")
        if moments.n < self.min_tokens:
            return Unchanged("too few tokens")
        if self.alpha == 0.0:
            return Unchanged("alpha is 0")
        if not bool(layer.safety_vector(kind).any()):
            return Unchanged("safety vector is zero")
        tokens = moments.n
        aligned = layer.require("aligned")
        spectrum = output_spectrum(
            moments, aligned, self.standardize, overwrite=statistics.disposable
        )
        del moments
        energies = spectrum.energies
        rank = choose_rank(energies, self.rank_rule, eta=self.eta)
        if rank == 0:
            return Unchanged("no activation variance")
        if self.max_rank is not None:
            rank = min(rank, self.max_rank)

        weights = direction_weights(energies[:rank].sqrt(), self.alpha1).square()
        basis = spectrum.basis(rank)
        del spectrum  # it is as large as the matrix, which comes next
        delta_safe = layer.safety_vector(kind)
        u_or = basis.to(delta_safe)
        right_ri = u_or.T @ delta_safe
        projected = squared_norm(weights.to(delta_safe)[:, None] * right_ri)
        task_share = energy_share(u_or, layer.task_vector())
        facts = {
            **spectrum_facts(energies, rank),
            "projected_safety": (projected / squared_norm(delta_safe)) ** 0.5,
            "projected_task": None if task_share is None else task_share**0.5,
            "tokens": tokens,
            "tokens_per_output": tokens / delta_safe.shape[0],
        }
        left_or = u_or * (self.alpha * weights).to(delta_safe)
        return from_factors(left_or, right_ri, facts)
