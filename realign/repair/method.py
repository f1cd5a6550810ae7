"""What a repair method is: a frozen dataclass of hyper-parameters with up to three functions.

    prepare(workbench) -> Statistics     optional; the only step that may run a model
    select(scores) -> Selection          optional; the only step that looks across matrices
    edit(layer, statistics) -> Edit      pure; one logical matrix in, one edit out

Here: the base class, the card, and the settling of what is not given. Not here: what travels
between the steps (`preparation`), the mathematics (`methods/`), names and entry points
(`registry`), files, memory and devices (the engine).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

from realign.errors import UsageError
from realign.repair.demands import Measurement, ModelSize
from realign.repair.edit import Difference, Edit, Layer, VectorKind
from realign.repair.parameters import Parameter, parameters_of
from realign.repair.preparation import NO_STATISTICS, Data, Scores, Selection, Statistics, Workbench

Role: TypeAlias = Literal["aligned", "base", "unaligned", "safety", "reference"]
CostClass: TypeAlias = Literal["reading", "decomposition", "forward", "gradients", "training"]
"""What a run costs beside reading and writing: nothing, one decomposition per matrix, forward
passes, backward passes, or a training."""
Scope: TypeAlias = Literal["block_linear", "matrices", "all"]
M = TypeVar("M", bound="Method")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a reader should know before using a method.

    Attributes:
        title: the method's name in words.
        source: authors, arXiv id, venue; or that it is ours.
        summary: one line, for tables.
        idea: a short paragraph.
        equations: plain text, one equation a line, with the paper's numbers.
        inputs: checkpoints and data.
        touches: tensors that may change.
        edit_kind: "low-rank", "dense" or both, with the reason.
        cost: what one run costs.
        deviations: where we differ from the source, or had to choose.
        cautions: limits, and what to measure beside refusal.
        defects: known errors of public code that we avoid, one sentence each.
    """

    title: str
    source: str
    summary: str
    idea: str
    equations: str
    inputs: str
    touches: str
    edit_kind: str
    cost: str
    deviations: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    defects: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A repair method; subclasses are frozen, keyword-only dataclasses of hyper-parameters.

    Class attributes:
        name: as on the command line.
        card: for help and documentation.
        needs: checkpoints needed beside the fine-tune, without the safety vector's second one.
        paper_vector: the method's own safety vector; None if it uses none.
        needs_anchors: whether `prepare` runs a model over the anchor prompts.
        data: texts that `prepare` can ask for with some settings (`required_data`: with these);
            "safe" falls back on the anchors.
        cost_class: see `CostClass`.
        trains: whether `prepare` holds a model in memory as a whole, to train with it.
        fuses: whether it takes other fine-tunes beside the one to repair.
        elementwise: whether `edit` accepts any shape and any chunk of rows.
        default_scope: tensors edited unless the user says otherwise.
        max_strength: largest strength t at which the method is still itself.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    needs: ClassVar[frozenset[Role]] = frozenset({"aligned"})
    paper_vector: ClassVar[VectorKind | None] = None
    needs_anchors: ClassVar[bool] = False
    data: ClassVar[frozenset[Data]] = frozenset()
    cost_class: ClassVar[CostClass] = "reading"
    trains: ClassVar[bool] = False
    fuses: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    default_scope: ClassVar[Scope] = "block_linear"
    max_strength: ClassVar[float] = float("inf")

    def __post_init__(self) -> None:
        self.validate()

    @classmethod
    def parameters(cls) -> tuple[Parameter, ...]:
        """Return the hyper-parameters with their defaults, domains and descriptions."""
        return parameters_of(cls)

    def settings(self) -> dict[str, Any]:
        """Return the hyper-parameters of this instance by name, for plan and manifest."""
        return {each.name: getattr(self, each.name) for each in self.parameters()}

    def validate(self) -> None:
        """Check every hyper-parameter.

        Raises:
            UsageError: names the parameter, its value and the legal range.
        """
        for each in self.parameters():
            value = getattr(self, each.name)
            if not each.domain.admits(value):
                raise out_of_range(self.name, each, value)

    def validate_strength(self, strength: float) -> None:
        """Check the universal dial t of W(t) = Wf + t (W' - Wf).

        Raises:
            UsageError: t is negative or above the method's `max_strength`.
        """
        if not 0.0 <= strength <= self.max_strength or strength == float("inf"):
            bound = "any number >= 0"
            if self.max_strength < float("inf"):
                bound = f"a number in [0, {self.max_strength:g}]"
            raise UsageError(
                f"strength = {strength:g} is out of range for {self.name}", f"give {bound}"
            )

    @property
    def vector_kind(self) -> VectorKind | None:
        """The safety vector in use, settled; None if the method uses none."""
        if self.paper_vector is None:
            return None
        kind: str = getattr(self, "safety_vector", self.paper_vector)
        assert kind != "auto", f"{self.name}: call settle_safety_vector before editing"
        return "base" if kind == "base" else "unaligned"

    def required_roles(self) -> frozenset[Role]:
        """Return every checkpoint that `edit` reads, once the safety vector is settled."""
        kind = self.vector_kind
        if kind is None:
            return self.needs
        extra: frozenset[Role] = frozenset({kind})
        return self.needs | extra

    @property
    def subject_is_aligned(self) -> bool:
        """Whether what is edited is the aligned model itself, before any fine-tune."""
        return False

    def must_differ(self) -> tuple[tuple[Role, Role], ...]:
        """Return pairs of roles that leave nothing to do where they hold the same weights.

        Beside the safety vector's two, and the fine-tune and the aligned model.
        """
        return ()

    def check_settings(self) -> None:
        """Refuse settings under which a run is pointless; asked by the plan, not by `edit`.

        As a mask that keeps everything: legal in the equations, and a mistake in a command.

        Raises:
            UsageError: names the parameter and what to give.
        """
        return None

    def target_modules(self, given: Given) -> frozenset[str] | None:
        """Return the kinds of modules edited unless the user names some; None: all.

        Names are those of the Llama family: see `realign.repair.subset`.
        """
        return None

    def fixed_rank(self) -> tuple[str, int] | None:
        """Return the parameter that fixes how many directions are kept, and its value."""
        for name in ("rank", "k", "rank_rule"):
            value: object = getattr(self, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return name, value
        return None

    def fixed_count(self) -> tuple[str, int] | None:
        """Return the parameter that fixes how many matrices are selected, and its value."""
        return None

    def settled(self, given: Given) -> Settled:
        """Decide every setting that is "auto" by what was given, once for the whole run.

        Raises:
            UsageError: something the method cannot do without is missing; names the option.
        """
        return settle_safety_vector(self, given.roles)

    def prepare(self, workbench: Workbench) -> Statistics:
        """Collect what `edit` needs beside the weights; most methods need nothing."""
        return NO_STATISTICS

    def required_data(self) -> frozenset[Data]:
        """Return the texts that `prepare` asks for with these settings."""
        return self.data

    def prepares(self) -> bool:
        """Whether `prepare` does anything."""
        return type(self).prepare is not Method.prepare

    def reads_weights_only(self) -> bool:
        """Whether `prepare` asks its workbench for layers alone and runs no model."""
        runs = self.cost_class in {"forward", "gradients", "training"}
        return not (runs or self.needs_anchors or self.required_data())

    def select(self, scores: Scores) -> Selection | None:
        """Choose matrices by the scores that `prepare` left, before any is edited; None: all."""
        return None

    def edit_batch(self, layers: Sequence[Layer], statistics: Statistics) -> list[Edit]:
        """Return the edits of several matrices of one shape, each what `edit` returns.

        Asked on accelerators, where one call for many small matrices is faster than many calls.
        """
        return [self.edit(layer, statistics) for layer in layers]

    def edit_bytes(self, d_out: int, d_in: int) -> int | None:
        """Return what `edit` holds at most beside the matrix as stored and its result, in bytes.

        None: what the decomposition of a matrix of this shape takes.
        """
        return None

    def measures(self) -> tuple[Measurement, ...]:
        """Return the statistics that `prepare` asks for, so that their memory is predicted."""
        return ()

    def training_bytes(self, size: ModelSize) -> int:
        """Return what `prepare` holds where it trains (`trains`), activations included."""
        return 0

    def linear_edit(self) -> Difference | None:
        """Return what `edit` computes as one difference of checkpoints, where it is one.

        Only asked of element-wise methods; saves most of their time. It must say what `edit` does,
        which stays the definition.
        """
        return None

    @abstractmethod
    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        """Return the edit of one logical matrix; pure, and deterministic on one machine."""


@dataclass(frozen=True)
class Given:
    """What the user gave, for a method that has to make do with it."""

    roles: frozenset[str]
    """Of the checkpoints beside the fine-tune."""
    adapter: bool = False
    """The fine-tune is a LoRA adapter whose factors are at hand."""
    reference_adapter: bool = False
    """So is the reference."""
    data: frozenset[str] = frozenset()
    """Of the texts."""


@dataclass(frozen=True)
class Settled:
    """A method whose settings are decided, and the line to print if that is a deviation."""

    method: Method
    note: str


def settle_safety_vector(method: Method, available: Collection[str]) -> Settled:
    """Decide `safety_vector: auto` once for the whole run.

    "auto" takes the definition of the method's own paper if that checkpoint was given, otherwise
    the other one, and says so.

    Args:
        method: any method.
        available: the roles that were given.

    Raises:
        UsageError: no given checkpoint makes the vector.
    """
    paper = method.paper_vector
    if paper is None:
        return Settled(method, "")
    formula = {"base": "aligned - base", "unaligned": "aligned - unaligned"}
    asked: str = getattr(method, "safety_vector", paper)
    if asked != "auto":
        if asked not in available:
            other = "unaligned" if asked == "base" else "base"
            hint = f"give it with --{asked}"
            if other in available:
                hint += f", or use --set safety_vector={other}"
            raise UsageError(
                f"{method.name} with safety_vector = {asked} needs the {asked} model", hint
            )
        kind = asked
    else:
        other: VectorKind = "unaligned" if paper == "base" else "base"
        given = [kind for kind in (paper, other) if kind in available]
        if not given:
            raise UsageError(
                f"{method.name} needs a safety vector: aligned - base or aligned - unaligned",
                "give the model before alignment with --base, or an un-aligned one with "
                "--unaligned",
            )
        kind = given[0]
    note = ""
    if kind != paper:
        note = (
            f"deviation: {method.name} is defined with {formula[paper]}, "
            f"this run uses {formula[kind]}"
        )
    return Settled(with_settings(method, safety_vector=kind), note)


def with_settings(method: M, **settings: Any) -> M:
    """Return a copy of `method` with other hyper-parameters, validated."""
    return dataclasses.replace(method, **settings)


def out_of_range(method: str, spec: Parameter, value: object) -> UsageError:
    """Make the error for an illegal value of a hyper-parameter."""
    return UsageError(
        f"{spec.name} = {value} is out of range for {method}",
        f"{spec.name} must be {spec.domain.describe()} (default {spec.default})",
    )
