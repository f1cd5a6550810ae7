"""`--config FILE`: every option of a command from a TOML file.

The keys are the command's own names without the dashes (`max-new-tokens` or `max_new_tokens`),
`set` may be a table, a repeatable option is a list, and an unknown key is an error: a mistyped key
that is silently ignored would run something else than was asked for. What stands on the command
line wins.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import typer

from realign.errors import UsageError

_NEVER_FROM_A_FILE = frozenset({"config", "help"})


@dataclass(frozen=True)
class Key:
    """One key that a configuration file may set.

    Attributes:
        name: the key as written, without dashes at the front.
        parameter: the command's own name for it.
        repeatable: whether the option takes several values.
    """

    name: str
    parameter: str
    repeatable: bool


def load_config(context: typer.Context, file: Path | None) -> Path | None:
    """Use `file` as the defaults of the command that is being parsed (an eager callback)."""
    if file is not None:
        # This runs inside typer's parser, which knows only its own errors.
        try:
            context.default_map = read_config(file, _keys(context))
        except UsageError as error:
            raise typer.BadParameter(
                ". ".join(filter(None, (error.message, error.hint)))
            ) from error
    return file


def read_config(file: Path, keys: Iterable[Key]) -> dict[str, object]:
    """Return the options that `file` sets, by parameter name.

    Args:
        file: the TOML file.
        keys: what the command takes.

    Raises:
        UsageError: the file cannot be read, a key is unknown, or a value has no option form.
    """
    try:
        with file.open("rb") as stream:
            content = tomllib.load(stream)
    except FileNotFoundError:
        raise UsageError(f"no such configuration file: {file}") from None
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read configuration {file}: {error}") from error

    known = {key.name: key for key in keys}
    options: dict[str, object] = {}
    for written, value in content.items():
        key = known.get(written.replace("_", "-"))
        if key is None:
            raise UsageError(f"{file}: unknown key {written!r}", _suggest(written, known))
        options[key.parameter] = _as_option(f"{file}: {written}", value, repeatable=key.repeatable)
    return options


def _keys(context: typer.Context) -> Iterator[Key]:
    for parameter in context.command.params:
        # An argument that takes any number of values has nargs = -1.
        repeatable = bool(getattr(parameter, "multiple", False)) or parameter.nargs == -1
        is_option = any(each.startswith("--") for each in parameter.opts)
        written = [e.removeprefix("--") for e in parameter.opts if e.startswith("--")]
        for name in written if is_option else [parameter.name or ""]:
            if name not in _NEVER_FROM_A_FILE:
                yield Key(name.replace("_", "-"), parameter.name or "", repeatable)


def _as_option(where: str, value: object, *, repeatable: bool) -> object:
    if isinstance(value, Mapping) and repeatable:
        return [f"{key}={_scalar(where, each)}" for key, each in value.items()]
    if isinstance(value, list):
        if not repeatable:
            raise UsageError(f"{where} takes one value, not a list")
        return [_scalar(where, each) for each in value]
    if isinstance(value, bool):
        return value
    scalar = _scalar(where, value)
    return [scalar] if repeatable else scalar


def _scalar(where: str, value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise UsageError(f"{where} has a value of a kind that no option takes: {value!r}")


def _suggest(written: str, known: Mapping[str, Key]) -> str:
    close = get_close_matches(written, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known keys: " + ", ".join(sorted(known))
