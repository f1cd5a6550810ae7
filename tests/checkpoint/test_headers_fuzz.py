"""Damaged, odd and hostile headers: read as the reference library reads them, or refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoint_support import raw_safetensors

from realign.checkpoint.headers import read_header
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.weights import read_tensors
from realign.errors import HeaderError


def bytes_of(tensor: torch.Tensor) -> bytes:
    return (
        bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
    )


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
    assert_read_alike_or_refused(path)


def assert_read_alike_or_refused(path: Path) -> None:
    """What we accept, the reference library must accept, with the same tensors."""
    try:
        header = read_header(path)
    except HeaderError as error:
        assert re.match(r"RA\d{3}: ", error.message) and error.hint
        return
    theirs = load_file(path)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in theirs.items()} == {
        n: (info.torch_dtype, info.shape) for n, info in header.tensors.items()
    }
    files = TensorFiles()
    for name, info in header.tensors.items():
        assert bytes_of(files.read(info)) == bytes_of(theirs[name])
    files.close()


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


NUMBERS = ["0", "1", "2", "4", "8", "16", "-0", "-1", "1.0", "2e0", "9223372036854775807", "[]",
           "9223372036854775808", "18446744073709551616", "true", "null", '"4"']  # fmt: skip
numbers = st.sampled_from(NUMBERS[:6]) | st.sampled_from(NUMBERS)
keys = st.sampled_from(['"a"', '"b"', '"\\u0061"', '"a/b"', '"\\ud83d\\ude00"', '"\\ud83d"', '""'])
extras = st.sampled_from(
    ["", "", "", ', "x": 1', ', "x": -0', ', "x": 1e400', ', "x": NaN', ', "x": {"y": {}}',
     ', "x": "\\ud800"', ', "x": 1, "x": 1', ', "shape": []', ', "dtype": "F32"']
)  # fmt: skip


def _entry(dtype: str, shape: list[str], offsets: list[str], extra: str) -> str:
    return (
        f'{{"dtype": "{dtype}", "shape": [{", ".join(shape)}], '
        f'"data_offsets": [{", ".join(offsets)}]{extra}}}'
    )


entries = st.builds(
    _entry,
    st.sampled_from(["F32", "BF16", "U8", "BOOL", "I64", "F8_E4M3", "F4", "f32", "C64"]),
    st.lists(numbers, max_size=3),
    st.lists(numbers, min_size=2, max_size=2),
    extras,
)


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    tensors=st.lists(st.tuples(keys, entries), max_size=3),
    metadata=st.sampled_from(["", "", '"__metadata__": {"k": "v"}', '"__metadata__": null',
                              '"__metadata__": {"k": 1}', '"__metadata__": {"k": "\\udc00"}']),
    padding=st.sampled_from(["", " ", "   ", "\n", "\t ", "\0"]),
    size=st.sampled_from([0, 1, 2, 4, 8, 16]),
)  # fmt: skip
def test_any_spelling_of_a_header_is_read_as_the_reference_library_reads_it_or_refused(
    tmp_path: Path, tensors: list[tuple[str, str]], metadata: str, padding: str, size: int
) -> None:
    path = tmp_path / "x.safetensors"
    parts = [*filter(None, [metadata]), *(f"{key}: {entry}" for key, entry in tensors)]
    path.write_bytes(raw_safetensors(f"{{{', '.join(parts)}}}{padding}", bytes(range(size))))
    assert_read_alike_or_refused(path)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.binary(max_size=200), honest=st.booleans())
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes, honest: bool) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_safetensors(b"{" + data) if honest else data)
    assert_read_alike_or_refused(path)


@settings(
    deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    index=st.recursive(
        st.none() | st.integers() | st.sampled_from(["a", "one.safetensors", "../x", "x.bin", ""]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["a", "b", "weight_map", "metadata", "total_size"]),
                inner,
                max_size=3,
            )
        ),
        max_leaves=8,
    ),
    cut=st.integers(0, 3),
)
def test_any_index_is_read_or_refused(tmp_path: Path, index: Any, cut: int) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    text = json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text[: len(text) - cut])
    try:
        _, tensors, _ = read_tensors(tmp_path)
    except HeaderError as error:
        assert re.match(r"RA\d{3}: ", error.message) and error.hint
    else:
        assert list(tensors) == ["a"]
