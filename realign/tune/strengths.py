"""Strengths of a repair by groups of neighbouring layers.

Here: which layers share a strength, and what a point of the search means for each of them. Not
here: where the search looks (`study`), applying strengths (`scaled`, the engine).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from realign.errors import UsageError

Point = tuple[float, ...]
"""One strength per group."""


@dataclass(frozen=True)
class Group:
    """Layers with one strength."""

    name: str
    layers: tuple[int | None, ...]
    """None stands for matrices outside of decoder layers."""


def group_layers(layers: Iterable[int | None], count: int) -> tuple[Group, ...]:
    """Divide the edited layers into groups of neighbours, as equal as possible.

    With more than one group, matrices outside of layers are a group of their own.

    Args:
        layers: of the edited matrices, in any order, with repetitions.
        count: groups of decoder layers.

    Raises:
        UsageError: more groups than layers.
    """
    found = set(layers)
    numbered = sorted(layer for layer in found if layer is not None)
    if count == 1:
        outside: tuple[None, ...] = (None,) if None in found else ()
        return (Group("all layers", (*numbered, *outside)),)
    if count > len(numbered):
        raise UsageError(
            f"--groups {count}: the repair edits {len(numbered)} layers",
            f"ask for at most {max(1, len(numbered))} groups",
        )
    size, rest = divmod(len(numbered), count)
    groups: list[Group] = []
    at = 0
    for index in range(count):
        part = numbered[at : at + size + (index < rest)]
        at += len(part)
        name = f"layer {part[0]}" if len(part) == 1 else f"layers {part[0]}-{part[-1]}"
        groups.append(Group(name, tuple(part)))
    if None in found:
        groups.append(Group("outside of layers", (None,)))
    return tuple(groups)


@dataclass(frozen=True)
class Strengths:
    """A point, layer by layer."""

    by_layer: Mapping[int | None, float]

    @property
    def single(self) -> float | None:
        """The one strength of all layers; None where they differ."""
        values = set(self.by_layer.values())
        return next(iter(values)) if len(values) == 1 else None

    def of(self, layer: int | None) -> float:
        """The strength of a layer."""
        return self.by_layer[layer]


def strengths_at(point: Point, groups: Sequence[Group]) -> Strengths:
    """What a point says of every layer."""
    return Strengths(
        {layer: t for t, group in zip(point, groups, strict=True) for layer in group.layers}
    )
