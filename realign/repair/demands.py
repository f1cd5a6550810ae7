"""What a method says of its preparation before anything is loaded, so that memory is predicted.

Here: which statistics of which model it asks for, and the sizes that a training's memory follows
from. Not here: the prediction (`estimate_prepare`), the preparation (`workbench`, `methods`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

StatisticKind: TypeAlias = Literal["smaller", "inputs", "diagonal", "gradients"]
"""Second moments of every matrix's smaller side, of its inputs, their diagonals, or gradients."""

BLOCK_STATES = 12
"""Hidden states of one position that a decoder block keeps for its backward pass: what norms,
projections and attention read."""

BLOCK_INNER = 4
"""The same of the wider states inside a feed-forward layer."""

LOGIT_COPIES = 5
"""Logits, their logarithms and gradients, as a loss holds them together."""


@dataclass(frozen=True)
class Measurement:
    """One statistic that `prepare` asks the workbench for."""

    role: str
    """The checkpoint that runs."""
    kind: StatisticKind


@dataclass(frozen=True)
class TextSize:
    """Texts of one kind in tokens, about."""

    rows: int
    tokens: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What the memory of a pass or a training follows from.

    Attributes:
        model: entries of the whole model.
        edited: entries of the matrices that are edited.
        rows: their rows together.
        blocks: decoder blocks.
        hidden: width of a hidden state.
        inner: width inside a feed-forward layer.
        vocabulary: rows of the embedding.
        texts: by what they are for; "anchors" where these are answered.
    """

    model: int
    edited: int
    rows: int
    blocks: int
    hidden: int
    inner: int
    vocabulary: int
    texts: Mapping[str, TextSize] = field(default_factory=dict[str, TextSize])

    def block_entries(self) -> int:
        """Entries that one block holds for one position."""
        return BLOCK_STATES * self.hidden + BLOCK_INNER * self.inner

    def backward_bytes(self, positions: int) -> int:
        """What a float32 pass through the whole model holds for its backward pass."""
        entries = self.blocks * self.block_entries() + LOGIT_COPIES * self.vocabulary
        return 4 * positions * entries

    def text(self, data: str) -> TextSize:
        """The texts of one kind; for "safe" the anchors where none are given."""
        nothing = TextSize(0, 0, 0)
        return self.texts.get(
            data, self.texts.get("anchors", nothing) if data == "safe" else nothing
        )

    def batch(self, data: str, count: int) -> int:
        """Padded positions of `count` texts of one kind, or of all where they are fewer."""
        found = self.text(data)
        return min(count, found.rows) * found.longest
