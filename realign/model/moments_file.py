"""Moments on disk: one safetensors file, float64, shared sets stored once.

Layout: tensors "<number>.s1" and "<number>.s2"; in the header's metadata `schema`, `index` (JSON:
key to set number, n and kind), `missing` (JSON: key to reason) and `about` (JSON: what the caller
records: model, suite, template, options).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open

from realign.errors import CheckpointError
from realign.model.accumulate import MomentKind
from realign.model.growing_file import GrowingFile
from realign.model.moments import Moments, MomentSet

SCHEMA = "realign/moments/1"


class MomentsWriter:
    """Moments on their way into a file, written as soon as they are finished; a `MomentSink`.

    A context manager: without `finish` nothing is left behind.
    """

    def __init__(self, path: Path, *, about: Mapping[str, str]) -> None:
        """Begin a file.

        Args:
            path: a file in an existing folder, replaced at the end.
            about: provenance, `StoredMoments.about` when it is read back.

        Raises:
            OutputError: the file cannot be written.
        """
        self._file = GrowingFile(path)
        self._about = dict(about)
        self._index: dict[str, tuple[int, int, MomentKind]] = {}
        self._sets = 0

    def put(self, keys: Sequence[str], moments: Moments) -> None:
        """Write the moments that `keys` share, or merge them with those they have.

        Raises:
            OutputError: the file cannot be written.
        """
        if keys[0] in self._index:
            number, n, kind = self._index[keys[0]]
            before = Moments(
                n, self._file.get(f"{number}.s1"), self._file.get(f"{number}.s2"), kind
            )
            moments = before.merge(moments)
            self._file.replace(f"{number}.s1", moments.s1)
            self._file.replace(f"{number}.s2", moments.s2)
        else:
            number, self._sets = self._sets, self._sets + 1
            self._file.add(f"{number}.s1", moments.s1)
            self._file.add(f"{number}.s2", moments.s2)
        self._index.update(dict.fromkeys(keys, (number, moments.n, moments.kind)))

    def finish(self, missing: Mapping[str, str], *, about: Mapping[str, str] | None = None) -> None:
        """Give the file its name.

        Args:
            missing: keys without moments, and why; what was put for them does not count.
            about: what else is known now.

        Raises:
            OutputError: the file cannot be written.
        """
        index = {
            key: {"set": number, "n": n, "kind": kind}
            for key, (number, n, kind) in self._index.items()
            if key not in missing
        }
        self._file.finish(
            {
                "schema": SCHEMA,
                "index": json.dumps(index, sort_keys=True),
                "missing": json.dumps(dict(missing), sort_keys=True),
                "about": json.dumps({**self._about, **(about or {})}, sort_keys=True),
            }
        )

    def __enter__(self) -> MomentsWriter:
        return self

    def __exit__(self, *what: Any) -> None:
        self._file.__exit__(*what)


def save_moments(path: Path, moments: MomentSet, *, about: Mapping[str, str]) -> None:
    """Write `moments` to `path`, replacing what is there, all or nothing.

    Args:
        path: a file in an existing folder.
        moments: as collected.
        about: provenance, `StoredMoments.about` when it is read back.

    Raises:
        OutputError: the file cannot be written.
    """
    shared: dict[int, list[str]] = {}
    for key, value in moments.items():
        shared.setdefault(id(value), []).append(key)
    with MomentsWriter(path, about=about) as writer:
        for keys in shared.values():
            writer.put(keys, moments[keys[0]])
        writer.finish(moments.missing)


class StoredMoments(Mapping[str, Moments]):
    """Moments in a file, read one matrix at a time: all of them at once can dwarf the model."""

    def __init__(self, path: Path) -> None:
        """Read what the file holds and check that it is all there; no moments are read yet.

        Raises:
            CheckpointError: the file is absent, damaged, or of another schema.
        """
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
                metadata: dict[str, str] = file.metadata() or {}
                tensors = set(cast(list[str], file.keys()))
            if metadata.get("schema") != SCHEMA:
                raise CheckpointError(
                    f"{path} is of schema {metadata.get('schema')!r}, not {SCHEMA!r}",
                    "delete it; it will be computed again",
                )
            index: dict[str, dict[str, Any]] = json.loads(metadata["index"])
            self._index: dict[str, tuple[int, int, MomentKind]] = {
                key: (int(each["set"]), int(each["n"]), cast(MomentKind, each["kind"]))
                for key, each in index.items()
            }
            self.about: Mapping[str, str] = dict(json.loads(metadata["about"]))
            self.missing: Mapping[str, str] = dict(json.loads(metadata["missing"]))
            for number, _, _ in self._index.values():
                if not {f"{number}.s1", f"{number}.s2"} <= tensors:
                    raise ValueError(f"set {number} is not in it")
        except (OSError, SafetensorError, LookupError, AttributeError, TypeError, ValueError) as e:
            raise CheckpointError(
                f"{path} cannot be read as moments: {e}", "delete it; it will be computed again"
            ) from e

    def __getitem__(self, key: str) -> Moments:
        number, n, kind = self._index[key]
        with safe_open(self._path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            # Copies: a view would keep the file's pages mapped.
            s1 = file.get_tensor(f"{number}.s1").clone()
            s2 = file.get_tensor(f"{number}.s2").clone()
        return Moments(n, s1, s2, kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)
