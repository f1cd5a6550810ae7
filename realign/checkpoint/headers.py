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

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import torch

from realign.checkpoint.rules import Remark, merged, refuse, remark
from realign.checkpoint.strict_json import depth, strict_json
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

_LOW_BITS: Mapping[str, int] = {
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Types that the format knows and realign does not edit, with their bits per element."""
_LONG_NAME = 256
_HUB_LIMIT = 25_000_000
_LARGEST = 2**63 - 1
_DEEPEST = 64
_PATHS = ("/", "\\", "..")
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))

# What people meet in place of a weight file, by its first bytes.
_OTHER_KINDS: Sequence[tuple[bytes, str, str]] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the weights",
        "fetch the weights: run git lfs pull in the folder",
    ),
    (b"GGUF", "a GGUF file", "use the original checkpoint in safetensors"),
    (
        b"PK\x03\x04",
        "a zip archive, as torch.save writes it",
        "convert it in an isolated environment: load with transformers, then save_pretrained",
    ),
    (
        b"\x80\x02",
        "a pickle",
        "convert it in an isolated environment: load with transformers, then save_pretrained",
    ),
    (b"<!DOCTYPE", "a web page", "the download went wrong; download the file again"),
    (b"<html", "a web page", "the download went wrong; download the file again"),
    (b"\x1f\x8b", "a gzip archive", "unpack it"),
    (b"\x89HDF", "an HDF5 file", "use the checkpoint in safetensors"),
)


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
    unusual: tuple[Remark, ...] = ()
    """What is unusual without being wrong."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """`unusual`, as lines."""
        return merged(self.unusual)


def read_header(path: Path) -> Header:
    """Parse the header of one safetensors file.

    Raises:
        HeaderError: the file is truncated, corrupt, ambiguous or of a type that is not read; the
            message begins with the rule's id and names the file.
    """
    size, raw = _read_raw(path)
    entries = _parse_json(path, raw)
    metadata = _parse_metadata(path, entries.get("__metadata__", {}))
    unusual = tuple(_unusual(path, raw, entries))
    entries.pop("__metadata__", None)
    start = 8 + len(raw)
    tensors = [_parse_entry(path, name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_coverage(path, tensors, start, size)
    _refuse_low_bit(path, tensors)
    return Header(path, {info.name: info for info in tensors}, metadata, unusual)


def _read_raw(path: Path) -> tuple[int, bytes]:
    """The file's size and the bytes of its JSON."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise refuse(
                    "RA001", path, f"{size} bytes, fewer than the 8-byte length of its header"
                )
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MAX_HEADER or 8 + length > size:
                raise _refuse_length(path, length, size)
            return size, stream.read(length)
    except OSError as error:
        raise HeaderError(
            f"{path} cannot be read: {error.strerror or error}", "check the file and its rights"
        ) from error


def _refuse_length(path: Path, length: int, size: int) -> HeaderError:
    with path.open("rb") as stream:
        begin = stream.read(32)
    for magic, kind, fix in _OTHER_KINDS:
        if begin.startswith(magic):
            return refuse("RA002" if length > MAX_HEADER else "RA004", path, f"it is {kind}", fix)
    if length > MAX_HEADER:
        return refuse(
            "RA002", path, f"header length {length} exceeds {MAX_HEADER}, the format's limit"
        )
    return refuse("RA004", path, f"the header needs {8 + length} bytes, the file has {size}")


