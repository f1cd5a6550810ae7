"""The safetensors container, read strictly: which tensors a file holds and where their bytes are.

Here: the header of one file and the choice of weight files in one folder. Not here: reading tensor
data (`reader`) and what the tensors mean (`matching`).

The parser is our own because the reference library accepts files that two readers see differently
(duplicate names, where the last wins). A checkpoint that is ambiguous is refused before any of its
tensors is read.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the tensor bytes; offsets in the header
count from the end of the JSON.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from realign.errors import HeaderError, NotFoundError

MAX_HEADER = 100_000_000
"""The format's own limit on the JSON, in bytes."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The storage types realign reads, in safetensors spelling."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The types whose tensors can be edited."""

_AGAIN = "download or export the file again"
_RESAVE = "re-save the checkpoint with the safetensors library"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its header describes it."""

    name: str
    dtype: str
    """Safetensors spelling: "F32", "BF16", ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """Absolute position of the first byte in `file`."""
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same type in torch."""
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Header:
    """The parsed header of one file; tensors in order of their position."""

    file: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class WeightFiles:
    """Which files of a folder hold its weights, as a loader chooses them."""

    files: tuple[Path, ...]
    index: Path | None
    weight_map: Mapping[str, str] | None
    """Tensor name to file name, from the index."""


def read_header(path: Path) -> Header:
    """Parse the header of one safetensors file.

    Raises:
        HeaderError: the file is truncated, corrupt or ambiguous; the message names the file.
    """
    size = path.stat().st_size
    if size < 8:
        raise HeaderError(f"{path} has {size} bytes, fewer than the 8-byte length field", _AGAIN)
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > MAX_HEADER:
            raise HeaderError(
                f"{path}: header length {length} exceeds {MAX_HEADER}, the format's limit",
                "the file is corrupt or no safetensors file; " + _AGAIN,
            )
        if 8 + length > size:
            raise HeaderError(
                f"{path}: the header needs {8 + length} bytes, the file has {size}", _AGAIN
            )
        raw = stream.read(length)
    entries = _parse_json(path, raw)
    metadata = _parse_metadata(path, entries.pop("__metadata__", {}))
    start = 8 + length
    tensors = [_parse_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(path, tensors, start, size)
    return Header(path, {info.name: info for info in tensors}, metadata)


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        found = f"found 0x{raw[:1].hex()}" if raw else "it is empty"
        raise HeaderError(f"{path}: the header does not start with '{{' ({found})", _RESAVE)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HeaderError(
            f"{path}: the header is not valid UTF-8 at byte {error.start}", _RESAVE
        ) from None
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (json.JSONDecodeError, RecursionError) as error:
        raise HeaderError(f"{path}: the header is not valid JSON: {error}", _RESAVE) from None
    return cast(dict[str, Any], header)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise HeaderError(
                f"{path}: duplicate key {key!r}: different readers see different tensors",
                "do not load this file; obtain it again from its author",
            )
        seen[key] = value
    return seen


def _parse_metadata(path: Path, value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        isinstance(v, str) for v in cast(dict[str, Any], value).values()
    ):
        raise HeaderError(f"{path}: __metadata__ must map strings to strings", _RESAVE)
    return cast(dict[str, str], value)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise HeaderError(f"{path}: the entry of {name!r} is not an object", _RESAVE)
    fields = cast(dict[str, Any], entry)
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if (
        not isinstance(dtype, str)
        or not isinstance(shape, list)
        or not isinstance(offsets, list)
        or not all(_natural(n) for n in cast(list[Any], shape))
        or not all(_natural(n) for n in cast(list[Any], offsets))
        or len(cast(list[int], offsets)) != 2
    ):
        raise HeaderError(
            f"{path}: {name!r} lacks a proper dtype, shape or data_offsets", _RESAVE
        )
    if dtype not in DTYPES:
        raise HeaderError(
            f"{path}: {name!r} is stored as {dtype}, which realign does not read",
            "use the unquantised checkpoint in float32, float16 or bfloat16",
        )
    sizes, (begin, end) = tuple(cast(list[int], shape)), cast(list[int], offsets)
    want = prod(sizes) * DTYPES[dtype].itemsize
    if end - begin != want:
        raise HeaderError(
            f"{path}: {name!r} needs {want} bytes for {dtype} {list(sizes)}, "
            f"its offsets give {end - begin}",
            _RESAVE,
        )
    return TensorInfo(name, dtype, sizes, path, start + begin, want)


def _check_coverage(path: Path, tensors: Sequence[TensorInfo], start: int, size: int) -> None:
    position = start
    for info in tensors:
        if info.offset != position:
            what = "are unused" if info.offset > position else "overlap"
            low, high = sorted((position, info.offset))
            raise HeaderError(f"{path}: bytes {low}..{high} {what} at {info.name!r}", _RESAVE)
        position = info.offset + info.nbytes
    if position > size:
        raise HeaderError(
            f"{path} is truncated: its last tensor ends at {position}, the file at {size}",
            "resume or repeat the download",
        )
    if position < size:
        raise HeaderError(
            f"{path}: {size - position} bytes after the last tensor",
            "do not distribute this file; " + _RESAVE,
        )


def find_weights(folder: Path) -> WeightFiles:
    """Choose the weight files of a model folder in the order in which transformers looks.

    Raises:
        NotFoundError: the folder holds no safetensors weights; the hint depends on what it holds.
        HeaderError: the index is malformed or names a file that is missing or outside the folder.
    """
    if (folder / SINGLE_FILE).is_file():
        return WeightFiles((folder / SINGLE_FILE,), None, None)
    index = folder / INDEX_FILE
    if index.is_file():
        weight_map = _read_weight_map(index)
        files = tuple(folder / name for name in sorted(set(weight_map.values())))
        for file in files:
            if not file.is_file():
                raise HeaderError(
                    f"{index} names {file.name}, which is missing", "download the missing shard"
                )
        return WeightFiles(files, index, weight_map)
    raise NotFoundError(*_why_no_weights(folder))


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        value = json.loads(
            index.read_text("utf-8"), object_pairs_hook=lambda pairs: _unique(index, pairs)
        )
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HeaderError(f"{index} is not valid JSON: {error}", "rebuild the index") from None
    weight_map = cast(dict[str, Any], value).get("weight_map") if isinstance(value, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in cast(dict[str, Any], weight_map).values())
    ):
        raise HeaderError(f"{index} has no weight_map of tensor names to files", "rebuild the index")
    named = cast(dict[str, str], weight_map)
    for name in named.values():
        if Path(name).name != name or name in {"", ".", ".."}:
            raise HeaderError(
                f"{index}: {name!r} points outside the folder", "do not load this checkpoint"
            )
    return named


def _why_no_weights(folder: Path) -> tuple[str, str]:
    names = sorted(path.name for path in folder.iterdir())
    stray = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_model")]
    if any(n.endswith(".gguf") for n in names):
        return (
            f"{folder} holds GGUF weights, which are quantised",
            "use the original checkpoint in safetensors, and convert to GGUF after the repair",
        )
    if any(n.endswith((".bin", ".pt", ".pth", ".ckpt")) for n in names):
        return (
            f"{folder} holds only pickle weights; realign never unpickles",
            "convert them in an isolated environment: load with transformers, then "
            "model.save_pretrained(FOLDER), which writes safetensors",
        )
    if stray:
        return (
            f"{folder} has {stray[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}",
            f"rename a single file to {SINGLE_FILE}, or restore the index",
        )
    return (
        f"{folder} holds no model weights",
        f"give a folder with {SINGLE_FILE} or {INDEX_FILE}",
    )


def read_tensors(folder: Path) -> tuple[WeightFiles, Mapping[str, TensorInfo]]:
    """All tensors of a model folder, by name, with the files that hold them.

    Raises:
        NotFoundError, HeaderError: as `find_weights` and `read_header`; also when a tensor stands in
            two files, or the index and the files disagree.
    """
    weights = find_weights(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in weights.files:
        for name, info in read_header(file).tensors.items():
            if name in tensors:
                raise HeaderError(
                    f"{name!r} stands in both {tensors[name].file.name} and {file.name} of {folder}",
                    "delete the stale shard",
                )
            tensors[name] = info
    if not tensors:
        raise HeaderError(f"{folder}: the weight files hold no tensors", "check the export")
    if weights.weight_map is not None:
        _check_index(folder, weights, tensors)
    return weights, tensors


def _check_index(folder: Path, weights: WeightFiles, tensors: Mapping[str, TensorInfo]) -> None:
    assert weights.weight_map is not None
    for name, file in weights.weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise HeaderError(
                f"{weights.index} places {name!r} in {file}, which does not contain it",
                "rebuild the index",
            )
    extra = sorted(set(tensors) - set(weights.weight_map))
    if extra:
        raise HeaderError(
            f"{len(extra)} tensors in the shards of {folder} are not in the index "
            f"(first: {extra[0]!r}); loaders would ignore them",
            "rebuild the index",
        )
