"""Moments on disk: one safetensors file, float64, shared sets stored once.

Layout: tensors "<number>.s1" and "<number>.s2"; in the header's metadata `schema`, `index` (JSON:
key to set number, n and kind), `missing` (JSON: key to reason) and `about` (JSON: what the caller
records: model, suite, template, options).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from realign.errors import CheckpointError, OutputError
from realign.model.moments import Moments, MomentSet

SCHEMA = "realign/moments/1"


def save_moments(path: Path, moments: MomentSet, *, about: Mapping[str, str]) -> None:
    """Write `moments` to `path`, replacing what is there, all or nothing.

    Args:
        path: a file in an existing folder.
        moments: as collected.
        about: provenance, read back by `load_moments`.

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
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {error}", "is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)


def load_moments(path: Path) -> tuple[MomentSet, Mapping[str, str]]:
    """The moments in `path` and what was recorded about them.

    Raises:
        CheckpointError: the file is absent, damaged, or of another schema.
    """
    try:
        with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("schema") != SCHEMA:
                raise CheckpointError(
                    f"{path} is of schema {metadata.get('schema')!r}, not {SCHEMA!r}",
                    "delete it; it will be computed again",
                )
            index: dict[str, dict[str, Any]] = json.loads(metadata["index"])
            sets: dict[int, Moments] = {}
            moments: dict[str, Moments] = {}
            for key, entry in index.items():
                number = entry["set"]
                if number not in sets:
                    s1, s2 = file.get_tensor(f"{number}.s1"), file.get_tensor(f"{number}.s2")
                    sets[number] = Moments(entry["n"], s1, s2, entry["kind"])
                moments[key] = sets[number]
            return MomentSet(moments, json.loads(metadata["missing"])), json.loads(
                metadata["about"]
            )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as moments: {error}", "delete it; it will be computed again"
        ) from error
