"""Weights that are at hand only while they are needed: of one block, in another form or from disk.

A unit is a decoder block, or a module outside of all blocks that holds weights of its own. When a
unit is entered its weights are fetched and put in place of the model's own; they go when it has
been left, or while someone holds them, when he lets go. Here: putting in place and taking out. Not
here: where weights are fetched from (`offload`), who passes through the units (`lockstep`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from realign.model.lockstep import decoder_blocks


@dataclass(frozen=True, eq=False)
class Unit:
    """A part of a model that is entered and left as a whole."""

    module: Any
    tensors: Mapping[str, tuple[Any, str]]
    """Module and attribute of every parameter, by the parameter's full name."""


Fetch: TypeAlias = Callable[[Unit], Mapping[str, Tensor]]
"""The weights of a unit by full name; those that it leaves out stay as they are."""


def units_of(model: Any) -> tuple[list[Unit], list[str]]:
    """The units of a model, and the parameters that belong to none of them.

    Those are held by modules with children outside of all blocks: they may be read at any time.
    """
    blocks = {id(block) for block in decoder_blocks(model)}
    units: list[Unit] = []
    loose: list[str] = []

    def look(module: Any, path: str) -> None:
        prefix = f"{path}." if path else ""
        if id(module) in blocks or not list(module.children()):
            held = {
                f"{prefix}{inner}{'.' if inner else ''}{name}": (owner, name)
                for inner, owner in module.named_modules()
                for name, parameter in owner._parameters.items()
                if parameter is not None
            }
            if held:
                units.append(Unit(module, held))
            return
        loose.extend(f"{prefix}{name}" for name, _ in module.named_parameters(recurse=False))
        for name, child in module.named_children():
            look(child, f"{prefix}{name}")

    look(model, "")
    return units, loose


class UnitWeights:
    """Puts the weights of units in place when they are entered; see the module."""

    def __init__(self, units: list[Unit], fetch: Fetch) -> None:
        self._fetch = fetch
        self._own: dict[int, tuple[Unit, dict[str, Any]]] = {}
        self._in_place: dict[int, Any] = {}  # by the id of the model's own: tied ones stay tied
        self._held = 0
        self._handles: list[Any] = []
        for unit in units:
            self._handles.append(
                unit.module.register_forward_pre_hook(self._entering(unit), prepend=False)
            )
            self._handles.append(
                unit.module.register_forward_hook(self._leaving(unit), always_call=True)
            )

    def let_go(self) -> None:
        """Take out all weights that are in place."""
        for key in list(self._own):
            self._take_out(key)

    @contextmanager
    def hold(self) -> Generator[Callable[[], None]]:
        """While it is open, weights stay in place until `let_go` is called."""
        self._held += 1
        try:
            yield self.let_go
        finally:
            self._held -= 1
            self.let_go()

    def close(self) -> None:
        """Take out everything and stop watching."""
        self.let_go()
        for handle in self._handles:
            handle.remove()

    def _entering(self, unit: Unit) -> Callable[..., None]:
        def enter(module: Any, args: Any) -> None:
            if id(unit) in self._own:
                return
            own: dict[str, Any] = {}
            for name, tensor in self._fetch(unit).items():
                owner, attribute = unit.tensors[name]
                own[name] = owner._parameters[attribute]
                if id(own[name]) not in self._in_place:
                    made = torch.nn.Parameter(tensor, requires_grad=False)
                    self._in_place[id(own[name])] = made
                owner._parameters[attribute] = self._in_place[id(own[name])]
            self._own[id(unit)] = unit, own

        return enter

    def _leaving(self, unit: Unit) -> Callable[..., None]:
        def leave(module: Any, args: Any, output: Any) -> None:
            if not self._held:
                self._take_out(id(unit))

        return leave

    def _take_out(self, key: int) -> None:
        unit, own = self._own.pop(key, (None, {}))
        for name, parameter in own.items():
            assert unit is not None
            owner, attribute = unit.tensors[name]
            owner._parameters[attribute] = parameter
            self._in_place.pop(id(parameter), None)


@contextmanager
def in_dtype(model: Any, dtype: torch.dtype) -> Generator[UnitWeights]:
    """Let a model in memory run in another float dtype, with copies of one unit at a time."""
    units, loose = units_of(model)

    def fetch(unit: Unit) -> Mapping[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, (owner, attribute) in unit.tensors.items():
            parameter: Tensor = owner._parameters[attribute]
            if parameter.is_floating_point() and parameter.dtype != dtype:
                found[name] = parameter.detach().to(dtype)
        return found

    before = {name: model.get_parameter(name).data for name in loose}
    for name, value in before.items():
        model.get_parameter(name).data = value.to(dtype)
    weights = UnitWeights(units, fetch)
    try:
        yield weights
    finally:
        weights.close()
        for name, value in before.items():
            model.get_parameter(name).data = value
