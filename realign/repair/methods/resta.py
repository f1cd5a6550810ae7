"""RESTA: add the whole safety vector, by task arithmetic (arXiv 2402.11746), perhaps with DARE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from realign.repair.edit import Dense, Difference, Edit, Layer, Unchanged, VectorKind
from realign.repair.method import Card, Method, Scope
from realign.repair.parameters import Choice, Real, parameter
from realign.repair.preparation import Statistics
from realign.subspace.dare import kept_entries, rescale_kept

CARD = Card(
    title="RESTA: restoring safety by task arithmetic",
    source="Bhardwaj et al., arXiv 2402.11746, ACL 2024; DARE: Yu et al., arXiv 2311.03099",
    summary="add a multiple of the whole safety vector",
    idea="What un-alignment took away, seen as a direction in weight space, is added back. The "
    "baseline that every filtered form of the same vector has to beat. With DARE random entries "
    "of a difference are dropped and the others enlarged, which leaves its mean where it was.",
    equations="""\
delta_safe = W_aligned - W_unaligned;  delta_task = W_finetuned - W_aligned
DARE_p(D) = (k (.) D) / (1 - p),  k_ij drawn from Bernoulli(1 - p)
dare = none:    W' = W_finetuned + gamma delta_safe
dare = task:    W' = W_aligned + DARE_p(delta_task) + gamma delta_safe
dare = safety:  W' = W_finetuned + gamma DARE_p(delta_safe)""",
    inputs="fine-tuned, aligned, unaligned (or base); no data",
    touches="every parameter; buffers are copied",
    edit_kind="dense",
    cost="reading three checkpoints and writing one",
    deviations=(
        "gamma and p are not confirmed by the paper's text at hand; 0.5 is a public baseline's "
        "value of gamma, 0.3 our p.",
        "Whether the paper drops entries of the task or of the safety vector is told both ways: "
        "both are offered, and DARE is off by default.",
        "Which entries are dropped depends on the seed and on the names of tensors in the "
        "fine-tune's files, not on shards, chunks or threads. A fused and a split layout of one "
        "model have other names, and so other draws.",
    ),
    defects=(
        "A difference of weights is added, not gamma times the A and B tensors of a safe adapter.",
        "DARE on the safety vector is an option under its own name, not passed off as the paper's; "
        "aligned - base is said to be a deviation where it is used.",
        "Buffers such as rotary_emb.inv_freq in old files do not break the pairing of names.",
    ),
    cautions=(
        "The full vector carries general ability, chat format and length as well as safety: with "
        "`base` most of it is not about safety. Watch over-refusal and the task.",
        "Linear in gamma and not idempotent: running it twice adds twice.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Resta(Method):
    """Task arithmetic with the safety vector."""

    name: ClassVar[str] = "resta"
    card: ClassVar[Card] = CARD
    paper_vector: ClassVar[VectorKind | None] = "unaligned"
    elementwise: ClassVar[bool] = True
    default_scope: ClassVar[Scope] = "all"

    gamma: float = parameter(
        0.5, Real(0.0), symbol="gamma", source="a public baseline; 0.3 to 1.0 elsewhere"
    )
    """How much of the safety vector is added; the same as the strength t."""

    dare: str = parameter(
        "none",
        Choice(("none", "task", "safety")),
        source="`task` as the paper is told, `safety` as a library has it; off is our choice",
    )
    """Which difference loses random entries: neither, the task vector, or the safety vector."""

    drop_rate: float = parameter(
        0.3, Real(0.0, 0.99), symbol="p", source="our choice; sweep 0.3 to 0.9; read with DARE only"
    )
    """The chance of an entry to be dropped."""

    safety_vector: str = parameter(
        "auto",
        Choice(("auto", "unaligned", "base")),
        symbol="delta_safe",
        source="the paper takes `unaligned`",
    )
    """Aligned minus unaligned or aligned minus base; `auto` takes the paper's if it was given."""

    @property
    def drops(self) -> str:
        """Which difference loses entries, with a rate of 0 taken for what it is."""
        return self.dare if self.drop_rate > 0.0 else "none"

    def linear_edit(self) -> Difference | None:
        """Return gamma delta_safe, where nothing is drawn."""
        kind = self.vector_kind
        if kind is None or self.gamma == 0.0 or self.drops != "none":
            return None
        return Difference(factor=self.gamma, minus=kind, zero="safety vector is zero")

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return E, in the shape of the tensor or chunk."""
        if self.drops == "task":
            return self._thinned_task(layer)
        if self.gamma == 0.0:
            return Unchanged("gamma is 0")
        delta_safe = self._safety(layer)
        if not bool(delta_safe.any()):
            return Unchanged("safety vector is zero")
        if self.drops == "safety":
            delta_safe = self._dare(delta_safe, layer)
        return Dense(delta_safe.mul_(self.gamma))

    def _thinned_task(self, layer: Layer) -> Edit:
        """E = DARE_p(delta_task) - delta_task + gamma delta_safe."""
        task = layer.task_vector()
        edit = self._dare(task, layer).sub_(task)
        if self.gamma > 0.0:
            edit.add_(self._safety(layer), alpha=self.gamma)
        if not bool(edit.any()):
            return Unchanged("task and safety vector are zero")
        return Dense(edit)

    def _safety(self, layer: Layer) -> Tensor:
        kind = self.vector_kind
        assert kind is not None
        return layer.safety_vector(kind)

    def _dare(self, delta: Tensor, layer: Layer) -> Tensor:
        kept = kept_entries(
            delta,
            self.drop_rate,
            seed=layer.seed,
            method=self.name,
            key=layer.key,
            role=self.drops,
            start=layer.start,
        )
        return rescale_kept(delta, kept, self.drop_rate)
