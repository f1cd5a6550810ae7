"""JSON as the strictest reader takes it: what two readers could see differently is refused.

Here: parsing the JSON of safetensors headers and indices. Not here: what it must contain.
"""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any, cast

from realign.checkpoint.rules import refuse


def strict_json(path: Path, text: str, *, rule: str, what: str) -> Any:
    """Parse JSON; no key twice, no lone surrogate, no NaN or infinity, `-0` for no whole number.

    Args:
        path: the file, for messages.
        text: its JSON.
        rule: the id under which it is refused.
        what: what the text is, for messages: "the header".

    Raises:
        HeaderError: it is no such JSON.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=lambda pairs: _no_duplicates(path, pairs),
            parse_constant=_no_number,
            parse_int=_integer if "-0" in text else None,
            parse_float=_finite,
        )
        if "\\u" in text:  # JSON can spell halves of surrogate pairs, which no file can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise refuse(rule, path, f"{what} is not valid Unicode") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise refuse(rule, path, f"{what} is not valid JSON: {error}") from None
    return value


def depth(value: Any) -> int:
    """How deeply objects and lists are nested; 0 for a plain value."""
    found, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        found += 1
        level = [
            inner
            for each in level
            for inner in (
                cast(dict[str, Any], each).values()
                if isinstance(each, dict)
                else cast(list[Any], each)
            )
        ]
    return found


def _no_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise refuse(
            "RA008", path, f"duplicate key {twice!r}: different readers see different tensors"
        )
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _integer(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)  # other readers take -0 for a fraction


def _finite(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _no_number(text)
