"""What a method needs beside the fine-tune at its defaults, worked out by asking the method.

For the list of methods, its JSON and the pages, which cannot then say what the plan does not ask
for. Not here: the plan's own refusals (`plan_checks`).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import get_args

from realign.repair.method import Given, Method
from realign.repair.preparation import Data
from realign.repair.request import ROLE_OPTIONS
from realign.repair.texts import OPTIONS

ANCHORS = "anchors"
"""Always at hand: `core-anchors`, where the user gives none."""

Need = tuple[str, ...]
"""Words for what serves alike, the usual one first: roles, kinds of texts, `ANCHORS`."""


def needs_of(method: type[Method]) -> tuple[Need, ...]:
    """Return everything that is needed, checkpoints before texts; one word of each need will do."""
    return (*_checkpoints(method()), *_texts(method()))


def in_words(need: Need) -> str:
    """Spell a need, as "keep data (or pairs)"."""
    spelled = [_word(each) for each in need]
    others = "".join(f", or {each}" for each in spelled[1:]).removeprefix(", ")
    return f"{spelled[0]} ({others})" if others else spelled[0]


def option_of(word: str) -> str:
    """Return the option that gives what a word of a need stands for."""
    options = {**ROLE_OPTIONS, **OPTIONS, ANCHORS: "--anchors"}
    return options[word]


def _word(word: str) -> str:
    texts = set(get_args(Data)) - {"pairs"}
    return f"{word} data" if word in texts else word


def _checkpoints(method: Method) -> list[Need]:
    """The roles that are read, with the vector's second one as its setting has it."""
    vector = _vectors(method)
    settled = _settled(method, roles=vector)
    fixed = settled.required_roles() - {settled.vector_kind}
    return [*((role,) for role in sorted(fixed)), *([vector] if vector else [])]


def _vectors(method: Method) -> Need:
    paper = method.paper_vector
    if paper is None:
        return ()
    asked: str = getattr(method, "safety_vector", paper)
    if asked != "auto":
        return (asked,)
    return (paper, "unaligned" if paper == "base" else "base")


def _texts(method: Method) -> list[Need]:
    """The texts that are asked for when none are given, each with those that take its place."""
    kinds: tuple[Data, ...] = get_args(Data)
    vector = _vectors(method)
    asked = _settled(method, roles=vector).required_data()
    others = {
        kind: _settled(method, roles=vector, data={kind}).required_data()
        for kind in kinds
        if kind not in asked
    }
    found: list[Need] = [(ANCHORS,)] if method.needs_anchors else []
    for kind in sorted(asked, key=lambda kind: (kind != "safe", kind)):
        instead = [other for other, now in others.items() if other in now and kind not in now]
        found.append((*((ANCHORS,) if kind == "safe" else ()), kind, *instead))
    return found


def _settled(method: Method, *, roles: Collection[str], data: Collection[str] = ()) -> Method:
    given = frozenset({"aligned", *roles})
    return method.settled(Given(roles=given, data=frozenset(data))).method
