"""What a method may ask for before it edits, and what it learns from that.

`Workbench` is what `prepare` is given, `Statistics` what it returns. Here: these contracts, so that
a method can be read and tested without the machinery. Not here: the machinery, which opens files,
runs models and keeps results (`workbench`), and the mathematics (`methods/`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from torch import Tensor, device
from torch.nn import Parameter

from realign.progress import Progress
from realign.repair.edit import Layer

if TYPE_CHECKING:
    from realign.checkpoint.slots import Slot
    from realign.model.chat import EncodedReply
    from realign.model.loading import LoadedModel
    from realign.model.moments import Moments
    from realign.subspace.spectrum import Decomposition

Data: TypeAlias = Literal["safe", "harmful", "task", "keep", "pairs"]
"""Texts that a method may need:

    safe     prompts with refusals (--safe-data); the anchors with the aligned model's own refusals
             where none are given
    harmful  harmful prompts with compliant answers (--harmful-data)
    task     rows of the downstream task (--task-data)
    keep     benign prompts whose answers must stay (--keep-data)
    pairs    prompts with a chosen and a rejected answer (--pairs)
"""

GradientKind: TypeAlias = Literal["mean", "fisher", "snip"]
"""Of the loss on reply tokens, per example: mean g, mean g^2, or mean |W (.) g|."""

Scores: TypeAlias = Mapping[str, Mapping[str, float]]
"""One small record per matrix, by slot key."""

Selection: TypeAlias = frozenset[str]
"""The slot keys that `select` chose."""


class Decomposer(Protocol):
    """Decomposes matrices for several repairs that need the same ones."""

    def decompose(self, matrix: Tensor) -> Decomposition:
        """As `realign.subspace.spectrum.decompose`."""
        ...

    def decompose_batch(self, matrices: Tensor) -> list[Decomposition]:
        """As `realign.subspace.spectrum.decompose_batch`."""
        ...


@dataclass(frozen=True, eq=False)
class Statistics:
    """What `prepare` learned, for `edit`.

    Attributes:
        by_key: activation moments per slot key.
        tables: other tensors, as "fisher": by table name, then by slot key.
        scores: what `select` looks at, per slot key.
        selection: what `select` chose; None where the method does not select.
        facts: of the whole run, for report and manifest ("kept_share", "loss_after", ...).
        provenance: what it was computed from (model digest, prompts, template, options).
        decompositions: where safety vectors are decomposed that other repairs need, too; None:
            this one alone needs them.
        disposable: every look-up gives tensors of its own, which may be overwritten.
    """

    by_key: Mapping[str, Moments] = field(default_factory=dict[str, "Moments"])
    provenance: Mapping[str, str] = field(default_factory=dict[str, str])
    disposable: bool = False
    tables: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict[str, Mapping[str, Tensor]]
    )
    scores: Scores = field(default_factory=dict[str, Mapping[str, float]])
    selection: Selection | None = None
    facts: Mapping[str, float | int | str | None] = field(default_factory=dict[str, Any])
    decompositions: Decomposer | None = None

    def moments(self, key: str) -> Moments | None:
        """Return the moments of the slot `key`, None if none were collected."""
        return self.by_key.get(key)

    def tensor(self, table: str, key: str) -> Tensor | None:
        """Return a tensor of the slot `key`, None if the table has none for it."""
        return self.tables.get(table, {}).get(key)

    def selects(self, key: str) -> bool:
        """Whether the matrix `key` was chosen; every matrix is where nothing was selected."""
        return self.selection is None or key in self.selection


NO_STATISTICS = Statistics()


class RunningModel(Protocol):
    """A model in memory with its edited matrices at hand."""

    @property
    def loaded(self) -> LoadedModel:
        """The model, its tokenizer and its device."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """The slot keys that this model has a weight for, in the order of the plan."""
        ...

    def parameters(self) -> list[Parameter]:
        """Return the parameters that hold these weights; they take gradients, no other does."""
        ...

    def clear_gradients(self) -> None:
        """Free all gradients."""
        ...

    def clear_other_gradients(self) -> None:
        """Set to zero what of these parameters' gradients belongs to no matrix of the plan."""
        ...

    def weight(self, key: str) -> Tensor:
        """Return the live weight of a slot as a view [d_out, d_in]; writing to it writes to it."""
        ...

    def gradient(self, key: str) -> Tensor | None:
        """Return the gradient of that weight as a view [d_out, d_in], if there is one."""
        ...

    def logits(self, input_ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the model and return its logits [batch, length, vocabulary].

        Args:
            input_ids: [batch, length], padded on the right or of one length.
            weights: [d_out, d_in] by slot key, to stand for the model's own in this one call;
                gradients flow through them.
        """
        ...


class Workbench(Protocol):
    """What `prepare` may ask for; the engine implements it."""

    @property
    def seed(self) -> int:
        """Seed of the run."""
        ...

    @property
    def device(self) -> device:
        """Where models run."""
        ...

    @property
    def progress(self) -> Progress:
        """Shows what is being done."""
        ...

    @property
    def slots(self) -> Mapping[str, Slot]:
        """The matrices that are to be edited, by key, in the order of the files."""
        ...

    def layers(self) -> Iterator[Layer]:
        """Read the matrices to edit one after the other, in every checkpoint of the method."""
        ...

    def moments(self, *, role: str, standardize: str, tokens: str) -> Statistics:
        """Return the activation moments of the model `role` on the anchors, for `lssf`.

        Args:
            role: the checkpoint to run, as "aligned".
            standardize: "token" asks for standardised scatter matrices, else plain moments.
            tokens: "response", "prompt" or "all": the positions that count.
        """
        ...

    def input_moments(
        self,
        *,
        role: str,
        data: Data,
        tokens: str,
        diagonal: bool = False,
        limit: int | None = None,
        length: int | None = None,
    ) -> Statistics:
        """Return the moments of what every matrix is fed in the model `role`.

        Args:
            role: the checkpoint to run.
            data: the texts, teacher-forced.
            tokens: the positions that count.
            diagonal: only n, s1 and the diagonal of S2, as a vector.
            limit: only this many texts, the first ones.
            length: only this many tokens of each text, prompt and reply together, the first ones.
        """
        ...

    def gradients(
        self, *, role: str, data: Data, kind: GradientKind, limit: int | None = None
    ) -> Mapping[str, Tensor]:
        """Return a gradient statistic [d_out, d_in], float32, of every matrix, by slot key.

        Args:
            role: the checkpoint to run.
            data: the texts; the loss is the mean over reply tokens of each one.
            kind: what is averaged over examples.
            limit: only this many examples.
        """
        ...

    def examples(self, data: Data, *, role: str) -> Sequence[EncodedReply]:
        """Return texts as tokens, in the chat template of the model `role`, in a fixed order.

        Where rows of "keep" or "task" have no reply, the model `role` answers them greedily.
        """
        ...

    def prompts(self, data: Data | Literal["anchors"], *, role: str) -> Sequence[tuple[int, ...]]:
        """Return prompts alone as tokens, ready for the assistant to speak."""
        ...

    def pairs(self, *, role: str) -> Sequence[tuple[EncodedReply, EncodedReply]]:
        """Return (chosen, rejected) as tokens, in the chat template of the model `role`."""
        ...

    def withheld(self) -> Collection[str]:
        """Return words that no prompt may contain which a model writes for this run.

        They are what the harmful and safe suites that are audited in the same run ask about: their
        words, but for those of the anchors and texts that were given.
        """
        ...

    def running(self, role: str) -> AbstractContextManager[RunningModel]:
        """Load a model in float32 with gradients; its memory is freed at the end."""
        ...

    def cached(
        self, name: str, about: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """Return tensors by name from the cache, or make and keep them.

        Args:
            name: what they are, as "somf-mask".
            about: what they depend on beside the checkpoints of the run, texts and seed, which the
                workbench adds.
            make: computes them.
        """
        ...
