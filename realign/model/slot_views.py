"""Logical matrices as views of a running model's parameters, and parameters put together from them.

A logical matrix [d_out, d_in] is a parameter, a block of its rows, one expert of a stack, any of
them perhaps transposed, and the file may have stored it in another form than the model holds. Here:
which part of which parameter it is. Not here: which module that is (`modules`), running a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from realign.checkpoint.slots import Slot
from realign.errors import ModelError
from realign.model.modules import Home, ModuleFinder
from realign.model.moments_experts import share_rows

_STACKED = ((), ("MergeModulelist",), ("MergeModulelist", "Concatenate"))


@dataclass(frozen=True)
class SlotView:
    """One logical matrix inside a parameter."""

    parameter: str
    """The parameter's full name in the running model."""
    expert: int | None = None
    """Index on the first dimension of a stack of three dimensions."""
    span: tuple[int, int] | None = None
    """Half-open range on the first dimension, where experts are piled along it in two."""
    transposed: bool = False
    """Held as [d_in, d_out]."""
    rows: tuple[int, int] | None = None
    """Half-open block of rows of the logical matrix; None: all of it."""

    @property
    def unit(self) -> tuple[int | None, tuple[int, int] | None]:
        """What tells the matrices of one parameter apart, row blocks aside."""
        return self.expert, self.span

    def of(self, tensor: Tensor) -> Tensor:
        """The view [d_out, d_in] of a tensor in the shape of the parameter."""
        matrix = self.whole(tensor)
        return matrix if self.rows is None else matrix[slice(*self.rows)]

    def whole(self, tensor: Tensor) -> Tensor:
        """The view of the matrix of which this is a block of rows."""
        if self.expert is not None:
            tensor = tensor[self.expert]
        elif self.span is not None:
            tensor = tensor[slice(*self.span)]
        return tensor.T if self.transposed else tensor


