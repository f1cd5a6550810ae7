"""Hyper-parameters of methods: their legal values, their documentation, their parsing.

A parameter is a dataclass field made with `parameter(...)` and followed by a docstring. From these
two come the check of its value, the parsing of `--set name=value`, the help text and the method's
page, so that none of them can drift from the code.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Value = float | int | str | bool | None


class Domain(Protocol):
    """The legal values of a parameter."""

    def parse(self, text: str) -> Value:
        """Return the value that `text` spells; raises ValueError if it spells none."""
        ...

    def admits(self, value: object) -> bool:
        """Whether `value` is legal."""
        ...

    def describe(self) -> str:
        """Say the legal values in words, as "a number in [0, 1]"."""
        ...


@dataclass(frozen=True)
class Real:
    """A finite number between two inclusive bounds."""

    low: float = -math.inf
    high: float = math.inf

    def parse(self, text: str) -> Value:
        """Return the number; raises ValueError."""
        return float(text)

    def admits(self, value: object) -> bool:
        """Whether `value` is a finite number within the bounds."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return math.isfinite(value) and self.low <= value <= self.high

    def describe(self) -> str:
        """Say the bounds."""
        return f"a number {_bounds(self.low, self.high)}".rstrip()


@dataclass(frozen=True)
class Integer:
    """A whole number between two inclusive bounds."""

    low: int
    high: int | None = None

    def parse(self, text: str) -> Value:
        """Return the number; raises ValueError."""
        return int(text)

    def admits(self, value: object) -> bool:
        """Whether `value` is an int (not a bool) within the bounds."""
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return self.low <= value and (self.high is None or value <= self.high)

    def describe(self) -> str:
        """Say the bounds."""
        high = math.inf if self.high is None else self.high
        return f"a whole number {_bounds(self.low, high)}"


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    options: tuple[str, ...]

    def parse(self, text: str) -> Value:
        """Return the word; raises ValueError if it is no option."""
        if text not in self.options:
            raise ValueError(text)
        return text

    def admits(self, value: object) -> bool:
        """Whether `value` is one of the options."""
        return value in self.options

    def describe(self) -> str:
        """Name the options."""
        *others, last = (f"`{option}`" for option in self.options)
        return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class Flag:
    """Yes or no, spelled "true" or "false"."""

    def parse(self, text: str) -> Value:
        """Return the bool; raises ValueError."""
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"

    def admits(self, value: object) -> bool:
        """Whether `value` is a bool."""
        return isinstance(value, bool)

    def describe(self) -> str:
        """Name both."""
        return "`true` or `false`"


@dataclass(frozen=True)
class Nothing:
    """The value None, spelled "none"."""

    def parse(self, text: str) -> Value:
        """Return None; raises ValueError for any other word."""
        if text.lower() != "none":
            raise ValueError(text)

    def admits(self, value: object) -> bool:
        """Whether `value` is None."""
        return value is None

    def describe(self) -> str:
        """Say the spelling."""
        return "`none`"


@dataclass(frozen=True)
class Either:
    """A value of any of several domains; the first that parses a text takes it."""

    domains: tuple[Domain, ...]

    def parse(self, text: str) -> Value:
        """Return the first domain's reading of `text`; raises ValueError if none has one."""
        for domain in self.domains:
            try:
                return domain.parse(text)
            except ValueError:
                continue
        raise ValueError(text)

    def admits(self, value: object) -> bool:
        """Whether any domain admits `value`."""
        return any(domain.admits(value) for domain in self.domains)

    def describe(self) -> str:
        """Join the descriptions."""
        return ", or ".join(domain.describe() for domain in self.domains)


@dataclass(frozen=True)
class Parameter:
    """What is known about one hyper-parameter of a method.

    Attributes:
        name: the field's name, as in `--set name=value`.
        default: its default value.
        domain: its legal values.
        symbol: the sign it has in the equations; may be empty.
        source: where the default and the range come from.
        description: the docstring under the field.
    """

    name: str
    default: Value
    domain: Domain
    symbol: str
    source: str
    description: str


def parameter(default: T, domain: Domain, *, symbol: str = "", source: str) -> T:
    """Declare a hyper-parameter: a dataclass field with a default, a domain and a source.

    The field's docstring, the string under it, is its description.
    """
    metadata = {"default": default, "domain": domain, "symbol": symbol, "source": source}
    return dataclasses.field(default=default, metadata=metadata)


def parameters_of(cls: type[Any]) -> tuple[Parameter, ...]:
    """Return the parameters of a method class, in the order of their fields."""
    described = _field_docstrings(cls)
    return tuple(
        Parameter(
            name=field.name,
            default=field.metadata["default"],
            domain=field.metadata["domain"],
            symbol=field.metadata["symbol"],
            source=field.metadata["source"],
            description=described.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
        if "domain" in field.metadata
    )


def split_settings(settings: Sequence[str]) -> dict[str, str]:
    """Split ["eta=0.9", ...] into {"eta": "0.9", ...}.

    Raises:
        ValueError: an entry without "=", or a name given twice; the message says which.
    """
    pairs: dict[str, str] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name, text = name.strip(), text.strip()
        if not equals or not name or not text:
            raise ValueError(f"{setting!r} is not of the form name=value")
        if name in pairs:
            raise ValueError(f"{name} is set twice")
        pairs[name] = text
    return pairs


def _bounds(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f">= {low:g}"
    if math.isinf(low):
        return f"<= {high:g}"
    return f"in [{low:g}, {high:g}]"


@functools.cache
def _field_docstrings(cls: type[Any]) -> dict[str, str]:
    """Read the string literal under each field; empty where the source is not at hand."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for before, here in itertools.pairwise(body):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(here, ast.Expr)
                and isinstance(here.value, ast.Constant)
                and isinstance(here.value.value, str)
            ):
                found[before.target.id] = inspect.cleandoc(here.value.value)
    return found
