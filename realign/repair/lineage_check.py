"""Whether the checkpoints of a repair look like what they were given as: warnings, never refusals.

The commonest mistake that every shape allows is `--aligned` and `--base` the wrong way round: the
repair then removes what alignment added. It shows in three places: which of the two the fine-tune
is nearer to (a few rows of a few matrices are read), which of them the configs and cards name as
whose parent, and which of them has a chat template. Each is said with its evidence; a fine-tune may
have good reasons for any of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.headers import FLOATS
from realign.checkpoint.lineage import read_parents
from realign.checkpoint.reader import Checkpoint
from realign.repair.request import Inputs

MATRICES = 8
"""How many matrices are looked at, evenly spread over the model."""
ROWS = 64
"""How many rows of each, half from its beginning and half from its middle."""
CLEARLY = 0.8
"""A distance is clearly smaller when it is less than this part of the other."""


def doubts(inputs: Inputs, names: Sequence[str]) -> tuple[str, ...]:
    """What speaks against the roles in which the checkpoints were given, one sentence each.

    Args:
        inputs: the open checkpoints; without an aligned and a base model there is nothing to doubt.
        names: the matrices that are to be edited, in file order.
    """
    aligned, base = inputs.others.get("aligned"), inputs.others.get("base")
    if aligned is None or base is None:
        return ()
    found = [
        *_by_distance(inputs.finetuned, aligned, base, names),
        *_by_parents(inputs.finetuned, aligned, base),
        *_by_template(aligned, base),
    ]
    return tuple(f"{each}: are --aligned and --base swapped?" for each in found)


def _by_distance(
    finetuned: Checkpoint, aligned: Checkpoint, base: Checkpoint, names: Sequence[str]
) -> Iterator[str]:
    to_aligned, to_base = distances(finetuned, aligned, base, names)
    if to_base < CLEARLY * to_aligned:
        yield (
            f"the fine-tune is nearer to the base model than to the aligned one (relative distance "
            f"{to_base:.2g} and {to_aligned:.2g} over sampled rows)"
        )


def distances(
    finetuned: Checkpoint, aligned: Checkpoint, base: Checkpoint, names: Sequence[str]
) -> tuple[float, float]:
    """Relative distance of the fine-tune to the aligned and to the base model, over sampled rows.

    Both are Frobenius norms over that of the fine-tune. (0, 0) where nothing can be compared.
    """
    shared = [name for name in names if _comparable(name, finetuned, aligned, base)]
    step = max(1, len(shared) // MATRICES)
    norm = to_aligned = to_base = 0.0
    for name in shared[::step][:MATRICES]:
        rows = min(each.tensors[name].shape[0] for each in (finetuned, aligned, base))
        half = ROWS // 2
        for start in range(0, rows, max(half, rows // 2))[:2]:
            part = (start, min(start + half, rows))
            f, a, b = (_sample(c, name, part) for c in (finetuned, aligned, base))
            parts = [float(torch.sum(x * x)) for x in (f, f - a, f - b)]
            if not all(map(_is_number, parts)):
                continue  # the run names the tensor that is not finite
            norm, to_aligned, to_base = norm + parts[0], to_aligned + parts[1], to_base + parts[2]
    if norm == 0.0:
        return 0.0, 0.0
    return (to_aligned / norm) ** 0.5, (to_base / norm) ** 0.5


def _sample(checkpoint: Checkpoint, name: str, rows: tuple[int, int]) -> Tensor:
    """Rows of a matrix in float64; of a stack, where a row is a matrix, as many of the first."""
    shape = checkpoint.tensors[name].shape
    if len(shape) != 3:
        return checkpoint.read(name, rows).double()
    few = min(ROWS // 2, shape[1])
    return checkpoint.read_within(name, rows[0], (0, few)).double()


def _is_number(value: float) -> bool:
    return value - value == 0.0


def _comparable(name: str, *checkpoints: Checkpoint) -> bool:
    """A matrix in all of them, of one width; a longer vocabulary is no hindrance."""
    infos = [each.tensors[name] for each in checkpoints if name in each.tensors]
    return (
        len(infos) == len(checkpoints)
        and all(info.dtype in FLOATS and len(info.shape) > 1 for info in infos)
        and len({info.shape[1:] for info in infos}) == 1
    )


def _by_parents(finetuned: Checkpoint, aligned: Checkpoint, base: Checkpoint) -> Iterator[str]:
    for parent in _parents(finetuned):
        if _is(parent, base) and not _is(parent, aligned):
            yield f"the fine-tune names {parent} as its parent, which was given as the base model"
            break
    for parent in _parents(base):
        if _is(parent, aligned) and not _is(parent, base):
            yield f"the model given as base names {parent}, given as aligned, as its parent"
            break


def _parents(checkpoint: Checkpoint) -> Iterator[str]:
    folder = (
        checkpoint.adapter_folder
        if isinstance(checkpoint, AdapterCheckpoint)
        else checkpoint.folder
    )
    yield from (parent.name for parent in read_parents(folder))
    named = checkpoint.config.get("_name_or_path")
    if isinstance(named, str) and named:
        yield named


def _is(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a parent's name means this checkpoint: the Hub id it came from, or its folder."""
    given = checkpoint.source.removeprefix("hf://").partition("@")[0].rstrip("/")
    if name.rstrip("/") == given:
        return True
    if checkpoint.commit is not None:
        return False
    folder = checkpoint.folder.resolve()
    cached = folder.parent.parent.name  # models--org--name/snapshots/COMMIT
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return name == cached.removeprefix("models--").replace("--", "/")
    return Path(name).name == folder.name


def _by_template(aligned: Checkpoint, base: Checkpoint) -> Iterator[str]:
    if _has_template(base.folder) and not _has_template(aligned.folder):
        yield "only the model given as base has a chat template"


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings: Any = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and "chat_template" in settings
