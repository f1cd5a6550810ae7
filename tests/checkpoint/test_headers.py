"""The strict container parser against the reference library and against damage of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoint_support import raw_safetensors

from realign.checkpoint.headers import DTYPES, read_header
from realign.checkpoint.pread import TensorFiles
from realign.errors import HeaderError

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return (
        bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    )


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    layout=st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(DTYPES))), max_size=5)
)
def test_reads_what_the_reference_library_writes(
    tmp_path: Path, layout: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        name: torch.randint(0, 2, shape).to(DTYPES[dtype])
        for name, (shape, dtype) in layout.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert dict(header.metadata) == {"format": "pt"}
    assert set(header.tensors) == set(tensors)
    files = TensorFiles()
    for name, tensor in tensors.items():
        info = header.tensors[name]
        assert (info.shape, info.torch_dtype) == (tuple(tensor.shape), tensor.dtype)
        assert info.numel == tensor.numel() and info.nbytes == tensor.nbytes
        assert bytes_of(files.read(info)) == bytes_of(tensor)
    files.close()


def test_tensors_come_in_order_of_position_whatever_the_json_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "U8", "shape": [2]}
    path.write_bytes(
        raw_safetensors(
            {"b": {**entry, "data_offsets": [2, 4]}, "a": {**entry, "data_offsets": [0, 2]}},
            b"1234",
        )
    )
    assert list(read_header(path).tensors) == ["a", "b"]


def one(begin: Any = 0, end: Any = 4, *, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "fewer than the 8-byte length"),
    "short": (b"1234567", "7 bytes"),
    "huge length": ((2**40).to_bytes(8, "little") + b"{}", "exceeds 100000000"),
    "length past the end": ((100).to_bytes(8, "little") + b"{}", "the file has 10"),
    "html": (raw_safetensors("<html></html>"), "does not start with"),
    "blank first": (raw_safetensors(" {}"), "0x20"),
    "bad utf-8": (raw_safetensors(b'{"\xff": 1}'), "not valid UTF-8 at byte 2"),
    "no json": (raw_safetensors('{"a":'), "not valid JSON"),
    "garbage padding": (raw_safetensors("{} x"), "not valid JSON"),
    "deep": (raw_safetensors('{"a":' * 60000), "not valid JSON"),
    "many digits": (raw_safetensors('{"a":' + "9" * 5000 + "}"), "not valid JSON"),
    "surrogate": (raw_safetensors('{"\\ud800": 1}'), "not valid Unicode"),
    "entry is a list": (raw_safetensors({"a": []}), "not an object"),
    "no dtype": (raw_safetensors({"a": {"shape": [], "data_offsets": [0, 0]}}), "lacks a proper"),
    "negative shape": (raw_safetensors({"a": one(shape=[-1])}, b"1234"), "lacks a proper"),
    "fractional shape": (raw_safetensors({"a": one(shape=[1.0])}, b"1234"), "lacks a proper"),
    "boolean shape": (raw_safetensors({"a": one(shape=[True])}, b"1234"), "lacks a proper"),
    "three offsets": (
        raw_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
        "lacks a proper",
    ),
    "overflowing shape": (
        raw_safetensors({"a": one(shape=[2**62, 2**62])}, b"1234"),
        "its offsets give 4",
    ),
    "quantised": (raw_safetensors({"a": one(0, 1, dtype="F8_E4M3")}, b"1"), "quantised"),
    "unknown dtype": (raw_safetensors({"a": one(dtype="Q7")}, b"1234"), "unknown type 'Q7'"),
    "wrong size": (raw_safetensors({"a": one(0, 8)}, b"12345678"), "needs 4 bytes"),
    "end before begin": (raw_safetensors({"a": one(4, 0)}, b"1234"), "its offsets give -4"),
    "hole at the start": (raw_safetensors({"a": one(4, 8)}, b"12345678"), "are unused"),
    "hole": (raw_safetensors({"a": one(), "b": one(8, 12)}, b"1" * 12), "are unused"),
    "overlap": (raw_safetensors({"a": one(), "b": one(2, 6)}, b"1" * 6), "overlap"),
    "same bytes twice": (raw_safetensors({"a": one(), "b": one()}, b"1234"), "overlap"),
    "truncated": (raw_safetensors({"a": one()}, b"123"), "truncated"),
    "trailing": (raw_safetensors({"a": one()}, b"1234PK"), "2 bytes after the last tensor"),
    "trailing, no tensors": (raw_safetensors({}, b"1"), "1 bytes after the last tensor"),
    "metadata of numbers": (raw_safetensors({"__metadata__": {"a": 1}}), "strings to strings"),
    "metadata is a list": (raw_safetensors({"__metadata__": []}), "strings to strings"),
    "duplicate tensor": (
        raw_safetensors(f'{{"a": {json.dumps(one())}, "a": {json.dumps(one())}}}', b"1234"),
        "duplicate key 'a'",
    ),
    "duplicate metadata": (
        raw_safetensors('{"__metadata__": {"k": "1", "k": "2"}}'),
        "duplicate key 'k'",
    ),
    "duplicate field": (
        raw_safetensors('{"a": {"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'),
        "duplicate key 'dtype'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_a_next_step(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=r"model\.safetensors") as caught:
        read_header(path)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("header", "data", "remark"),
    [
        ({"__metadata__": None}, b"", "null"),
        ({"a": {**one(), "extra": 1}}, b"1234", "unknown keys"),
        ("{}\n", b"", "padded"),
        ({"a/b": one()}, b"1234", "unusual"),
        ({"x" * 300: one()}, b"1234", "unusual"),
        ({}, b"", "no tensors"),
    ],
)
def test_what_is_only_unusual_is_remarked(
    tmp_path: Path, header: Any, data: bytes, remark: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(header, data))
    assert any(remark in each for each in read_header(path).remarks)


@settings(
    deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_never_lead_to_another_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if kind == "flip" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 9))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    path.write_bytes(bytes(content))
    try:
        header = read_header(path)
    except HeaderError:
        return
    # What we accept, the reference library must accept, with the same tensors.
    theirs = load_file(path)
    assert {n: tuple(t.shape) for n, t in theirs.items()} == {
        n: info.shape for n, info in header.tensors.items()
    }


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_as_header_is_read_or_refused(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(header))
    try:
        assert read_header(path).tensors == {}
    except HeaderError as error:
        assert "x.safetensors" in error.message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match=r"gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(64)}, path)
    info = read_header(path).tensors["a"]
    with path.open("r+b") as stream:
        stream.truncate(info.offset + 8)
    with pytest.raises(HeaderError, match="changed while"):
        TensorFiles().read(info)
