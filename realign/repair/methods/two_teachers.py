"""Two teachers: a low-rank edit in the alignment subspace, distilled from both parents.

Our own method, a prototype: the aligned model teaches refusals, the fine-tune everything else. The
training is in `two_teachers_training`. Shape suffixes: o is d_out, i is d_in, k the directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from realign.repair.demands import ModelSize
from realign.repair.edit import Edit, Layer, Unchanged, VectorKind, from_factors
from realign.repair.kept_tensors import tables_of
from realign.repair.method import Card, CostClass, Method
from realign.repair.parameters import Choice, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench

CARD = Card(
    title="Two-teacher distillation in the alignment subspace",
    source="ours; a prototype, nothing is published",
    summary="train a low-rank edit: the aligned model teaches refusals, the fine-tune the rest",
    idea="Both parents are at hand, so nothing needs labels. The edit may move each matrix only "
    "along the leading directions that alignment wrote or read. Within them it is trained to give "
    "the aligned model's answers on harmful anchors, and the fine-tune's own answers on prompts "
    "that must stay.",
    equations="""\
delta_safe = W_aligned - W_base = U S R^T;  U_k, R_k: leading k singular vectors, frozen
E = U_k A + B R_k^T;  A [k, d_in] and B [d_out, k] start at 0
loss = KL(p_aligned || p_W') on the tokens of the aligned model's refusals of the anchors
     + keep_weight KL(p_finetuned || p_W') on the reply tokens of the fine-tune's own outputs
W' = W_finetuned + E""",
    inputs="fine-tuned, aligned, base (or unaligned); anchors (or --safe-data) and --keep-data: "
    "prompts that must stay, whose replies the fine-tune gives itself where the file has none",
    touches="weights of linear layers in decoder blocks",
    edit_kind="low-rank of rank at most 2k; dense where that is not smaller",
    cost="one decomposition per matrix; the aligned model once over the anchors; then a training "
    "of k (d_out + d_in) numbers per matrix with the fine-tune in float32. The teachers' "
    "distributions are kept: 4 bytes x vocabulary per reply token",
    deviations=(
        "The number of look-alikes among the keep prompts governs over-refusal: the prototype had "
        "64 of 128.",
    ),
    cautions=(
        "The gradient does the work: a trained random subspace restored refusals as well and "
        "differed by more over-refusal only. Nothing here shows that safety lives in the subspace.",
        "Steps, rate and weights were chosen on models of at most 2 M parameters; they are not "
        "frozen, and no claim is made for real models.",
        "What no keep prompt shows may change: measure the task on other prompts.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class TwoTeachers(Method):
    """Two-teacher distillation in the alignment subspace."""

    name: ClassVar[str] = "two_teachers"
    card: ClassVar[Card] = CARD
    cost_class: ClassVar[CostClass] = "training"
    trains: ClassVar[bool] = True
    paper_vector: ClassVar[VectorKind | None] = "base"
    data: ClassVar[frozenset[Data]] = frozenset({"safe", "keep"})

    rank: int = parameter(8, Integer(1), symbol="k", source="our choice")
    """Singular directions of the alignment vector, on either side."""

    steps: int = parameter(40, Integer(1), source="our choice")
    """Steps of AdamW."""

    learning_rate: float = parameter(2e-3, Real(1e-8, 1.0), source="our choice")
    """Of the first step after warm-up; a cosine takes it down."""

    keep_weight: float = parameter(3.0, Real(0.0, 1e3), source="our choice")
    """Weight of the fine-tune's teaching against the aligned model's."""

    anchor_batch: int = parameter(16, Integer(1), source="our choice")
    """Anchors per step."""

    keep_batch: int = parameter(32, Integer(1), source="our choice")
    """Keep prompts per step."""

    safety_vector: str = parameter(
        "base",
        Choice(("base", "unaligned", "auto")),
        symbol="delta_safe",
        source="our choice",
    )
    """The vector whose subspaces are used: aligned minus base, or aligned minus unaligned."""

    def prepare(self, workbench: Workbench) -> Statistics:
        """Train A and B of every matrix."""
        from realign.repair.methods.two_teachers_training import distil

        made = workbench.cached(
            "two-teachers", {"settings": self.settings()}, lambda: distil(self, workbench)
        )
        tables, facts = tables_of(made)
        return Statistics(tables=tables, facts=facts)

    def training_bytes(self, size: ModelSize) -> int:
        """Model; W_f + E for either teacher with its gradients; what the teachers think."""
        positions = size.batch("safe", self.anchor_batch) + size.batch("keep", self.keep_batch)
        lessons = 4 * size.vocabulary * (size.text("safe").tokens + size.text("keep").tokens)
        return 4 * size.model + 16 * size.edited + size.backward_bytes(positions) + lessons

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = U_k A + B R_k^T."""
        left_ok, right_ki = (statistics.tensor(t, layer.key) for t in ("left", "right"))
        if left_ok is None or right_ki is None:
            return Unchanged("alignment did not touch this tensor")
        place = layer.finetuned.device
        left_ok, right_ki = left_ok.to(place), right_ki.to(place)
        return from_factors(left_ok, right_ki, {"rank": left_ok.shape[1]})
