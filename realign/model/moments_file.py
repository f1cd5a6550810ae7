"""Moments on disk: one safetensors file, float64, shared sets stored once.

Layout: tensors "<number>.s1" and "<number>.s2"; in the header's metadata `schema`, `index` (JSON:
key to set number, n and kind), `missing` (JSON: key to reason) and `about` (JSON: what the caller
records: model, suite, template, options).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from realign.errors import CheckpointError, OutputError
from realign.model.accumulate import MomentKind
from realign.model.moments import Moments, MomentSet

SCHEMA = "realign/moments/1"


def save_moments(path: Path, moments: MomentSet, *, about: Mapping[str, str]) -> None:
    """Write `moments` to `path`, replacing what is there, all or nothing.

    Args:
        path: a file in an existing folder.
        moments: as collected.
        about: provenance, `StoredMoments.about` when it is read back.

    Raises:
        OutputError: the file cannot be written.
    """
    numbers: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    index: dict[str, dict[str, Any]] = {}
    for key, value in moments.items():
        number = numbers.setdefault(id(value), len(numbers))
        tensors[f"{number}.s1"] = value.s1.contiguous()
        tensors[f"{number}.s2"] = value.s2.contiguous()
        index[key] = {"set": number, "n": value.n, "kind": value.kind}
    metadata = {
        "schema": SCHEMA,
        "index": json.dumps(index, sort_keys=True),
        "missing": json.dumps(dict(moments.missing), sort_keys=True),
        "about": json.dumps(dict(about), sort_keys=True),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o600)  # private, like the answers they were measured on
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {error}", "is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


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
