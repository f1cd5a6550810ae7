from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realign.checkpoint import hashing
from realign.checkpoint.hashing import HashStore, StreamHashes
from realign.checkpoint.identity import identity_of
from realign.errors import InputChangedError

CONTENT = os.urandom(10_000)


def _feed(hashes: StreamHashes, file: Path, start: int, stop: int) -> None:
    hashes.feed(file, start, memoryview(file.read_bytes())[start:stop])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hash") / "weights"
    path.write_bytes(CONTENT)
    return path


@given(
    ranges=st.lists(
        st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)).map(sorted), max_size=8
    )
)
def test_any_order_gives_the_hash_of_the_file(file: Path, ranges: list[list[int]]) -> None:
    hashes = StreamHashes()
    for start, stop in ranges:
        _feed(hashes, file, start, stop)
    assert hashes.digest(file) == hashlib.sha256(CONTENT).hexdigest()


def test_what_was_read_in_order_is_not_read_again(file: Path) -> None:
    hashes = StreamHashes()
    for start in range(8, 10_000, 999):
        _feed(hashes, file, start, min(start + 999, 10_000))
    assert hashes.rest(file) == 0
    seen: list[float] = []
    hashes.digest(file, seen.append)
    assert seen == []
    half = StreamHashes()
    _feed(half, file, 0, 4_000)
    half.digest(file, seen.append)
    assert sum(seen) == half.rest(file) + 6_000 and half.rest(file) == 0


def test_a_file_that_is_gone_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(InputChangedError, match="gone"):
        StreamHashes().expect([tmp_path / "gone"])


# --- the store -----------------------------------------------------------------------------------


@pytest.fixture
def at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of any size counts as large, and as at rest after a moment."""
    monkeypatch.setattr(hashing, "_STORED_FROM", 1)
    monkeypatch.setattr(hashing, "_REST_NS", 20_000_000)
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    time.sleep(0.05)
    return path


def test_a_file_at_rest_is_hashed_once(at_rest: Path, tmp_path: Path) -> None:
    store = HashStore(tmp_path / "cache")
    first = StreamHashes(store).digest(at_rest)
    again = StreamHashes(store)
    assert again.rest(at_rest) == 0
    assert again.digest(at_rest) == first == hashlib.sha256(CONTENT).hexdigest()


def test_any_change_is_seen_even_where_size_and_time_are_put_back(
    at_rest: Path, tmp_path: Path
) -> None:
    store = HashStore(tmp_path / "cache")
    StreamHashes(store).digest(at_rest)
    times = at_rest.stat()
    other = bytes(reversed(CONTENT))
    at_rest.write_bytes(other)
    os.utime(at_rest, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(0.05)
    assert at_rest.stat().st_mtime_ns == times.st_mtime_ns
    assert StreamHashes(store).digest(at_rest) == hashlib.sha256(other).hexdigest()


def test_a_file_just_written_is_not_stored(at_rest: Path, tmp_path: Path) -> None:
    at_rest.write_bytes(CONTENT)
    StreamHashes(HashStore(tmp_path / "cache")).digest(at_rest)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_stored(
    at_rest: Path, tmp_path: Path
) -> None:
    hashes = StreamHashes(HashStore(tmp_path / "cache"))
    hashes.expect([at_rest])
    at_rest.write_bytes(bytes(reversed(CONTENT)))
    hashes.digest(at_rest)
    assert not (tmp_path / "cache").exists()


def test_a_damaged_or_impossible_store_is_passed_over(at_rest: Path, tmp_path: Path) -> None:
    store = HashStore(tmp_path / "cache")
    store.keep(at_rest, identity_of(at_rest), "nonsense")
    assert StreamHashes(store).digest(at_rest) == hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "file").write_text("")
    nowhere = StreamHashes(HashStore(tmp_path / "file"))
    assert nowhere.digest(at_rest) == hashlib.sha256(CONTENT).hexdigest()
