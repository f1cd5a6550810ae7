"""Which module of a running model holds a tensor of its checkpoint.

Names on disk are often not those of the modules: transformers renames prefixes and stacks single
experts into one parameter while it loads. Here: the same renaming, asked of the library itself.
Not here: what is measured at the module (`moments`, `moments_experts`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Home:
    """Where a stored tensor lives in a running model."""

    path: str
    """Of the module; of a stack of experts, the module that holds the stack."""
    parameter: str
    """Its parameter there: "weight", "gate_up_proj", ..."""
    expert: int | None = None
    """Its index where single experts on disk are stacked in memory."""
    share: tuple[int, int] | None = None
    """(index, count): which of `count` equal row blocks of the expert it becomes."""
    operations: tuple[str, ...] = ()
    """What the library does with the tensor while it loads it, beside renaming it."""


class ModuleFinder:
    """Finds homes in one model; the renaming rules are read once."""

    def __init__(self, model: Any) -> None:
        """Take a transformers model."""
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._renamings, self._converters = _rules(model)

    def find(self, path: str) -> Home | None:
        """The home of a tensor; None where the model has none.

        Args:
            path: the tensor's name without ".weight".
        """
        for known in self._spellings(path):
            if known in self._modules:
                return Home(known, "weight")
        for name in (f"{path}.weight", path):
            renamed, pattern, rule = self._renamed(name)
            for known in self._spellings(renamed):
                if known in self._parameters:
                    module, _, parameter = known.rpartition(".")
                    names = () if rule is None else tuple(map(_kind, rule.operations))
                    return Home(module, parameter, *_place(path, pattern, rule), names)
        return None

    def module(self, home: Home) -> Any:
        """The module itself."""
        return self._modules[home.path]

    def _spellings(self, path: str) -> list[str]:
        # Checkpoints of the bare decoder omit the prefix that the causal model adds.
        prefix = self._prefix
        return [p for p in (path, f"{prefix}.{path}", path.removeprefix(f"{prefix}.")) if p]

    def _renamed(self, name: str) -> tuple[str, str | None, Any]:
        """What the library calls it, with the converter that took it and the pattern that did."""
        for rule in self._renamings:
            name, _ = rule.rename_source_key(name)
        for rule in self._converters:
            renamed, pattern = rule.rename_source_key(name)
            if pattern is not None:
                return renamed, pattern, rule
        return name, None, None


def _rules(model: Any) -> tuple[list[Any], list[Any]]:
    """The library's renamings and converters for a model; none where it keeps no such thing."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:
        return [], []
    rules: list[Any] | None = getattr(model, "_weight_conversions", None)
    if rules is None:
        rules = list(get_model_conversion_mapping(model, add_legacy=False))
    return (
        [rule for rule in rules if isinstance(rule, WeightRenaming)],
        [rule for rule in rules if isinstance(rule, WeightConverter)],
    )


def _kind(operation: Any) -> str:
    return type(operation).__name__


def _place(
    path: str, pattern: str | None, converter: Any
) -> tuple[int | None, tuple[int, int] | None]:
    number = _EXPERT_NUMBER.search(f"{path}.")
    if number is None or pattern is None:
        return None, None
    sources = list(converter.source_patterns)
    share = (sources.index(pattern), len(sources)) if len(sources) > 1 else None
    return int(number.group(1)), share
