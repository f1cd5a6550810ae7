"""The safetensors container, read strictly: which tensors a file holds and where their bytes are.

Here: the header of one file. Not here: which files a folder holds (`weights`), reading tensor data
(`pread`) and what the tensors mean (`names`).

The parser is our own because the reference library accepts files that two readers see differently
(duplicate names, where the last wins). A checkpoint that is ambiguous is refused before any of its
tensors is read.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the tensor bytes; offsets in the
header count from the end of the JSON.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from realign.errors import HeaderError

MAX_HEADER = 100_000_000
"""The format's own limit on the JSON, in bytes."""

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "C64": torch.complex64,
    "BOOL": torch.bool,
}
"""The storage types realign reads, in safetensors spelling."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The types whose tensors can be edited."""

_LOW_BIT = frozenset(
    ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4")
)
_LONG_NAME = 256
_HUB_LIMIT = 25_000_000

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
    remarks: tuple[str, ...] = ()
    """What is unusual without being wrong."""


def read_header(path: Path) -> Header:
    """Parse the header of one safetensors file.

    Raises:
        HeaderError: the file is truncated, corrupt or ambiguous; the message names the file.
    """
    size, raw = _read_raw(path)
    entries = _parse_json(path, raw)
    remarks = [f"{path}: __metadata__ is null"] if entries.get("__metadata__", 0) is None else []
    metadata = _parse_metadata(path, entries.pop("__metadata__", {}))
    start = 8 + len(raw)
    tensors = [_parse_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(path, tensors, start, size)
    remarks += _unusual(path, raw, entries)
    return Header(path, {info.name: info for info in tensors}, metadata, tuple(remarks))


def _read_raw(path: Path) -> tuple[int, bytes]:
    """The file's size and the bytes of its JSON."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise HeaderError(
                    f"{path} has {size} bytes, fewer than the 8-byte length field", _AGAIN
                )
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
            return size, stream.read(length)
    except OSError as error:
        raise HeaderError(
            f"{path} cannot be read: {error.strerror or error}", "check the file and its rights"
        ) from error


def _unusual(path: Path, raw: bytes, entries: Mapping[str, Any]) -> Iterator[str]:
    if len(raw) > _HUB_LIMIT:
        yield f"{path}: the header has {len(raw)} bytes; the Hub's client refuses to read it"
    if raw.rstrip(b" ")[-1:] != b"}":
        yield f"{path}: the header is padded with other bytes than blanks"
    for name, entry in entries.items():
        if len(name.encode("utf-8")) > _LONG_NAME or not name.isprintable() or "/" in name:
            yield f"{path}: the tensor name {name[:80]!r} is unusual"
        if set(entry) != {"dtype", "shape", "data_offsets"}:
            yield f"{path}: the entry of {name!r} has unknown keys"
    if not entries:
        yield f"{path} holds no tensors"


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
        header = json.loads(text, object_pairs_hook=lambda pairs: reject_duplicates(path, pairs))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise HeaderError(f"{path}: the header is not valid JSON: {error}", _RESAVE) from None
    return cast(dict[str, Any], header)


def reject_duplicates(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object hook of a strict JSON parser: no key twice, no broken Unicode in a key.

    Raises:
        HeaderError: names the file `path` and the key.
    """
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise HeaderError(
                f"{path}: duplicate key {key!r}: different readers see different tensors",
                "do not load this file; obtain it again from its author",
            )
        if not _is_text(key):
            raise HeaderError(f"{path}: {key!r} is not valid Unicode", _RESAVE)
        seen[key] = value
    return seen


def _is_text(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can spell and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
        raise HeaderError(f"{path}: {name!r} lacks a proper dtype, shape or data_offsets", _RESAVE)
    if dtype in _LOW_BIT:
        raise HeaderError(
            f"{path}: {name!r} is stored as {dtype}: quantised weights cannot be edited",
            "use the unquantised checkpoint in float32, float16 or bfloat16",
        )
    if dtype not in DTYPES:
        raise HeaderError(
            f"{path}: {name!r} has the unknown type {dtype!r}",
            "upgrade realign or convert the file",
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
