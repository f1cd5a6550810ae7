"""A running model moved through weight space, point by point, and put back exactly.

The weights of every model that takes part are read by the library once (so that fused experts,
renamed modules and merged adapters are as they run) and written to a file each, under the names
they have in memory. A point is made from these files tensor by tensor, in float32, and cast to the
model's dtype; the start is copied from its file again afterwards, never subtracted back. Tied
weights are one tensor, buffers are left alone. Not here: which directions and points, and what is
measured there (`realign.audit.landscape`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from realign.errors import MismatchError, OutputError
from realign.model.loading import LoadedModel

Read = Callable[[str, str], Tensor]
"""(model, tensor) to the stored tensor of that model, in its own dtype."""
Offset = Callable[[str, Read], Tensor]
"""One tensor of a direction, float32, from its name and the stored models."""


@dataclass(frozen=True)
class Point:
    """A place in weight space: a mixture of stored models, plus directions with coefficients.

    Attributes:
        key: names it among the points of a sweep.
        mixture: weight of each stored model; weights of 0 are not read, and a single weight of 1
            gives the very tensors.
        offsets: directions added, each with its coefficient.
    """

    key: str
    mixture: Mapping[str, float]
    offsets: tuple[tuple[float, Offset], ...] = field(default=(), repr=False)


class StoredWeights:
    """The weights of several models of one family, one file each, by their names in memory."""

    def __init__(self, folder: Path) -> None:
        """Take the folder that the files are written to; it exists and is the caller's."""
        self._folder = folder
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._readers: dict[str, Any] = {}

    def add(self, name: str, loaded: LoadedModel) -> None:
        """Write the weights of a running model.

        Raises:
            MismatchError: it does not have the tensors of the models before it.
            OutputError: the file cannot be written.
        """
        own = parameters(loaded)
        shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
        for known, others in self._shapes.items():
            _same_tensors(name, shapes, known=known, others=others)
        path = self._folder / f"{name}.safetensors"
        try:
            save_file({key: tensor.cpu().contiguous() for key, tensor in own.items()}, path)
        except OSError as error:
            raise OutputError(
                f"{path}: cannot be written ({error.strerror})", "check space and permissions"
            ) from error
        self._shapes[name] = shapes
        self._readers[name] = safe_open(path, framework="pt")

    @property
    def names(self) -> tuple[str, ...]:
        """The models, in the order they came."""
        return tuple(self._shapes)

    def read(self, model: str, tensor: str) -> Tensor:
        """One tensor of one model, in its own dtype."""
        return self._readers[model].get_tensor(tensor)

    def weights_at(self, tensor: str, point: Point) -> Tensor:
        """One tensor at a point: float32, or the stored one where the point is a stored model."""
        parts = [(share, name) for name, share in point.mixture.items() if share != 0.0]
        offsets = [(share, of) for share, of in point.offsets if share != 0.0]
        if not offsets and len(parts) == 1 and parts[0][0] == 1.0:
            return self.read(parts[0][1], tensor)
        total = torch.zeros(self._shapes[self.names[0]][tensor])
        for share, name in parts:
            total += share * self.read(name, tensor).float()
        for share, of in offsets:
            total += share * of(tensor, self.read)
        return total


def parameters(loaded: LoadedModel) -> dict[str, Tensor]:
    """The parameters of a running model by name, tied ones once, by the first of their names."""
    model: Any = loaded.model
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def place(loaded: LoadedModel, stored: StoredWeights, point: Point) -> None:
    """Overwrite the weights of a running model with those of a point."""
    with torch.no_grad():
        for name, own in parameters(loaded).items():
            own.copy_(stored.weights_at(name, point))


@contextmanager
def moved(
    loaded: LoadedModel, stored: StoredWeights, *, back_to: str
) -> Generator[Callable[[Point], None]]:
    """Lend a function that moves the model; in the end it is a stored model again, bit for bit.

    Args:
        loaded: the running model.
        stored: the models that points are made of.
        back_to: the stored model that it is left as.
    """
    try:
        yield lambda point: place(loaded, stored, point)
    finally:
        place(loaded, stored, Point("end", {back_to: 1.0}))


def _same_tensors(
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    known: str,
    others: Mapping[str, tuple[int, ...]],
) -> None:
    for tensor in (*others, *shapes):
        one, other = shapes.get(tensor), others.get(tensor)
        if one != other:
            raise MismatchError(
                f"{tensor} is {_words(one)} in the {name} and {_words(other)} in the {known}",
                "a landscape needs models of one architecture, vocabulary and tying of weights",
            )


def _words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
