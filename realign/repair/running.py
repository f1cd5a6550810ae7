"""A model in memory with the matrices of a repair at hand, for methods that train it.

Weights are float32 and merged with their adapter. Only what the plan edits takes gradients. Here:
the views, gradients and runs with replaced weights behind `preparation.RunningModel`. Not here:
which checkpoint that is (`workbench`), where a matrix lies (`realign.model.slot_views`), what is
trained (`methods`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.slots import Slot
from realign.model.batching import explained
from realign.model.loading import LoadedModel, load_model
from realign.model.slot_views import SlotViews


class LiveModel:
    """A loaded model with views of its matrices; implements `preparation.RunningModel`."""

    def __init__(self, loaded: LoadedModel, views: SlotViews) -> None:
        """Take a model on its device and the views of it.

        Raises:
            ModelError: a matrix of the plan is not at hand in the model.
        """
        views.require((*views.keys, *views.missing))
        self._loaded, self._views = loaded, views
        loaded.model.requires_grad_(False)
        for parameter in views.parameters().values():
            parameter.requires_grad_(True)

    @property
    def loaded(self) -> LoadedModel:
        """The model, its tokenizer and its device."""
        return self._loaded

    @property
    def keys(self) -> Sequence[str]:
        """The slot keys, in the order of the plan."""
        return self._views.keys

    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that hold these matrices; an optimiser may step them."""
        return list(self._views.parameters().values())

    def weight(self, key: str) -> Tensor:
        """Return the live weight of a slot as a view [d_out, d_in]; writing to it writes to it."""
        return self._views.weight(key)

    def gradient(self, key: str) -> Tensor | None:
        """Return the gradient of that weight as a view [d_out, d_in], if there is one."""
        return self._views.gradient(key)

    def clear_gradients(self) -> None:
        """Free all gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    def clear_other_gradients(self) -> None:
        """Set to zero what of these parameters' gradients belongs to no matrix of the plan."""
        held = sum(parameter.numel() for parameter in self.parameters())
        if held == sum(self.weight(key).numel() for key in self.keys):
            return
        kept: dict[str, Tensor] = {}
        for key in self.keys:
            gradient = self.gradient(key)
            if gradient is not None:
                kept[key] = gradient.clone()
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        for key, gradient in kept.items():
            place = self.gradient(key)
            assert place is not None
            place.copy_(gradient)

    def logits(self, input_ids: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Run the model and return its logits [batch, length, vocabulary].

        No attention mask: attention is causal, so nothing before padding on the right sees it.

        Args:
            input_ids: [batch, length], padded on the right or of one length.
            weights: [d_out, d_in] by slot key, to stand for the model's own in this one call;
                gradients flow through them.
        """
        model: Any = self._loaded.model
        call = {"input_ids": input_ids.to(self._loaded.device), "use_cache": False}
        with explained(self._loaded.name):
            if not weights:
                return model(**call).logits
            replaced = self._views.assemble(weights)
            return torch.func.functional_call(model, replaced, (), call).logits


@contextmanager
def running_model(
    checkpoint: Checkpoint,
    *,
    places: Mapping[str, Slot],
    shapes: Mapping[str, tuple[int, int]],
    device: str | torch.device,
) -> Generator[LiveModel]:
    """Load a checkpoint in float32 with gradients; its memory is freed at the end.

    Args:
        checkpoint: as it is stored; an adapter is merged.
        places: where each matrix lies in it, by slot key.
        shapes: [d_out, d_in] of each.
        device: where it runs.

    Raises:
        ModelError: it cannot be run, or does not hold one of the matrices.
    """
    with load_model(checkpoint, device=device, dtype=torch.float32, merge=True) as loaded:
        yield LiveModel(loaded, SlotViews(loaded.model, places, shapes=shapes))
