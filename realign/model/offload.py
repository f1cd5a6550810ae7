"""A model that is never in memory as a whole: weights are read when a block is entered.

The model is built without weights; transformers' own rules turn what the files hold of one block
into its parameters, and afterwards they are dropped again. An adapter is merged while it is read.
Here: reading. Not here: when blocks are entered and left (`unit_weights`, `lockstep`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from realign.checkpoint.reader import Checkpoint
from realign.errors import ModelError, RealignError
from realign.model.pretrained import skeleton_in
from realign.model.quiet import quiet_libraries
from realign.model.unit_weights import Unit, UnitWeights, units_of


class OffloadedWeights:
    """Reads the weights of one model, unit by unit."""

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Build the model, and place what is small or may be needed at any time.

        Args:
            checkpoint: what is read; it stays open.
            folder: of its config.
            dtype: of its weights.
            device: where it runs.

        Raises:
            ModelError: the architecture is unknown, or cannot be read in parts.
        """
        self._checkpoint, self._device = checkpoint, device
        self.dtype: torch.dtype | None = None
        """What weights are given in; None: the model's own."""
        model: Any = skeleton_in(folder, dtype)
        self.model: PreTrainedModel = model
        try:
            self._settings = _load_settings(model, dtype)
            self._stored = _stored_names(model, list(checkpoint.tensors), self._settings)
            _make_buffers(model, device)
            state = model.state_dict(keep_vars=True)
            by_id = {id(tensor): name for name, tensor in state.items() if name in self._stored}
            self._tied = {
                name: by_id[id(tensor)] for name, tensor in state.items() if id(tensor) in by_id
            }
        except RealignError:
            raise
        except Exception as error:  # the library's inner functions can change
            raise self._cannot(str(error)) from error
        units, loose = units_of(model)
        inside = {name for unit in units for name in unit.tensors}
        persistent = [name for name in self._stored if name not in inside]
        self._place([*loose, *persistent])
        _say_device(model, device)
        self._weights = UnitWeights(units, self._fetch)

    @contextmanager
    def hold(self, dtype: torch.dtype | None) -> Generator[Callable[[], None]]:
        """See `LoadedModel.held_weights`."""
        before, self.dtype = self.dtype, dtype
        loose = _loose_in(self.model, dtype)
        try:
            with self._weights.hold() as let_go:
                yield let_go
        finally:
            self.dtype = before
            for name, value in loose.items():
                self.model.get_parameter(name).data = value

    def close(self) -> None:
        """Drop what is in place."""
        self._weights.close()
        self._checkpoint.close()

    def _fetch(self, unit: Unit) -> Mapping[str, Tensor]:
        found = self._read(list(unit.tensors))
        wide = self.dtype
        return {
            name: tensor.to(wide) if wide is not None and tensor.is_floating_point() else tensor
            for name, tensor in found.items()
        }

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Parameters by full name, as the library makes them of the files."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        model: Any = self.model
        state = model.state_dict(keep_vars=True)
        source = {name: self._tied.get(name, name) for name in names}
        stored = {each for name in source.values() for each in self._stored.get(name, ())}
        before = {name: state[name] for name in set(source.values())}
        try:
            with quiet_libraries():
                convert_and_load_state_dict_in_model(
                    model,
                    {name: self._checkpoint.read(name) for name in sorted(stored)},
                    copy.deepcopy(self._settings),
                )
            after = model.state_dict(keep_vars=True)
            found = {name: after[source[name]].detach() for name in names}
        except RealignError:
            raise
        except Exception as error:
            raise self._cannot(str(error)) from error
        finally:
            for name, own in before.items():
                _set(model, name, own)
            # The library leaves the rules that this part needed: `modules` asks for all.
            model._weight_conversions = list(self._settings.weight_mapping)
        for name, tensor in found.items():
            if tensor.is_meta:
                raise self._cannot(f"no weights were found for {name}")
        return {name: tensor.to(self._device) for name, tensor in found.items()}

    def _place(self, names: Sequence[str]) -> None:
        """Read some tensors for good."""
        for name, tensor in self._read(names).items() if names else ():
            own: Any = self.model.state_dict(keep_vars=True)[name]
            is_parameter = isinstance(own, torch.nn.Parameter)
            made = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            _set(self.model, name, made)

    def _cannot(self, reason: str) -> ModelError:
        lines = reason.strip().splitlines()
        return ModelError(
            f"{self._checkpoint.source} cannot be read block by block: {lines[0] if lines else ''}",
            "leave --offload out: the model is then held in memory",
        )


def _load_settings(model: Any, dtype: torch.dtype) -> Any:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    mapping: Any = get_model_conversion_mapping(model)
    return LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        device_map={"": "cpu"},
        weight_mapping=mapping,
    )


def _stored_names(model: Any, names: Sequence[str], settings: Any) -> dict[str, list[str]]:
    """By every name in memory, the stored tensors that it is made of."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = copy.deepcopy(settings.weight_mapping)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    state = model.state_dict()
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        targets = [renamed]
        for converter in converters:
            if pattern is not None and pattern in converter.source_patterns:
                first, *others = converter.target_patterns
                targets += [renamed.replace(first, other) for other in others]
        for target in targets:
            if target in state:
                found.setdefault(target, []).append(name)
    return found


def _make_buffers(model: Any, device: torch.device) -> None:
    """Give the tables that no file holds (rotary frequencies) their values."""
    model._move_missing_keys_from_meta_to_device(set(), {"": device}, None, None)
    model._initialize_missing_keys(False)
    model.requires_grad_(False)


def _loose_in(model: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Give parameters outside of all units another dtype; returns what they were."""
    if dtype is None:
        return {}
    before: dict[str, Tensor] = {}
    for name in units_of(model)[1]:
        parameter = model.get_parameter(name)
        before[name] = parameter.data
        parameter.data = parameter.data.to(dtype)
    return before


def _set(model: Any, name: str, value: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._parameters:
        module._parameters[attribute] = value
    else:
        module._buffers[attribute] = value


def _say_device(model: Any, device: torch.device) -> None:
    """Let `model.device` be where it runs: its own answer is that of its first parameter."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"device": property(lambda _: device)})
