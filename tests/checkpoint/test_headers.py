"""The strict container parser against the reference library and against damage of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.checkpoint_support import raw_safetensors

from realign.checkpoint.headers import DTYPES, read_header
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.rules import RULES
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


BROKEN: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "RA001", "0 bytes, fewer than the 8-byte length"),
    "short": (b"1234567", "RA001", "7 bytes"),
    "huge length": ((2**40).to_bytes(8, "little") + b"{}", "RA002", "exceeds 100000000"),
    "longest length": (b"\xff" * 8 + b"{}", "RA002", "exceeds 100000000"),
    "git lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "RA002",
        "Git LFS pointer",
    ),
    "renamed gguf": (b"GGUF\3\0\0\0" + bytes(64), "RA002", "GGUF file"),
    "renamed torch zip": (b"PK\x03\x04" + bytes(64), "RA004", "zip archive"),
    "renamed pickle": (b"\x80\x02}q\x00" + b"." * 64, "RA002", "a pickle"),
    "web page": (b"<!DOCTYPE html><html></html>", "RA002", "web page"),
    "length past the end": ((100).to_bytes(8, "little") + b"{}", "RA004", "the file has 10"),
    "html as header": (raw_safetensors("<html></html>"), "RA005", "does not start with"),
    "blank first": (raw_safetensors(" {}"), "RA005", "0x20"),
    "no header": (raw_safetensors(""), "RA005", "it is empty"),
    "byte order mark": (raw_safetensors("\ufeff{}"), "RA005", "0xef"),
    "bad utf-8": (raw_safetensors(b'{"\xff": 1}'), "RA006", "not valid UTF-8 at byte 2"),
    "no json": (raw_safetensors('{"a":'), "RA007", "not valid JSON"),
    "garbage padding": (raw_safetensors("{} x"), "RA007", "not valid JSON"),
    "zero padding": (raw_safetensors("{}\0\0"), "RA007", "not valid JSON"),
    "deep": (raw_safetensors('{"a":' * 60000), "RA007", "not valid JSON"),
    "deep beside": (
        raw_safetensors({"a": {**one(), "x": json.loads("[" * 80 + "]" * 80)}}, b"1234"),
        "RA007",
        "too deeply",
    ),
    "many digits": (raw_safetensors('{"a":' + "9" * 5000 + "}"), "RA007", "not valid JSON"),
    "not a number": (raw_safetensors('{"a":NaN}'), "RA007", "NaN is no JSON number"),
    "infinite": (raw_safetensors('{"a":1e999}'), "RA007", "1e999 is no JSON number"),
    "surrogate": (raw_safetensors('{"\\ud800": 1}'), "RA007", "not valid Unicode"),
    "surrogate in metadata": (
        raw_safetensors('{"__metadata__": {"a": "\\udfff"}}'),
        "RA007",
        "not valid Unicode",
    ),
    "control character": (raw_safetensors(b'{"a\nb": {}}'), "RA007", "not valid JSON"),
    "entry is a list": (raw_safetensors({"a": []}), "RA007", "not an object"),
    "no dtype": (
        raw_safetensors({"a": {"shape": [], "data_offsets": [0, 0]}}),
        "RA007",
        "lacks a proper",
    ),
    "negative shape": (raw_safetensors({"a": one(shape=[-1])}, b"1234"), "RA007", "lacks a proper"),
    "fraction": (raw_safetensors({"a": one(shape=[1.0])}, b"1234"), "RA007", "lacks a proper"),
    "minus zero": (
        raw_safetensors('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}'),
        "RA007",
        "lacks a proper",
    ),
    "boolean shape": (raw_safetensors({"a": one(shape=[True])}, b"1234"), "RA007", "lacks"),
    "three offsets": (
        raw_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"1234"),
        "RA007",
        "lacks a proper",
    ),
    "duplicate tensor": (
        raw_safetensors(f'{{"a": {json.dumps(one())}, "a": {json.dumps(one())}}}', b"1234"),
        "RA008",
        "duplicate key 'a'",
    ),
    "duplicate tensor, escaped": (
        raw_safetensors(f'{{"a": {json.dumps(one())}, "\\u0061": {json.dumps(one())}}}', b"1234"),
        "RA008",
        "duplicate key 'a'",
    ),
    "duplicate metadata": (
        raw_safetensors('{"__metadata__": {"k": "1", "k": "2"}}'),
        "RA008",
        "duplicate key 'k'",
    ),
    "two metadata": (
        raw_safetensors('{"__metadata__": {}, "__metadata__": {}}'),
        "RA008",
        "duplicate key '__metadata__'",
    ),
    "duplicate field": (
        raw_safetensors('{"a": {"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}'),
        "RA008",
        "duplicate key 'dtype'",
    ),
    "unknown dtype": (raw_safetensors({"a": one(dtype="Q7")}, b"1234"), "RA010", "type 'Q7'"),
    "overflowing shape": (
        raw_safetensors({"a": one(shape=[2**62, 2**62])}, b"1234"),
        "RA011",
        "overflows",
    ),
    "overflow before a zero": (
        raw_safetensors({"a": one(0, 0, shape=[2**62, 2**62, 0])}),
        "RA011",
        "overflows",
    ),
    "overflow in bits": (raw_safetensors({"a": one(0, 0, shape=[0, 2**60])}), "RA011", "overflows"),
    "half a byte": (
        raw_safetensors({"a": one(0, 1, dtype="F4", shape=[3])}, b"1"),
        "RA011",
        "whole number of bytes",
    ),
    "wrong size": (raw_safetensors({"a": one(0, 8)}, b"12345678"), "RA011", "needs 4 bytes"),
    "end before begin": (raw_safetensors({"a": one(4, 0)}, b"1234"), "RA011", "offsets give -4"),
    "hole at the start": (raw_safetensors({"a": one(4, 8)}, b"12345678"), "RA012", "are unused"),
    "hole": (raw_safetensors({"a": one(), "b": one(8, 12)}, b"1" * 12), "RA012", "are unused"),
    "overlap": (raw_safetensors({"a": one(), "b": one(2, 6)}, b"1" * 6), "RA012", "overlap"),
    "same bytes twice": (raw_safetensors({"a": one(), "b": one()}, b"1234"), "RA012", "overlap"),
    "empty inside another": (
        raw_safetensors({"a": one(), "b": one(2, 2, shape=[0])}, b"1234"),
        "RA012",
        "overlap",
    ),
    "truncated": (raw_safetensors({"a": one()}, b"123"), "RA013", "truncated"),
    "trailing": (raw_safetensors({"a": one()}, b"1234PK"), "RA014", "2 bytes after"),
    "trailing, no tensors": (raw_safetensors({}, b"1"), "RA014", "1 bytes after"),
    "metadata of numbers": (
        raw_safetensors({"__metadata__": {"a": 1}}),
        "RA015",
        "strings to strings",
    ),
    "metadata is a list": (raw_safetensors({"__metadata__": []}), "RA015", "strings to strings"),
    "quantised": (raw_safetensors({"a": one(0, 1, dtype="F8_E4M3")}, b"1"), "RA035", "quantised"),
    "packed": (
        raw_safetensors({"a": one(0, 1, dtype="F4", shape=[2])}, b"1"),
        "RA035",
        "quantised",
    ),
    "corrupt and quantised": (
        raw_safetensors({"a": one(0, 1, dtype="F8_E4M3")}, b"12"),
        "RA014",
        "after the last tensor",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_rule_its_name_and_a_next_step(
    tmp_path: Path, name: str
) -> None:
    content, rule, message = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert caught.value.message.startswith(f"{rule}: {path}: ")
    assert message in caught.value.message
    assert caught.value.hint
    assert RULES[rule].severity in "CE"


def test_every_refusing_rule_of_the_container_has_a_hostile_file() -> None:
    container = {rule.id for rule in RULES.values() if rule.id < "RA020" and rule.severity in "CE"}
    assert container | {"RA035"} == {rule for _, rule, _ in BROKEN.values()}


UNUSUAL: dict[str, tuple[Any, bytes, str, str]] = {
    "null metadata": ({"__metadata__": None}, b"", "RA009", "null"),
    "extra key": ({"a": {**one(), "extra": 1}}, b"1234", "RA009", "unknown keys"),
    "newline as padding": ("{}\n", b"", "RA009", "padded"),
    "unaligned": ({"a": one()}, b"1234", "RA016", "8-byte boundary"),
    "no tensors": ({}, b"", "RA017", "no tensors"),
    "path": ({"a/b": one()}, b"1234", "RA018", "unusual"),
    "path up": ({"..": one()}, b"1234", "RA018", "unusual"),
    "control": ({"a\x1b[31m": one()}, b"1234", "RA018", "\\x1b"),
    "long": ({"x" * 300: one()}, b"1234", "RA018", "unusual"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_only_unusual_is_remarked(tmp_path: Path, name: str) -> None:
    header, data, rule, remark = UNUSUAL[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(header, data))
    (found,) = [each for each in read_header(path).remarks if each.startswith(f"{rule}: {path}: ")]
    assert remark in found and found.isprintable()


def test_a_header_that_the_hubs_client_refuses_is_remarked(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors("{" + " " * 25_000_000 + "}"))
    assert any(each.startswith("RA003: ") for each in read_header(path).remarks)


def test_what_is_legal_draws_no_remark(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = {
        "last": one(8, 12, shape=[]),
        "empty": one(4, 4, shape=[0, 7]),
        "middle": one(4, 8),
        "first": one(0, 4),
    }
    text = json.dumps({"__metadata__": {}, **entries})
    path.write_bytes(raw_safetensors(text + " " * (-len(text) % 8), b"1" * 12))
    header = read_header(path)
    assert list(header.tensors) == ["first", "empty", "middle", "last"]
    assert header.remarks == ()


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
