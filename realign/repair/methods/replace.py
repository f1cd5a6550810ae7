"""Replace: put the aligned weights back where alignment wrote and read, and nowhere else.

Our own method. Shape suffixes: o is d_out, i is d_in, k the number of directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from realign.repair.edit import Edit, Layer, Unchanged, VectorKind, from_factors
from realign.repair.method import Card, CostClass
from realign.repair.methods.ranks import check_eta, choose_rank, spectrum_facts
from realign.repair.methods.spectral import SpectralMethod
from realign.repair.parameters import Choice, Either, Integer, Real, parameter
from realign.subspace.spectrum import Decomposition, Side
from realign.subspace.vectors import difference, squared_norm

SIDES: dict[str, Side] = {"both": "both", "left": "left", "right": "right"}

CARD = Card(
    title="Two-sided drift replacement",
    source="ours; nothing is published",
    summary="undo the fine-tune's drift inside the output and input directions that alignment used",
    idea="Alignment wrote into few output directions and reads from few input directions. Put "
    "exactly these back to their aligned values and leave the rest of the fine-tune alone. Among "
    "all weights that agree with the aligned ones on both subspaces, the result is the closest to "
    "the fine-tune; it cannot overshoot, and at strength 1 running it twice changes nothing.",
    equations="""\
delta_safe = W_aligned - W_base = U S V^T;  D = W_aligned - W_finetuned
P = U_k U_k^T;  Q = V_k V_k^T
both:   W' = W_finetuned + P D + D Q - P D Q = W_aligned + (I - P)(W_finetuned - W_aligned)(I - Q)
left:   W' = W_finetuned + P D
right:  W' = W_finetuned + D Q""",
    inputs="fine-tuned, aligned, base (or unaligned); no data",
    touches="weights of linear layers in decoder blocks, each logical block with its own P and Q",
    edit_kind="low-rank of rank at most 2k; dense where that is not smaller",
    cost="one symmetric eigendecomposition of the smaller side per matrix",
    cautions=(
        "It restores what the aligned weights do on the subspace: a skill that the fine-tune put "
        "there is lost with the drift. Measure the task.",
        "Safety that alignment stored outside the top k stays lost.",
        "Where base and aligned differ by far more than alignment, the subspaces are not about "
        "safety.",
        "Found and measured in the laboratory; no claim is made for real models.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Replace(SpectralMethod):
    """Two-sided drift replacement."""

    name: ClassVar[str] = "replace"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "decomposition"
    paper_vector: ClassVar[VectorKind | None] = "base"
    max_strength: ClassVar[float] = 1.0  # beyond, the bound norm(W' - Wa) <= norm(Wf - Wa) is lost

    side: str = parameter("both", Choice(("both", "left", "right")), source="our choice")
    """Restore what is written into the subspace (left), read from it (right), or both."""

    rank: int | str = parameter(
        "stable",
        Either((Integer(0), Choice(("stable", "energy", "entropy")))),
        symbol="k",
        source="our choice; 4 in the laboratory",
    )
    """A number, `stable` (sum S^2 / S_1^2, rounded up), or `energy` or `entropy` with eta."""

    eta: float = parameter(
        0.5, Real(0.0, 1.0), symbol="eta", source="our choice; read by `energy` and `entropy` only"
    )
    """Threshold of the rank rules."""

    safety_vector: str = parameter(
        "base",
        Choice(("base", "unaligned", "auto")),
        symbol="delta_safe",
        source="our choice",
    )
    """The vector whose subspaces are used: aligned minus base, or aligned minus unaligned."""

    def check_settings(self) -> None:
        """Refuse an eta of 0 or 1 where a rule reads it."""
        check_eta(self.rank, self.eta)

    def safety_matrix(self, layer: Layer) -> Tensor | Unchanged:
        """Return delta_safe, or why the layer is left alone."""
        kind = self.vector_kind
        assert kind is not None
        delta_safe = layer.safety_vector(kind)
        if not bool(delta_safe.any()):
            return Unchanged("alignment did not touch this tensor")
        if not bool(difference(layer.require("aligned"), layer.finetuned).any()):
            return Unchanged("task vector is zero")
        if self.rank == 0:
            return Unchanged("rank is 0")
        return delta_safe

    def edit_spectrum(self, layer: Layer, decomposition: Decomposition) -> Edit:
        """Return E = P D + D Q - P D Q, or one of its one-sided forms [d_out, d_in]."""
        drift_oi = difference(layer.require("aligned"), layer.finetuned)
        k = choose_rank(decomposition.energies, self.rank, eta=self.eta)
        u_ok, v_ik = self._subspaces(layer, decomposition, k)
        left, right = replacement_factors(
            drift_oi, u_ok.to(drift_oi), v_ik.to(drift_oi), side=self.side
        )
        facts = spectrum_facts(decomposition.energies, k)
        facts["projected_safety"] = float(facts["kept_energy"] or 0.0) ** 0.5
        facts["projected_task"] = _factored_norm(left, right) / squared_norm(drift_oi) ** 0.5
        return from_factors(left, right, facts)

    def _subspaces(
        self, layer: Layer, decomposition: Decomposition, k: int
    ) -> tuple[Tensor, Tensor]:
        """Return U_k [d_out, k] and V_k [d_in, k]; the side that is not used may be empty."""
        triplets = decomposition.triplets(k, side=SIDES[self.side])
        return triplets.u, triplets.v


def replacement_factors(
    drift_oi: Tensor, u_ok: Tensor, v_ik: Tensor, *, side: str
) -> tuple[Tensor, Tensor]:
    """Return left and right with left @ right = P D + D Q - P D Q, without forming P or Q.

    Args:
        drift_oi: D = Wa - Wf.
        u_ok: orthonormal basis of range(P); unused for side "right".
        v_ik: orthonormal basis of range(Q); unused for side "left".
        side: "both", "left" or "right".
    """
    if side == "left":
        return u_ok, u_ok.T @ drift_oi
    read_ok = drift_oi @ v_ik
    if side == "right":
        return read_ok, v_ik.T
    write_ki = u_ok.T @ drift_oi
    left = torch.cat([u_ok, read_ok - u_ok @ (write_ki @ v_ik)], dim=1)
    return left, torch.cat([write_ki, v_ik.T], dim=0)


def _factored_norm(left: Tensor, right: Tensor) -> float:
    """Return norm(left @ right) from the two small Gram matrices."""
    left_rr = left.T.double() @ left.double()
    right_rr = right.double() @ right.double().T
    return max(float((left_rr * right_rr).sum()), 0.0) ** 0.5
