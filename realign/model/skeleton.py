"""Which module of the running model holds a stored tensor; no weights are read or made.

Files and classes name things differently: a bare decoder lacks its prefix, vision-language models
have moved their parts, experts that are files of their own are one stack in memory. transformers
knows the renamings; here they are asked for, on a model built on the meta device. Not here: running
a model (`loading`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

_EXPERT = re.compile(r"\.experts\.(\d+)\.")

Holder = Literal["linear", "embedding", "parameter"]


@dataclass(frozen=True)
class Place:
    """Where a stored tensor is found in the running model."""

    name: str
    """The module, or the parameter's full name where it is a bare parameter."""
    holder: Holder
    shape: tuple[int, ...]
    """Of the parameter in memory."""
    expert: int | None = None
    """Index in a stack into which separate files are merged."""
    part: int = 0
    """Which of the files that are concatenated along the rows of one matrix; 0 is the first."""
    transposed: bool = False
    """A stack whose class multiplies from the right: [experts, d_in, d_out]."""
    order: int = 0
    """Its place among the model's parameters, as the class defines them."""


class Skeleton:
    """The names and shapes of a model's modules, without its weights."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        self._modules: dict[str, Any] = dict(model.named_modules())
        from transformers.core_model_loading import rename_source_key

        self._rename_key = rename_source_key
        self._renamings, self._converters = _conversions(model)

    @property
    def class_name(self) -> str:
        """The model's class."""
        return type(self._model).__name__

    @property
    def merges_experts(self) -> bool:
        """Whether experts that are files of their own are one stack in memory."""
        return any(map(_merges_experts, self._converters))

    def place(self, stored: str) -> Place | None:
        """The place of a stored tensor; None where the class has none of this name and form."""
        name, converter, part = self._rename(stored)
        if name not in self._parameters:
            return None
        shape = tuple(self._parameters[name].shape)
        owner, _, leaf = name.rpartition(".")
        module = self._modules[owner]
        if converter is not None and not _merges_experts(converter):
            return None
        if leaf == "weight" and len(shape) == 2 and converter is None:
            if isinstance(module, torch.nn.Embedding):
                return Place(owner, "embedding", shape)
            if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
                return Place(owner, "linear", shape)
        found = _EXPERT.search(stored) if converter is not None else None
        return Place(
            name,
            "parameter",
            shape,
            expert=None if found is None else int(found[1]),
            part=part,
            transposed=bool(getattr(module, "is_transposed", False)),
            order=list(self._parameters).index(name),
        )

    def _rename(self, stored: str) -> tuple[str, Any, int]:
        if stored in self._parameters:
            return stored, None, 0
        name, pattern = self._rename_key(
            stored,
            self._renamings,
            self._converters,
            self._model.base_model_prefix,
            self._parameters,
        )
        if pattern is None:
            return name, None, 0
        for converter in self._converters:
            if pattern in converter.source_patterns:
                return name, converter, list(converter.source_patterns).index(pattern)
        return name, None, 0


def skeleton_of(config: Mapping[str, Any]) -> Skeleton | None:
    """The skeleton of the class that a config names; None where this installation has none."""
    import transformers  # not above: every plan of a repair comes past this file

    from realign.model.quiet import quiet_libraries

    names: list[str] = list(config.get("architectures") or [])
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None or not hasattr(kind, "config_class"):
        return None
    with quiet_libraries():
        try:
            settings = kind.config_class.from_dict(dict(config))
            with torch.device("meta"):
                return Skeleton(kind(settings))
        except Exception:
            # A config that this class does not take, or an optional library that is missing: any
            # kind of error. The stored names then have to do.
            return None


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found = get_model_conversion_mapping(model)
    converters = [each for each in found if isinstance(each, WeightConverter)]
    return [each for each in found if not isinstance(each, WeightConverter)], converters


def _merges_experts(converter: Any) -> bool:
    """Whether files are only stacked and concatenated: the rows of a matrix stay its rows."""
    kinds = [type(each).__name__ for each in converter.operations]
    return kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
