"""Methods by name: the built-in ones, third parties' entry points, and `--set name=value`.

A third party adds a method by an entry point of the group `realign.methods` whose value is a
subclass of `Method`; built-in names cannot be taken over.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from realign.errors import UsageError
from realign.repair.method import Method, out_of_range
from realign.repair.methods.antidote import Antidote
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.irr import Irr
from realign.repair.methods.lox import Lox
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.nlsr import Nlsr
from realign.repair.methods.one_shot import OneShot
from realign.repair.methods.q_realign import QRealign
from realign.repair.methods.replace import Replace
from realign.repair.methods.resta import Resta
from realign.repair.methods.safe_delta import SafeDelta
from realign.repair.methods.safe_lora import SafeLora
from realign.repair.methods.safe_patching import SafePatching
from realign.repair.methods.safemerge import Safemerge
from realign.repair.methods.somf import Somf
from realign.repair.methods.two_teachers import TwoTeachers
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.parameters import split_settings

ENTRY_POINT_GROUP = "realign.methods"

METHODS: Mapping[str, type[Method]] = {
    method.name: method
    for method in (
        Lssf,
        DeltaSvd,
        Lox,
        Resta,
        SafeLora,
        Safemerge,
        SafeDelta,
        Irr,
        Antidote,
        Nlsr,
        WiseFt,
        Replace,
        QRealign,
        OneShot,
        Somf,
        SafePatching,
        TwoTeachers,
    )
}


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, built-in ones first; imports no plug-in."""
    plugins = sorted(point.name for point in _plugins() if point.name not in METHODS)
    return (*METHODS, *dict.fromkeys(plugins))


def find_method(name: str) -> type[Method]:
    """Return the method class called `name`.

    Raises:
        UsageError: there is none of that name, or a plug-in cannot be loaded.
    """
    if name in METHODS:
        return METHODS[name]
    for point in _plugins():
        if point.name == name:
            return _load(point)
    names = method_names()
    close = difflib.get_close_matches(name, names, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"there is no method {name}", f"{guess}methods: {', '.join(names)}")


def build_method(name: str, settings: Sequence[str] | Mapping[str, Any] = ()) -> Method:
    """Return the method `name` with settings.

    Args:
        name: as on the command line.
        settings: ["eta=0.9", ...] as text, or {"eta": 0.9, ...} with values already typed;
            a string value in a mapping is parsed.

    Raises:
        UsageError: an unknown method or parameter, or a value that is out of range; the message
            names the parameter, the value and the legal range.
    """
    cls = find_method(name)
    given: Mapping[str, Any]
    if isinstance(settings, Mapping):
        given = settings
    else:
        try:
            given = split_settings(settings)
        except ValueError as error:
            raise UsageError(str(error), "write for example: --set eta=0.9") from None
    known = {each.name: each for each in cls.parameters()}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            guess = f"did you mean {close[0]}? " if close else ""
            raise UsageError(
                f"{name} has no parameter {key}", f"{guess}parameters: {', '.join(known)}"
            )
        if isinstance(value, str):
            try:
                value = known[key].domain.parse(value)
            except ValueError:
                raise out_of_range(name, known[key], value) from None
        values[key] = value
    return cls(**values)


def _plugins() -> Sequence[EntryPoint]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _load(point: EntryPoint) -> type[Method]:
    try:
        loaded: object = point.load()
    except Exception as error:  # whatever a third party's import raises
        raise UsageError(
            f"the method {point.name} ({point.value}) cannot be loaded: {error}",
            "repair or uninstall the package that provides it",
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise UsageError(
            f"the entry point {point.name} ({point.value}) is not a repair method",
            "it must name a subclass of realign.repair.method.Method",
        )
    return loaded
