"""Stored tensors of a checkpoint inside its running model, as views into its weights.

Here: whole tensors of any shape, for edits entry by entry. Not here: logical matrices
(`slot_views`), the renaming rules (`modules`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from realign.model.modules import Home, ModuleFinder


class LiveTensors:
    """Views of one model's weights by the names of its checkpoint; writing to one writes to it."""

    def __init__(self, model: Any) -> None:
        """Take a transformers model, adapters merged."""
        self._finder = ModuleFinder(model)

    def find(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """A stored tensor as it stands in memory; None where the model holds none of that shape.

        Args:
            name: of the tensor in the checkpoint.
            shape: as stored.
        """
        home = self._finder.find(name.removesuffix(".weight"))
        if home is None:
            return None
        parameter: Any = getattr(self._finder.module(home), home.parameter, None)
        if not isinstance(parameter, Tensor):
            return None
        return next(
            (view for view in _views(parameter.detach(), home) if tuple(view.shape) == shape), None
        )


def _views(parameter: Tensor, home: Home) -> Iterator[Tensor]:
    """What one stored tensor may be of the parameter that took it."""
    if home.expert is None:
        yield parameter
        return
    expert = parameter[home.expert]
    index, count = home.share or (0, 1)
    # Files that are merged lie one after another along d_out; a class that multiplies from the
    # right keeps that last.
    for stack in (expert, expert.T):
        size = stack.shape[0] // count
        yield stack[index * size : (index + 1) * size]
