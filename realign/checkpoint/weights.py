"""Which files of a model folder hold its weights, and all their tensors by name.

The choice is that of transformers: the file that the config names, `model.safetensors`, then the
index. Pickle files are never looked into. Not here: the container itself (`headers`), what is said
of weights in other formats (`formats`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.checkpoint.formats import is_foreign, no_weights, refuse_quantised_tensors
from realign.checkpoint.headers import TensorInfo, read_header
from realign.checkpoint.rules import Remark, merged, refuse, remark
from realign.checkpoint.strict_json import strict_json
from realign.errors import HeaderError, NotFoundError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True)
class WeightFiles:
    """Which files of a folder hold its weights, as a loader chooses them."""

    files: tuple[Path, ...]
    index: Path | None
    weight_map: Mapping[str, str] | None
    """Tensor name to file name, from the index."""
    total_size: int | None = None
    """Bytes of all tensors, as the index says."""
    unusual: tuple[Remark, ...] = ()
    """What is unusual without being wrong."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """`unusual`, as lines."""
        return merged(self.unusual)


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
        check_inside(folder / "config.json", named)
        if named.endswith(".safetensors") and (folder / named).is_file():
            return _one(folder, named)
        if not named.endswith(".safetensors.index.json"):
            raise NotFoundError(
                f"{folder / 'config.json'} names the weights {named}, which realign cannot read",
                f"provide them as {SINGLE_FILE} or as shards with {INDEX_FILE}",
            )
        return _sharded(folder, folder / named)
    if (folder / SINGLE_FILE).is_file():
        return _one(folder, SINGLE_FILE)
    for path in (folder / SINGLE_FILE, folder / INDEX_FILE):
        if os.path.lexists(path) and not path.is_file():
            what = "a link that leads nowhere" if path.is_symlink() else "no file"
            raise NotFoundError(f"{path} is {what}", "download or copy the weights again")
    if not (folder / INDEX_FILE).is_file():
        raise NotFoundError(*why_no_weights(folder))
    return _sharded(folder, folder / INDEX_FILE)


def _one(folder: Path, name: str) -> WeightFiles:
    return WeightFiles((folder / name,), None, None, unusual=tuple(_ignored(folder, [name])))


def _sharded(folder: Path, index: Path) -> WeightFiles:
    if not index.is_file():
        raise NotFoundError(f"{index} is missing", "download the index, or save the model again")
    weight_map, total_size = read_index(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise refuse("RA021", index, f"it names {name}, which is missing")
    _check_numbering(index, names)
    unusual = tuple(_ignored(folder, [index.name, *names]))
    return WeightFiles(tuple(folder / n for n in names), index, weight_map, total_size, unusual)


def _ignored(folder: Path, chosen: Sequence[str]) -> Iterator[Remark]:
    """What a folder holds beside the weights that are read."""
    others: list[str] = []
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in chosen or name.startswith(("adapter_model", ".")):
            continue
        if name.endswith(".safetensors"):
            if len(chosen) > 1 and name != SINGLE_FILE and not name.startswith("consolidated"):
                yield remark("RA025", path, "it is not in the index and is ignored")
            else:
                others.append(name)
        elif name == INDEX_FILE or is_foreign(name):
            others.append(name)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        yield remark(
            "RA027",
            folder,
            f"several sets of weights: {chosen[0]} is read, {', '.join(others[:3])}{more} ignored",
        )


def read_index(index: Path) -> tuple[dict[str, str], int | None]:
    """An index file: tensor name to file name, and `total_size` where it is given.

    Raises:
        HeaderError: it is malformed, or names a file outside the folder.
    """
    try:
        text = index.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise refuse("RA020", index, f"the index is not valid UTF-8: {error.reason}") from None
    except OSError as error:
        raise HeaderError(
            f"{index} cannot be read: {error.strerror or error}", "check the file and its rights"
        ) from error
    value = strict_json(index, text, rule="RA020", what="the index")
    weight_map = cast(dict[str, Any], value).get("weight_map") if isinstance(value, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in cast(dict[str, Any], weight_map).values())
    ):
        raise refuse("RA020", index, "the index has no weight_map of tensor names to files")
    named = cast(dict[str, str], weight_map)
    for name in named.values():
        check_inside(index, name)
        if not name.endswith(".safetensors"):
            raise refuse("RA020", index, f"it names {name!r}, which is no safetensors file")
    metadata = cast(dict[str, Any], value).get("metadata")
    total = cast(dict[str, Any], metadata).get("total_size") if isinstance(metadata, dict) else None
    return named, int(total) if isinstance(total, (int, float)) else None


def check_inside(source: Path, name: str) -> None:
    """Check that a name read from a file stays in its folder.

    Raises:
        HeaderError: it would lead elsewhere, or is no name.
    """
    if name in {"", ".", ".."} or not name.isprintable() or "/" in name or "\\" in name:
        raise refuse("RA028", source, f"{name!r} is no file name inside the folder")


def _check_numbering(index: Path, names: Sequence[str]) -> None:
    found = [match for match in map(_NUMBERED.search, names) if match is not None]
    totals = sorted({int(match[2]) for match in found})
    if len(totals) > 1:
        said = " and ".join(f"{total} files" for total in totals)
        raise refuse("RA026", index, f"it mixes weights of {said}")
    if not found:
        return
    numbers, total = {int(match[1]) for match in found}, totals[0]
    first = 0 if 0 in numbers else 1
    missing = sorted(set(range(first, first + total)) - numbers)
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise refuse("RA026", index, f"of {total} weight files it does not name number {some}")


def why_no_weights(folder: Path) -> tuple[str, str]:
    """Message and hint for a folder without safetensors weights that a loader would find."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return f"{folder} is empty", "give the folder that holds config.json and the weights"
    known = no_weights(str(folder), names)
    if known is not None:
        return known
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
) -> tuple[WeightFiles, Mapping[str, TensorInfo], tuple[str, ...]]:
    """All tensors of a model folder, by name, with the files that hold them, and what is unusual.

    Raises:
        NotFoundError, HeaderError: as `find_weights` and `read_header`; also when a tensor stands
            in two files, or the index and the files disagree.
        CheckpointError: the tensors are quantised.
    """
    weights = find_weights(folder, config)
    tensors: dict[str, TensorInfo] = {}
    unusual = list(weights.unusual)
    for file in weights.files:
        header = read_header(file)
        unusual += header.unusual
        for name, info in header.tensors.items():
            if name in tensors:
                raise refuse("RA023", file, f"{name!r} stands also in {tensors[name].file.name}")
            tensors[name] = info
    if not tensors:
        raise HeaderError(f"{folder}: the weight files hold no tensors", "check the export")
    if weights.index is not None and weights.weight_map is not None:
        unusual += _check_index(weights.index, weights.weight_map, tensors)
        held = sum(info.nbytes for info in tensors.values())
        if weights.total_size not in (None, held):
            unusual.append(
                remark(
                    "RA029",
                    weights.index,
                    f"total_size {weights.total_size} is not the {held} bytes of the tensors",
                )
            )
    refuse_quantised_tensors(folder, tensors)
    return weights, tensors, merged(unusual)


def _check_index(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> list[Remark]:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise refuse("RA022", index, f"it places {name!r} in {file}, which does not contain it")
    extra = sorted(set(tensors) - set(weight_map))
    if not extra:
        return []
    # Loaders read the shards whole, so these tensors are part of the model.
    return [
        remark("RA024", index, f"{len(extra)} tensors are not in the index (first: {extra[0]!r})")
    ]
