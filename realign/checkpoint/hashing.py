"""SHA-256 of weight files, taken from the bytes as they pass by, so that nothing is read twice.

Here: hashing what a reader reads, in order, and the rest of each file when its hash is asked for;
a store of hashes of files that have not changed since. Not here: reading (`pread`), what a manifest
lists (`manifest`).

The store is safe because a hash is kept under the identity of its file (see `identity`), taken
before the first byte was read and again after the last, and only for files that had been at rest:
two changes within one tick of the system's clock cannot hide behind one time.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock

from realign.checkpoint.identity import FileIdentity, identity_of

_CHUNK = 4 * 2**20
_REST_NS = 2 * 10**9
"""A file changed more recently than this, or in the future, is not stored: its clock is coarse."""

_STORED_FROM = 16 * 2**20
"""Smaller files are hashed faster than it is worth keeping a file for them."""


class HashStore:
    """Hashes of files at rest, one small file each, in a private folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, file: Path, identity: FileIdentity) -> str | None:
        """The hash stored for this file in exactly this state, or None."""
        try:
            text = self._entry(file, identity).read_text("ascii")
        except (OSError, ValueError):
            return None
        good = len(text) == 64 and not set(text) - set("0123456789abcdef")
        return text if good else None

    def keep(self, file: Path, identity: FileIdentity, digest: str) -> None:
        """Store a hash; a store that cannot be written is no reason to fail."""
        entry = self._entry(file, identity)
        partial = entry.with_name(f".{entry.name}.{os.getpid()}")
        with suppress(OSError):
            entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial.write_text(digest, "ascii")
            partial.replace(entry)

    def _entry(self, file: Path, identity: FileIdentity) -> Path:
        key = f"{os.fspath(file.resolve())}\0{identity.text()}"
        name = hashlib.sha256(os.fsencode(key)).hexdigest()
        return self._folder / "hashes" / name


class StreamHashes:
    """SHA-256 of files of which some reader reads most bytes, mostly in order.

    `feed` is called with what is read, in any thread.
    """

    def __init__(self, store: HashStore | None = None) -> None:
        self._store = store
        self._files: dict[Path, _FileHash] = {}
        self._lock = Lock()

    def expect(self, files: Iterable[Path]) -> None:
        """Say which files are about to be read: their identities are taken before.

        Raises:
            InputChangedError: one of them is gone.
        """
        for file in files:
            self._of(file)

    def feed(self, file: Path, offset: int, content: memoryview) -> None:
        """Hash what was read from `file` at `offset`, and what was left out before it.

        Bytes that were hashed already are not hashed again, so no order is wrong; out of order
        some bytes are read once more.
        """
        self._of(file).feed(offset, content)

    def digest(self, file: Path, advance: Callable[[float], None] | None = None) -> str:
        """The SHA-256 of the whole file, 64 hex digits; what was not fed is read now.

        Raises:
            OSError: the file cannot be read.
            InputChangedError: it is gone.
        """
        return self._of(file).digest(advance)

    def rest(self, file: Path) -> int:
        """Bytes that `digest` would have to read."""
        return self._of(file).rest()

    def _of(self, file: Path) -> _FileHash:
        with self._lock:
            if file not in self._files:
                self._files[file] = _FileHash(file, self._store)
            return self._files[file]


class _FileHash:
    """One file: a running hash of its first `_at` bytes."""

    def __init__(self, file: Path, store: HashStore | None) -> None:
        self._file = file
        self._identity = identity_of(file)
        at_rest = time.time_ns() - self._identity.ctime_ns > _REST_NS
        kept = store is not None and at_rest and self._identity.size >= _STORED_FROM
        self._store = store if kept else None
        self._known = self._store.find(file, self._identity) if self._store else None
        self._hash = hashlib.sha256()
        self._at = 0
        self._lock = Lock()

    def feed(self, offset: int, content: memoryview) -> None:
        """See `StreamHashes.feed`."""
        end = offset + len(content)
        with self._lock:
            if self._known is not None or end <= self._at:
                return
            if offset > self._at:
                self._read_on(offset, None)
            self._hash.update(content[self._at - offset :])
            self._at = end

    def rest(self) -> int:
        """See `StreamHashes.rest`."""
        return 0 if self._known is not None else max(0, self._identity.size - self._at)

    def digest(self, advance: Callable[[float], None] | None) -> str:
        """See `StreamHashes.digest`."""
        with self._lock:
            if self._known is None:
                self._read_on(None, advance)
                self._known = self._hash.hexdigest()
                if self._store is not None and identity_of(self._file) == self._identity:
                    self._store.keep(self._file, self._identity, self._known)
            return self._known

    def _read_on(self, end: int | None, advance: Callable[[float], None] | None) -> None:
        """Hash the file from where the hash stands up to `end`, by default to its end."""
        buffer = memoryview(bytearray(_CHUNK))
        with self._file.open("rb", buffering=0) as stream:
            stream.seek(self._at)
            while end is None or self._at < end:
                wanted = _CHUNK if end is None else min(_CHUNK, end - self._at)
                count = stream.readinto(buffer[:wanted])
                if not count:
                    return
                self._hash.update(buffer[:count])
                self._at += count
                if advance is not None:
                    advance(count)
