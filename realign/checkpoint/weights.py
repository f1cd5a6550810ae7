"""Which files of a model folder hold its weights, and all their tensors by name.

The choice is that of transformers: the file that the config names, `model.safetensors`, then the
index. Pickle files are never looked into. Not here: the container itself (`headers`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from realign.checkpoint.headers import TensorInfo, read_header, reject_duplicates
from realign.errors import HeaderError, NotFoundError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class WeightFiles:
    """Which files of a folder hold its weights, as a loader chooses them."""

    files: tuple[Path, ...]
    index: Path | None
    weight_map: Mapping[str, str] | None
    """Tensor name to file name, from the index."""
    remarks: tuple[str, ...] = ()
    """What is unusual without being wrong."""


def find_weights(folder: Path, config: Mapping[str, Any] | None = None) -> WeightFiles:
    """Choose the weight files of a model folder as transformers does.

    Args:
        folder: the model folder.
        config: its config.json, which may name the file (`transformers_weights`).

    Raises:
        NotFoundError: the folder holds no safetensors weights; the hint depends on what it holds.
        HeaderError: the index is malformed or names a file that is missing or outside the folder.
    """
    named = (config or {}).get("transformers_weights")
    if isinstance(named, str):
        _check_inside(folder / "config.json", named)
        if named.endswith(".safetensors") and (folder / named).is_file():
            return WeightFiles((folder / named,), None, None)
        raise NotFoundError(
            f"{folder / 'config.json'} names the weights {named}, which realign cannot read",
            f"provide them as {SINGLE_FILE} or as shards with {INDEX_FILE}",
        )
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():
        remarks = (f"{index} is ignored: {SINGLE_FILE} comes first",) if index.is_file() else ()
        return WeightFiles((folder / SINGLE_FILE,), None, None, remarks)
    if not index.is_file():
        raise NotFoundError(*why_no_weights(folder))
    weight_map = _read_weight_map(index)
    files = tuple(folder / name for name in sorted(set(weight_map.values())))
    for file in files:
        if not file.is_file():
            raise HeaderError(
                f"{index} names {file.name}, which is missing",
                "download the missing shard, or rebuild the index",
            )
    return WeightFiles(files, index, weight_map, tuple(_left_over(folder, files)))


def _left_over(folder: Path, files: tuple[Path, ...]) -> Iterator[str]:
    named = {file.name for file in files}
    for path in sorted(folder.glob("model*.safetensors")):
        if path.name not in named:
            yield f"{path} is not in the index and is ignored"


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        value = json.loads(
            index.read_text("utf-8"),
            object_pairs_hook=lambda pairs: reject_duplicates(index, pairs),
        )
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"{index} is not valid JSON: {error}", "rebuild the index") from None
    weight_map = cast(dict[str, Any], value).get("weight_map") if isinstance(value, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in cast(dict[str, Any], weight_map).values())
    ):
        raise HeaderError(
            f"{index} has no weight_map of tensor names to files", "rebuild the index"
        )
    named = cast(dict[str, str], weight_map)
    for name in named.values():
        _check_inside(index, name)
    return named


def _check_inside(source: Path, name: str) -> None:
    if name in {"", ".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise HeaderError(
            f"{source}: {name!r} is no file name inside the folder", "do not load this checkpoint"
        )


def why_no_weights(folder: Path) -> tuple[str, str]:
    """Message and hint for a folder without safetensors weights that a loader would find."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return f"{folder} is empty", "give the folder that holds config.json and the weights"
    if any(name.endswith(".gguf") for name in names):
        return (
            f"{folder} holds GGUF weights, which are quantised",
            "use the original checkpoint in safetensors, and convert to GGUF after the repair",
        )
    if any(name.endswith(_PICKLES) for name in names):
        return (
            f"{folder} holds only pickle weights; realign never unpickles",
            "convert them in an isolated environment: load with transformers, then "
            "model.save_pretrained(FOLDER), which writes safetensors",
        )
    stray = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_model")]
    if stray and all(_NUMBERED.search(name) for name in stray):
        total = int(cast(re.Match[str], _NUMBERED.search(stray[0]))[2])
        return (
            f"{folder} has {len(stray)} of {total} shards but no {INDEX_FILE}",
            "download the index, or load and save the model with transformers",
        )
    if stray:
        return (
            f"{folder} has {stray[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}",
            f"rename a single file to {SINGLE_FILE}, or restore the index",
        )
    inside = [n for n in names if (folder / n / "config.json").is_file()]
    if inside:
        return (
            f"{folder} holds no model itself",
            f"did you mean {' or '.join(str(folder / name) for name in inside[:3])}?",
        )
    return (
        f"{folder} holds no model weights",
        f"give a folder with {SINGLE_FILE} or {INDEX_FILE}",
    )


def read_tensors(
    folder: Path, config: Mapping[str, Any] | None = None
) -> tuple[WeightFiles, Mapping[str, TensorInfo]]:
    """All tensors of a model folder, by name, with the files that hold them.

    Raises:
        NotFoundError, HeaderError: as `find_weights` and `read_header`; also when a tensor stands
            in two files, or the index and the files disagree.
    """
    weights = find_weights(folder, config)
    tensors: dict[str, TensorInfo] = {}
    remarks = list(weights.remarks)
    for file in weights.files:
        header = read_header(file)
        remarks += header.remarks
        for name, info in header.tensors.items():
            if name in tensors:
                raise HeaderError(
                    f"{name!r} stands in {tensors[name].file.name} and in {file.name} of {folder}",
                    "delete the stale shard",
                )
            tensors[name] = info
    if not tensors:
        raise HeaderError(f"{folder}: the weight files hold no tensors", "check the export")
    if weights.weight_map is not None:
        remarks += _check_index(folder, weights.weight_map, tensors)
    return replace(weights, remarks=tuple(remarks)), tensors


def _check_index(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> list[str]:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise HeaderError(
                f"{folder / INDEX_FILE} places {name!r} in {file}, which does not contain it",
                "rebuild the index",
            )
    extra = sorted(set(tensors) - set(weight_map))
    if not extra:
        return []
    # Loaders read the shards whole, so these tensors are part of the model.
    return [f"{folder}: {len(extra)} tensors are not in the index (first: {extra[0]!r})"]