class SlotViews:
    """The views of one model, by slot key."""

    def __init__(
        self, model: Any, places: Mapping[str, Slot], *, shapes: Mapping[str, tuple[int, int]]
    ) -> None:
        """Find every matrix.

        Args:
            model: a transformers model; of an adapter, with the adapter merged.
            places: where each logical matrix lies in the checkpoint as stored (`layouts.locate`).
            shapes: [d_out, d_in] of each.
        """
        self._model = model
        found: dict[str, SlotView] = {}
        missing: dict[str, str] = {}
        finder = ModuleFinder(model)
        for key, place in places.items():
            view = _view(finder, place)
            if isinstance(view, SlotView):
                view, reason = _checked(model, view, shapes[key])
            else:
                view, reason = None, view
            if view is None:
                missing[key] = reason
            else:
                found[key] = view
        self.views: Mapping[str, SlotView] = MappingProxyType(found)
        self.missing: Mapping[str, str] = MappingProxyType(missing)
        """Keys without a view, and why."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that were found, in the order given."""
        return tuple(self.views)

    def require(self, keys: Iterable[str]) -> None:
        """Check that matrices have a view.

        Raises:
            ModelError: names the first that has none, and why.
        """
        for key in keys:
            if key not in self.views:
                reason = self.missing.get(key, "it was not looked for")
                raise ModelError(
                    f"{key} is not at hand in the running model: {reason}",
                    "leave it out with --modules or --layers, or use a method that runs no model",
                )

    def parameters(self, keys: Iterable[str] | None = None) -> dict[str, torch.nn.Parameter]:
        """The parameters that hold these matrices (None: all), by full name."""
        names = [self.views[key].parameter for key in (self.keys if keys is None else keys)]
        return {name: self._model.get_parameter(name) for name in dict.fromkeys(names)}

    def weight(self, key: str) -> Tensor:
        """The live weight [d_out, d_in]; writing to it writes to the model."""
        view = self.views[key]
        return view.of(self._model.get_parameter(view.parameter).data)

    def gradient(self, key: str) -> Tensor | None:
        """The gradient of that weight as a view [d_out, d_in]; None where there is none."""
        view = self.views[key]
        gradient: Tensor | None = self._model.get_parameter(view.parameter).grad
        return None if gradient is None else view.of(gradient)

    def assemble(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole parameters in which some matrices are replaced, for `torch.func.functional_call`.

        Args:
            weights: [d_out, d_in] by slot key; gradients flow through them.

        Returns:
            By full name, every parameter that holds one of them. What is not replaced is the
            model's own, detached.
        """
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, weight in weights.items():
            by_parameter.setdefault(self.views[key].parameter, {})[key] = weight
        return {
            name: self._assembled(self._model.get_parameter(name).detach(), given)
            for name, given in by_parameter.items()
        }

    def _assembled(self, own: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        units: dict[Any, list[tuple[SlotView, Tensor]]] = {}
        for key, weight in weights.items():
            view = self.views[key]
            units.setdefault(view.unit, []).append((view, weight))
        built = {unit: _joined(own, pieces) for unit, pieces in units.items()}
        if (None, None) in built:
            return built[None, None]
        if own.dim() == 3:
            parts = [built.get((expert, None), own[expert]) for expert in range(own.shape[0])]
            return torch.stack(parts)
        return _filled(own, [(span, built[None, span]) for _, span in built if span is not None])


def _joined(own: Tensor, pieces: Sequence[tuple[SlotView, Tensor]]) -> Tensor:
    """One matrix in the form in which the parameter holds it, row blocks put together."""
    view, weight = pieces[0]
    if view.rows is not None:
        weight = _filled(
            view.whole(own), [(each.rows, w) for each, w in pieces if each.rows is not None]
        )
    weight = weight.to(own.dtype)
    return weight.T if view.transposed else weight


def _filled(own: Tensor, blocks: Sequence[tuple[tuple[int, int], Tensor]]) -> Tensor:
    """`own` with some ranges of its first dimension replaced."""
    parts: list[Tensor] = []
    at = 0
    for (start, stop), block in sorted(blocks, key=lambda each: each[0]):
        assert start >= at, "blocks of rows overlap"
        parts += [own[at:start], block.to(own.dtype)]
        at = stop
    return torch.cat([*parts, own[at:]])


def _view(finder: ModuleFinder, place: Slot) -> SlotView | str:
    """The view of a matrix, or why there is none."""
    path = place.tensor.removesuffix(".weight")
    home = finder.find(path)
    if home is None:
        return f"the model has no module {path}"
    if home.operations not in _STACKED:
        return f"{place.tensor} is rearranged while it is loaded ({', '.join(home.operations)})"
    name = f"{home.path}.{home.parameter}" if home.path else home.parameter
    module = finder.module(home)
    if home.operations:
        return _stacked(name, module, home, place)
    return SlotView(name, place.expert, place.span, place.transposed, place.rows)


def _stacked(name: str, module: Any, home: Home, place: Slot) -> SlotView | str:
    """A file of one expert that is a part of a stack in memory."""
    if home.expert is None:
        return f"{place.tensor} is joined with others while it is loaded"
    if place.rows is not None or place.transposed:
        return f"{place.tensor} is both split and stacked"
    transposed = bool(getattr(module, "is_transposed", False))
    stack: Tensor = getattr(module, home.parameter)
    if stack.dim() != 3 or (home.share is not None and not hasattr(module, "is_transposed")):
        return f"{name} is no stack of experts in the library's common form"
    rows = share_rows(module, home.parameter, home.share)
    return SlotView(name, home.expert, None, transposed, rows)


def _checked(
    model: Any, view: SlotView, shape: tuple[int, int]
) -> tuple[SlotView, str] | tuple[None, str]:
    try:
        parameter: Tensor = model.get_parameter(view.parameter)
    except AttributeError:
        return None, f"{view.parameter} is no parameter of its own (an adapter that is not merged?)"
    found = tuple(view.of(parameter).shape) if parameter.dim() >= 2 else tuple(parameter.shape)
    if found != tuple(shape):
        return None, f"{view.parameter} holds it as {list(found)}, expected {list(shape)}"
    return view, ""
