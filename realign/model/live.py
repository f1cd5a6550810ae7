"""The stored tensors of a checkpoint inside its running model, as views into its weights.

Here: finding a stored tensor's numbers in the parameters, also where single experts on disk are one
stack in memory. Not here: the renaming rules (`modules`), what is written (repair and tuning).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from realign.checkpoint.slots import Slot, logical_matrix, stored_rows
from realign.model.modules import Home, ModuleFinder


class LiveWeights:
    """Views of one model's weights by the names of its checkpoint."""

    def __init__(self, model: Any) -> None:
        """Take a transformers model, adapters merged."""
        self._finder = ModuleFinder(model)

    def stored(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
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

    def matrix(self, slot: Slot, shape: tuple[int, ...]) -> Tensor | None:
        """The logical matrix of a slot, [d_out, d_in] (or its tensor, where that is no matrix).

        Args:
            slot: the matrix.
            shape: of the stored tensor it lies in.
        """
        whole = self.stored(slot.tensor, shape)
        if whole is None:
            return None
        first, last = stored_rows(slot, shape)
        return logical_matrix(whole[first:last] if shape else whole, slot)


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
