from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from realign.audit.store import RecordFile, RecordStore
from realign.errors import OutputError

KEY = {"model": "m", "generation": {"max_new_tokens": 4}}


def open_file(tmp_path: Path, key: dict[str, Any] | None = None) -> RecordFile:
    return RecordStore(tmp_path).file(
        role="subject", kind="text", suite="a/b c", key=KEY if key is None else key
    )


def only(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "responses").iterdir()
    return path


def test_records_come_back(tmp_path: Path) -> None:
    with open_file(tmp_path) as file:
        file.add("1", {"response": "alpha \ud800 \u00e9"})
        file.add("2", {"response": "a\u2028b\nc"})
    with open_file(tmp_path) as file:
        assert {k: v["response"] for k, v in file.known.items()} == {
            "1": "alpha \ud800 \u00e9",
            "2": "a\u2028b\nc",
        }


def test_another_key_never_mixes(tmp_path: Path) -> None:
    with open_file(tmp_path) as file:
        file.add("1", {"response": "old"})
    with open_file(tmp_path, {"model": "other"}) as file:
        assert file.known == {}
        file.add("1", {"response": "new"})
    with open_file(tmp_path) as file:
        assert file.known == {}  # the older results are gone, not mixed


@pytest.mark.parametrize(
    "tail", [b'{"id":"3","resp', b"\n", b"garbage\n", b"\xff\xfe", b"\xff\n", b"[]\n", b"{}\n"]
)
def test_a_torn_tail_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    with open_file(tmp_path) as file:
        file.add("1", {"response": "x"})
    path = only(tmp_path)
    path.write_bytes(path.read_bytes() + tail)
    with open_file(tmp_path) as file:
        assert set(file.known) == {"1"}
        file.add("2", {"response": "y"})
    with open_file(tmp_path) as file:
        assert set(file.known) == {"1", "2"}


def test_texts_are_private_and_removable(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    with open_file(tmp_path) as file:
        file.add("1", {"response": "x"})
    assert stat.S_IMODE(only(tmp_path).stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "responses").stat().st_mode) == 0o700
    store.remove()
    assert list(tmp_path.iterdir()) == []
    store.remove()


def test_one_audit_per_folder(tmp_path: Path) -> None:
    first, second = RecordStore(tmp_path), RecordStore(tmp_path)
    with first.locked(), pytest.raises(OutputError, match="another audit"), second.locked():
        pass
    with second.locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "responses").write_text("a file")
    with pytest.raises(OutputError):
        open_file(tmp_path)
