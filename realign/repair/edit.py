"""What goes into a repair method for one logical matrix, and what comes out of it.

Here: `Layer` (the tensors of one matrix in all checkpoints) and the three kinds of edit. Not here:
how an edit reaches a file (the engine) or how it is computed (the methods).

Facts. An edit carries what the report prints about it, under these keys; a method leaves out what
it does not have.

    rank              directions kept, r or k
    available_rank    directions that carry energy in the spectrum the rank was taken from
    entropy           H_n of that spectrum, natural logarithm
    effective_rank    exp(H_n)
    stable_rank       sum sigma^2 / sigma_1^2
    kept_energy       share of the spectrum's energy in the kept directions
    projected_safety  norm(P' delta_safe) / norm(delta_safe), before the factor alpha
    projected_task    norm(P delta_task) / norm(delta_task), the part of the task vector inside the
                      kept subspace; for `replace` norm(E) / norm(delta_task)
    tokens            token positions behind the activation statistics
    tokens_per_output tokens / d_out; below 1 the rank is limited by the anchors
    degenerate_cut    True: sigma_r and sigma_r+1 coincide, the kept subspace is not unique
    r_align, r_ft     share of the norm of W_aligned - W_base, and of W_finetuned - W_base, in the
                      kept output directions (LoX, arXiv 2506.15606)
    cosine            of the task vector with its image under the alignment filter (Safe LoRA)
    chance_cosine     that cosine for an update unrelated to alignment
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor

from realign.subspace.vectors import difference

VectorKind: TypeAlias = Literal["base", "unaligned"]
Facts: TypeAlias = Mapping[str, float | int | str | None]


def _no_facts() -> Facts:
    return {}


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """A task vector in factors: delta_task = scale * up @ down, before any rounding.

    Attributes:
        down: A_l [r, d_in].
        up: B_l [d_out, r].
        scale: s = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA).
    """

    down: Tensor
    up: Tensor
    scale: float

    def product(self) -> Tensor:
        """Return s B A [d_out, d_in] in float32."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One logical matrix [d_out, d_in] in every checkpoint, in the dtype it has on disk.

    Element-wise methods also get tensors of other shapes, and chunks of rows.

    Attributes:
        key: the slot's key; unique within a checkpoint.
        module: last module name, as "q_proj".
        layer: index of the decoder block, None outside blocks.
        finetuned: Wf, the weight to repair.
        aligned: Wa, the parent of the fine-tune.
        base: W0, the weight before alignment.
        unaligned: Wu, the aligned weight after a deliberate un-alignment.
        safety: Ws, the aligned weight after a fine-tune on safe data.
        reference: We, a weight whose safety is stronger than the aligned one's.
        also: the weights of other fine-tunes that are fused with this one.
        lora: the factors of the fine-tune, where it is a LoRA adapter over the aligned weights.
        safety_lora: the factors of Ws, where that is one.
        reference_lora: the factors of the reference, where it is a LoRA adapter.
        seed: of the run; randomised methods draw with `realign.subspace.keyed`.
        start: entries of the tensor before this chunk, in row-major order.
    """

    key: str
    module: str
    layer: int | None
    finetuned: Tensor
    aligned: Tensor | None = None
    base: Tensor | None = None
    unaligned: Tensor | None = None
    safety: Tensor | None = None
    reference: Tensor | None = None
    also: tuple[Tensor, ...] = ()
    lora: LoraFactors | None = None
    safety_lora: LoraFactors | None = None
    reference_lora: LoraFactors | None = None
    seed: int = 0
    start: int = 0

    def task_vector(self) -> Tensor:
        """Return delta_task = Wf - Wa, a new float32 (float64 for float64 inputs) tensor."""
        return difference(self.finetuned, self.require("aligned"))

    def safety_vector(self, kind: VectorKind) -> Tensor:
        """Return delta_safe: Wa - W0 for "base", Wa - Wu for "unaligned"; new, float32 or 64."""
        return difference(self.require("aligned"), self.require(kind))

    def require(
        self, role: Literal["aligned", "base", "unaligned", "safety", "reference"]
    ) -> Tensor:
        """Return the tensor of `role`; the plan has made sure that it is there."""
        tensor: Tensor | None = getattr(self, role)
        assert tensor is not None, f"{self.key}: the method needs the {role} weight"
        return tensor


@dataclass(frozen=True)
class Unchanged:
    """W' = Wf, and why."""

    reason: str


@dataclass(frozen=True, eq=False)
class LowRank:
    """E = left @ right, with rank r such that r (d_out + d_in) < d_out d_in.

    Attributes:
        left: [d_out, r].
        right: [r, d_in].
        facts: for the report; see the module's docstring.
    """

    left: Tensor
    right: Tensor
    facts: Facts = field(default_factory=_no_facts)

    @property
    def rank(self) -> int:
        """Number of columns of `left`."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """Return E [d_out, d_in]."""
        return self.left @ self.right


@dataclass(frozen=True, eq=False)
class Dense:
    """E as a full tensor.

    Attributes:
        delta: E, in the shape of Wf.
        target: W' itself where it exists exactly (an aligned weight put back); used as it is at
            strength 1, so that no rounding of Wf + E creeps in.
        facts: for the report; see the module's docstring.
    """

    delta: Tensor
    target: Tensor | None = None
    facts: Facts = field(default_factory=_no_facts)

    def dense(self) -> Tensor:
        """Return E."""
        return self.delta


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What an element-wise method says of all its edits at once: E = factor (W_aligned - W_minus).

    Attributes:
        factor: of the whole difference, above 0.
        minus: role of the checkpoint that is subtracted.
        zero: why a tensor is unchanged where the difference is zero.
        exact: W' is W_aligned itself at strength 1; see `Dense.target`.
    """

    factor: float
    minus: str
    zero: str
    exact: bool = False


Edit: TypeAlias = Unchanged | LowRank | Dense


def from_factors(left: Tensor, right: Tensor, facts: Facts) -> LowRank | Dense:
    """Return the cheaper form of E = left @ right: factors only while they are the smaller ones."""
    (d_out, rank), d_in = left.shape, right.shape[1]
    if rank * (d_out + d_in) < d_out * d_in:
        return LowRank(left, right, facts)
    return Dense(left @ right, facts=facts)
