"""What differs in the small files of two checkpoints: configs, tokenizer, chat templates.

Files are compared by their bytes; JSON that differs is compared key by key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.sidecars import is_tokenizer

FileStatus = Literal["changed", "only_a", "only_b"]

_COMPARED = (".json", ".jinja", ".txt", ".py")
_PROSE = ("README", "LICENSE", "NOTICE", "USE_POLICY")
_MOST_KEYS = 12
"""Of one object that differs in more keys, as vocabularies do, the number is told."""
_LONGEST = 120


@dataclass(frozen=True)
class KeyChange:
    """One key of a JSON file that differs; `a` or `b` is None where the key is absent."""

    path: str
    """Dotted: "rope_scaling.factor"."""
    a: str | None
    """JSON text, shortened."""
    b: str | None
    count: int = 1
    """More than 1: so many keys below `path` differ."""


@dataclass(frozen=True)
class FileChange:
    """One small file that differs."""

    name: str
    status: FileStatus
    sha256_a: str | None
    sha256_b: str | None
    keys: tuple[KeyChange, ...] = ()
    """Of JSON files on both sides."""

    def to_json(self) -> dict[str, Any]:
        """The change as JSON."""
        return asdict(self) | {"keys": [asdict(each) for each in self.keys]}


def compare_files(a: Checkpoint, b: Checkpoint) -> tuple[FileChange, ...]:
    """Compare configs, tokenizer files and templates; the config comes first.

    Model cards and licences are not compared, nor is `realign.json`.
    """
    ours, theirs = _small_files(a), _small_files(b)
    names = sorted(ours.keys() | theirs.keys(), key=lambda name: (name != "config.json", name))
    found: list[FileChange] = []
    for name in names:
        one, two = ours.get(name), theirs.get(name)
        if one == two:
            continue
        found.append(
            FileChange(
                name=name,
                status="only_b" if one is None else "only_a" if two is None else "changed",
                sha256_a=_sha256(one),
                sha256_b=_sha256(two),
                keys=_keys(name, one, two),
            )
        )
    return tuple(found)


def _small_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {
        name: content if isinstance(content, bytes) else content.read_bytes()
        for name, content in checkpoint.sidecars().items()
        if (Path(name).suffix in _COMPARED or is_tokenizer(name)) and not name.startswith(_PROSE)
    }


def _sha256(content: bytes | None) -> str | None:
    return None if content is None else hashlib.sha256(content).hexdigest()


def _keys(name: str, one: bytes | None, two: bytes | None) -> tuple[KeyChange, ...]:
    if one is None or two is None or not name.endswith(".json"):
        return ()
    try:
        return tuple(_changes("", json.loads(one), json.loads(two)))
    except (ValueError, RecursionError):
        return ()  # not JSON after all: the hashes have to do


def _changes(path: str, one: Any, two: Any) -> Iterator[KeyChange]:
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        ours, theirs = cast(Mapping[str, Any], one), cast(Mapping[str, Any], two)
        found: list[KeyChange] = []
        for key in dict.fromkeys([*ours, *theirs]):
            below = f"{path}.{key}" if path else key
            if key not in theirs:
                found.append(KeyChange(below, _short(ours[key]), None))
            elif key not in ours:
                found.append(KeyChange(below, None, _short(theirs[key])))
            else:
                found += _changes(below, ours[key], theirs[key])
        if len(found) > _MOST_KEYS and path:
            yield KeyChange(
                path, f"{len(ours)} keys", f"{len(theirs)} keys", sum(x.count for x in found)
            )
        else:
            yield from found
    elif type(one) is not type(two) or one != two:
        yield KeyChange(path, _short(one), _short(two))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= _LONGEST:
        return text
    if isinstance(value, list | dict):
        return f"{'list' if isinstance(value, list) else 'object'} of {len(cast(Any, value))}"
    return f"{text[: _LONGEST - 3]}..."