def _unusual(path: Path, raw: bytes, entries: Mapping[str, Any]) -> Iterator[Remark]:
    if len(raw) > _HUB_LIMIT:
        yield remark(
            "RA003", path, f"the header has {len(raw)} bytes; the Hub's client refuses to read it"
        )
    if raw.rstrip(b" ")[-1:] != b"}":
        yield remark("RA009", path, "the header is padded with other bytes than blanks")
    if entries.get("__metadata__", 0) is None:
        yield remark("RA009", path, "__metadata__ is null")
    tensors = {name: entry for name, entry in entries.items() if name != "__metadata__"}
    for name, entry in tensors.items():
        if isinstance(entry, dict) and len(cast(dict[str, Any], entry)) > len(_FIELDS):
            yield remark("RA009", path, f"the entry of {name!r} has unknown keys")
        if (
            not name.isprintable()
            or len(name.encode("utf-8")) > _LONG_NAME
            or any(part in name for part in _PATHS)
        ):
            yield remark("RA018", path, f"the tensor name {name[:80]!r} is unusual")
    if not tensors:
        yield remark("RA017", path, "it holds no tensors")
    elif (8 + len(raw)) % 8:
        yield remark("RA016", path, "the tensor data do not start on an 8-byte boundary")


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if raw[:1] != b"{":
        found = f"found 0x{raw[:1].hex()}" if raw else "it is empty"
        raise refuse("RA005", path, f"the header does not start with '{{' ({found})")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refuse(
            "RA006", path, f"the header is not valid UTF-8 at byte {error.start}"
        ) from None
    header = strict_json(path, text, rule="RA007", what="the header")
    assert isinstance(header, dict), path  # it began with a brace
    return cast(dict[str, Any], header)


def _parse_metadata(path: Path, value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        isinstance(v, str) for v in cast(dict[str, Any], value).values()
    ):
        raise refuse("RA015", path, "__metadata__ must map strings to strings")
    return cast(dict[str, str], value)


def _naturals(value: Any) -> bool:
    """A list of whole numbers from 0; True is none of them."""
    return isinstance(value, list) and all(
        type(n) is int and 0 <= n <= _LARGEST for n in cast(list[Any], value)
    )


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise refuse("RA007", path, f"the entry of {name!r} is not an object")
    fields = cast(dict[str, Any], entry)
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not _naturals(shape)
        or not _naturals(offsets)
        or len(cast(list[int], offsets)) != 2
    ):
        raise refuse("RA007", path, f"{name!r} lacks a proper dtype, shape or data_offsets")
    if len(fields) > len(_FIELDS) and depth(fields) > _DEEPEST:  # some readers give up, some do not
        raise refuse("RA007", path, f"the entry of {name!r} is nested too deeply")
    bits = DTYPES[dtype].itemsize * 8 if dtype in DTYPES else _LOW_BITS.get(dtype)
    if bits is None:
        raise refuse("RA010", path, f"{name!r} has the unknown type {dtype!r}")
    sizes, (begin, end) = tuple(cast(list[int], shape)), cast(list[int], offsets)
    # An empty tensor may have sides so long that other readers overflow before they meet the zero.
    if prod(filter(None, sizes)) * bits > _LARGEST:
        raise refuse("RA011", path, f"{name!r}: the size of {dtype} {list(sizes)} overflows")
    total = prod(sizes) * bits
    if total % 8:
        raise refuse("RA011", path, f"{name!r}: {dtype} {list(sizes)} is no whole number of bytes")
    if end - begin != total // 8:
        raise refuse(
            "RA011",
            path,
            f"{name!r} needs {total // 8} bytes for {dtype} {list(sizes)}, its offsets give "
            f"{end - begin}",
        )
    return TensorInfo(name, dtype, sizes, path, start + begin, total // 8)


def _check_coverage(path: Path, tensors: Sequence[TensorInfo], start: int, size: int) -> None:
    position = start
    for info in tensors:
        if info.offset != position:
            what = "are unused" if info.offset > position else "overlap"
            low, high = sorted((position, info.offset))
            raise refuse("RA012", path, f"bytes {low}..{high} {what} at {info.name!r}")
        position = info.offset + info.nbytes
    if position > size:
        raise refuse(
            "RA013", path, f"truncated: its last tensor ends at {position}, the file at {size}"
        )
    if position < size:
        raise refuse("RA014", path, f"{size - position} bytes after the last tensor")


def _refuse_low_bit(path: Path, tensors: Sequence[TensorInfo]) -> None:
    """After the container's own rules: what is corrupt is called so, whatever its types."""
    for info in tensors:
        if info.dtype in _LOW_BITS:
            raise refuse(
                "RA035",
                path,
                f"{info.name!r} is stored as {info.dtype}: quantised weights cannot be edited",
            )
