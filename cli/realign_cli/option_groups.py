"""Options that belong together: a frozen dataclass of annotated fields stands for all of them.

A command function takes such a group as one parameter; on the command line its fields are options
like any other, in their order and in its place. Here: spreading groups out for typer, and gathering
their values again. Not here: any option.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints


def spread(parameters: Sequence[inspect.Parameter]) -> list[inspect.Parameter]:
    """Options of a command, the fields of its groups in place of the groups."""
    found: list[inspect.Parameter] = []
    for parameter in parameters:
        kind = _group(parameter)
        if kind is None:
            found.append(parameter)
            continue
        hints = get_type_hints(kind, include_extras=True)
        found += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(kind)
        ]
    return found


def gathering(
    parameters: Sequence[inspect.Parameter],
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What makes a function's arguments of the values of all options."""
    kinds = {parameter.name: _group(parameter) for parameter in parameters}

    def gather(values: Mapping[str, Any]) -> dict[str, Any]:
        left = dict(values)
        built = {
            name: kind(**{field.name: left.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in kinds.items()
            if kind is not None
        }
        return left | built

    return gather


def _group(parameter: inspect.Parameter) -> type[Any] | None:
    kind = parameter.annotation
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
