"""Tensors that a method has worked out, kept under a hash of everything they depend on.

A file appears whole or not at all, readable by its owner alone. Here: keeping and finding them. Not
here: where the cache is (`cache`), what the hash covers (`workbench`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from realign.audit.canonical import canonical_json, sha256_json
from realign.errors import OutputError
from realign.progress import SILENT, Progress

_ABOUT = "realign"


def kept_tensors(
    folder: Path,
    name: str,
    *,
    about: Mapping[str, Any],
    make: Callable[[], Mapping[str, Tensor]],
    progress: Progress = SILENT,
) -> Mapping[str, Tensor]:
    """Return tensors by name from the cache, or make and keep them.

    Args:
        folder: the cache.
        name: what they are; begins the file's name.
        about: everything they depend on, as JSON.
        make: computes them.
        progress: told where they came from.

    Raises:
        OutputError: they cannot be written.
    """
    path = folder / f"{name}-{sha256_json({'name': name, **about})[:32]}.safetensors"
    text = canonical_json(about)
    if path.exists():
        try:
            found = _read(path, text)
        except (SafetensorError, OSError, ValueError) as error:
            progress.note(f"worked out again: {path} cannot be used ({error})")
        else:
            progress.note(f"{name} from {path}")
            return found
    made = {key: tensor.detach().cpu().contiguous() for key, tensor in make().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch(mode=0o600)
        save_file(made, partial, metadata={_ABOUT: text})
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        raise OutputError(f"{path} cannot be written: {error}", "is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)
    return made


def as_tensors(facts: Mapping[str, float | int]) -> dict[str, Tensor]:
    """Return facts as scalars that `tables_of` reads back: counts stay whole numbers."""
    return {
        name: torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        for name, value in facts.items()
    }


def tables_of(
    made: Mapping[str, Tensor],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float | int]]:
    """Return tensors named "table/key" as tables, and scalars by name as facts.

    Args:
        made: as a method left them.
    """
    tables: dict[str, dict[str, Tensor]] = {}
    facts: dict[str, float | int] = {}
    for name, tensor in made.items():
        table, slash, key = name.partition("/")
        if slash:
            tables.setdefault(table, {})[key] = tensor
        else:
            facts[name] = tensor.item()
    return tables, facts


def _read(path: Path, about: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as opened:
        if (opened.metadata() or {}).get(_ABOUT) != about:
            raise ValueError("it belongs to another run")
        names: list[str] = list(opened.keys())
        return {name: opened.get_tensor(name) for name in names}
