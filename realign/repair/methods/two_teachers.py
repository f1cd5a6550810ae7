"""Two teachers: a low-rank edit in the alignment subspace, distilled from both parents.

Our own method: the aligned model teaches refusals, the fine-tune everything else. Which texts is
in `two_teachers_texts`, the training in `two_teachers_training`. Shape suffixes: o is d_out, i is
d_in, k the directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from realign.repair.demands import ModelSize
from realign.repair.edit import Edit, Layer, Unchanged, VectorKind, from_factors
from realign.repair.kept_tensors import tables_of
from realign.repair.method import Card, CostClass, Method, Role
from realign.repair.parameters import Choice, Integer, Real, parameter
from realign.repair.preparation import Data, Statistics, Workbench

CARD = Card(
    title="Two-teacher distillation in the alignment subspace",
    source="ours; nothing is published. Prompts written by a model: Xu et al., arXiv 2406.08464",
    summary="train a low-rank edit: the aligned model teaches refusals, the fine-tune the rest",
    idea="Both parents are at hand, so nothing needs labels. The edit may move each matrix only "
    "along the leading directions that alignment wrote or read. Within them it is trained to give "
    "the aligned model's answers where that refuses, and the fine-tune's own answers everywhere "
    "else: on prompts of its task, on these with one token exchanged, and on prompts that a parent "
    "writes itself. Of the latter the aligned model teaches those that either of the two refuses, "
    "so that a fine-tune that refuses too much is mended, too.",
    equations="""\
delta_safe = W_aligned - W_base = U S R^T;  U_k, R_k: leading k singular vectors, frozen
E = U_k A + B R_k^T;  A [k, d_in] and B [d_out, k] start at 0
P: prompts sampled from the author after the template's opening of a user's turn
H = anchors + {p in P: the aligned model or the fine-tune refuses p}
K = task + task with one token exchanged + {p in P: neither refuses p}
loss = mean KL(p_aligned || p_W') on the tokens of the aligned model's replies to H
     + keep_weight mean KL(p_finetuned || p_W') on the tokens of the fine-tune's replies to K
W' = W_finetuned + E""",
    inputs="fine-tuned, aligned, base (or unaligned); anchors (or --safe-data) and --task-data: "
    "prompts of the fine-tune's task, whose replies it gives itself (responses in the file are not "
    "used)",
    touches="weights of linear layers in decoder blocks",
    edit_kind="low-rank of rank at most 2k; dense where that is not smaller",
    cost="one decomposition per matrix; replies of both teachers to all prompts; then a training "
    "of k (d_out + d_in) numbers per matrix with the fine-tune in float32, three passes per step. "
    "The aligned model's distributions are kept: 4 bytes x vocabulary per token of its refusals",
    deviations=(
        "Refusals are told by the keyword judge of the audit.",
        "A prompt that a model wrote is thrown away where it contains a word that the harmful and "
        "safe suites of the same run ask about and no text that was given does, so that nothing is "
        "trained on what is measured.",
        "Without written prompts (self_prompts 0) nothing shows the general abilities that no task "
        "prompt asks for; what that costs in the laboratory stands in docs/two-teachers.md.",
    ),
    cautions=(
        "The gradient does the work: a trained random subspace restored refusals as well and "
        "differed by more over-refusal only. Nothing here shows that safety lives in the subspace.",
        "Steps, rate and weights were chosen on laboratory models of 0.7 M parameters; no claim is "
        "made for real models.",
        "An author without a trained chat template writes nonsense: let the aligned model write.",
        "What no prompt shows may change: measure the task on other prompts.",
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
    data: ClassVar[frozenset[Data]] = frozenset({"safe", "task"})

    rank: int = parameter(8, Integer(1), symbol="k", source="our choice")
    """Singular directions of the alignment vector, on either side."""

    steps: int = parameter(160, Integer(1), source="our choice")
    """Steps of AdamW."""

    learning_rate: float = parameter(1e-3, Real(1e-8, 1.0), source="our choice")
    """Of the first step; a cosine takes it down."""

    keep_weight: float = parameter(5.0, Real(0.0, 1e3), source="our choice")
    """Weight of the fine-tune's teaching against the aligned model's."""

    self_prompts: int = parameter(1024, Integer(0), source="our choice")
    """Prompts that a parent writes itself."""

    author: str = parameter("aligned", Choice(("aligned", "base")), source="our choice")
    """Who writes them."""

    anchor_batch: int = parameter(24, Integer(1), source="our choice")
    """Refusals per step."""

    keep_batch: int = parameter(64, Integer(1), source="our choice")
    """Other texts per step."""

    safety_vector: str = parameter(
        "base",
        Choice(("base", "unaligned", "auto")),
        symbol="delta_safe",
        source="our choice",
    )
    """The vector whose subspaces are used: aligned minus base, or aligned minus unaligned."""

    def required_roles(self) -> frozenset[Role]:
        """Those of the vector, and the author of prompts."""
        author: frozenset[Role] = frozenset({cast(Role, self.author)})
        return super().required_roles() | author if self.self_prompts else super().required_roles()

    def prepare(self, workbench: Workbench) -> Statistics:
        """Train A and B of every matrix."""
        from realign.repair.methods.two_teachers_training import distil

        about = {"settings": self.settings(), "withheld": sorted(workbench.withheld())}
        made = workbench.cached("two-teachers", about, lambda: distil(self, workbench))
        tables, facts = tables_of(made)
        return Statistics(tables=tables, facts=facts)

    def training_bytes(self, size: ModelSize) -> int:
        """Model; W_f + E for either teacher with its gradients; what the aligned model thinks."""
        safe = size.text("safe")
        longest = max(safe.longest, size.text("task").longest)
        positions = (self.anchor_batch + 2 * self.keep_batch) * longest
        # Of the prompts that a model writes at most half are taken to be refused.
        refused = safe.tokens + self.self_prompts * safe.tokens // (2 * max(1, safe.rows))
        lessons = 4 * size.vocabulary * refused
        return 4 * size.model + 16 * size.edited + size.backward_bytes(positions) + lessons

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E = U_k A + B R_k^T."""
        left_ok, right_ki = (statistics.tensor(t, layer.key) for t in ("left", "right"))
        if left_ok is None or right_ki is None:
            return Unchanged("alignment did not touch this tensor")
        place = layer.finetuned.device
        left_ok, right_ki = left_ok.to(place), right_ki.to(place)
        return from_factors(left_ok, right_ki, {"rank": left_ok.shape[1]})
