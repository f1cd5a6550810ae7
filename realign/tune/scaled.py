"""A fine-tune in memory whose repair can be turned up and down, and off again to the bit.

W(t) = W_f + t E, in float32, added once and rounded once, as the engine writes it: a point of the
search is the checkpoint that would be written there. Here: the live weights. Not here: where edits
come from (`edits`), what is measured (`measure`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from realign.checkpoint.slots import slot_shape
from realign.errors import ModelError
from realign.model.live import LiveTensors
from realign.model.loading import LoadedModel
from realign.model.slot_views import SlotViews
from realign.repair.apply import chunk_elements, edit_rows, row_chunks
from realign.repair.edit import Dense, LowRank
from realign.tune.edits import KeptEdit
from realign.tune.strengths import Strengths


class ScaledModel:
    """The fine-tune with t E added; a context manager that gives its weights back."""

    def __init__(self, loaded: LoadedModel, edits: Sequence[KeptEdit]) -> None:
        """Find the edited weights and copy them.

        Args:
            loaded: the fine-tune, adapters merged.
            edits: at strength 1.

        Raises:
            ModelError: a matrix that the running model does not hold.
        """
        self.loaded = loaded
        self._edits = tuple(edits)
        self._views = _views(loaded, self._edits)
        self._copies = [view.clone() for view in self._views]

    def apply(self, strengths: Strengths) -> None:
        """Make the model W_f + t E, whatever it was before."""
        with torch.no_grad():
            for each, view, copy in zip(self._edits, self._views, self._copies, strict=True):
                strength = strengths.of(each.place.layer)
                if strength == 0.0:
                    view.copy_(copy)
                else:
                    _write(view, copy, each.edit, strength=strength)

    def restore(self) -> None:
        """Make the model the fine-tune again, bit for bit."""
        with torch.no_grad():
            for view, copy in zip(self._views, self._copies, strict=True):
                view.copy_(copy)

    def __enter__(self) -> ScaledModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def _views(loaded: LoadedModel, edits: Sequence[KeptEdit]) -> list[Tensor]:
    """The live weight of every edit.

    Raises:
        ModelError: names the first that has none.
    """
    matrices = {each.place.key: each for each in edits if each.matrix}
    found = SlotViews(
        loaded.model,
        {key: each.place for key, each in matrices.items()},
        shapes={key: slot_shape(each.shape, each.place) for key, each in matrices.items()},
    )
    found.require(matrices)
    tensors = LiveTensors(loaded.model)
    views: list[Tensor] = []
    for each in edits:
        if each.matrix:
            views.append(found.weight(each.place.key))
            continue
        whole = tensors.find(each.place.tensor, each.shape)
        if whole is None or not isinstance(each.edit, Dense):
            raise ModelError(
                f"{each.place.tensor} is in no module of {loaded.name} as it runs",
                "choose the strength by hand: realign repair --strength T",
            )
        # Rows beyond those that the checkpoints share are not edited.
        views.append(whole[: each.edit.delta.shape[0]] if each.shape else whole.reshape(1))
    return views


def _write(view: Tensor, finetuned: Tensor, edit: LowRank | Dense, *, strength: float) -> None:
    """The arithmetic of `apply.apply_edit`, without its figures."""
    work = torch.float64 if finetuned.dtype == torch.float64 else torch.float32
    for start, stop in row_chunks(tuple(finetuned.shape), chunk_elements(finetuned)):
        rows = slice(start, stop)
        if strength == 1.0 and isinstance(edit, Dense) and edit.target is not None:
            view[rows] = edit.target[rows].to(device=view.device, dtype=view.dtype)
            continue
        e_ri = edit_rows(edit, rows).to(device=view.device, dtype=work)
        if strength != 1.0:
            e_ri = e_ri * strength
        view[rows] = torch.add(finetuned[rows].to(work), e_ri).to(view.dtype)
