"""What models said, appended item by item to files that an interrupted audit resumes from.

One JSONL file per (role, kind of record, suite). Its first line names the model's content and the
settings; a file made with others is begun anew, never mixed. Texts live here and only here: the
folder is 0700, its files are 0600, and it is removed after a complete audit unless texts are kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from realign.audit.canonical import canonical_json
from realign.errors import OutputError

RECORDS_SCHEMA = "realign/audit-records/1"
FOLDER = "responses"
LOCK = ".audit.lock"


_REPORT = "audit.json"
_SCHEMA = re.compile(r'"schema"\s*:\s*"realign/audit-report/')


def is_audit_folder(out: Path) -> bool:
    """Whether a folder is empty or was begun by an audit, so that another may go on in it.

    An audit leaves its lock (only if it was killed), its records, or its report.
    """
    names = {path.name for path in out.iterdir()}
    if not names or LOCK in names or _holds_records(out / FOLDER):
        return True
    try:
        return _SCHEMA.search((out / _REPORT).read_text("utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _holds_records(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    start = canonical_json({"schema": RECORDS_SCHEMA})[1:-1].encode()
    for file in folder.glob("*.jsonl"):
        with file.open("rb") as stream:
            if start in stream.readline():
                return True
    return not any(folder.iterdir())  # interrupted before its first record


class RecordFile:
    """An append-only file of records, one per item id, that survives an interruption.

    Use as a context manager. Records of an earlier run with the same key are in `known`.
    """

    def __init__(self, path: Path, *, key: Mapping[str, Any]) -> None:
        self._path = path
        self._header = canonical_json({"schema": RECORDS_SCHEMA, "key": dict(key)})
        self._stream: BinaryIO | None = None
        self.known: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> RecordFile:
        end = self._read()
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            self._stream = os.fdopen(descriptor, "r+b")
            self._stream.truncate(end)
            self._stream.seek(end)
            if end == 0:
                self._write(self._header)
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.close()

    def add(self, item_id: str, record: Mapping[str, Any]) -> None:
        """Append one record and hand it to the operating system.

        Raises:
            OutputError: if it cannot be written.
        """
        full = {**record, "id": item_id}
        self._write(canonical_json(full))
        self.known[item_id] = full

    def _write(self, line: str) -> None:
        assert self._stream is not None, "the file is not open"
        try:
            self._stream.write(line.encode("utf-8", "surrogatepass") + b"\n")
            self._stream.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def _read(self) -> int:
        """Load what is whole; the number of bytes worth keeping."""
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        end = 0
        for number, line in enumerate(data.splitlines(keepends=True)):
            if not line.endswith(b"\n"):
                break
            if number == 0:
                if line[:-1] != self._header.encode("utf-8", "surrogatepass"):
                    return 0
            else:
                try:
                    text = line[:-1].decode("utf-8", "surrogatepass")
                    record = cast("dict[str, Any]", json.loads(text))
                    self.known[record["id"]] = record
                except (ValueError, KeyError, TypeError):
                    break
            end += len(line)
        return end


class RecordStore:
    """All records of one audit, below its output folder."""

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER

    def file(self, *, role: str, kind: str, suite: str, key: Mapping[str, Any]) -> RecordFile:
        """The file of one role, kind of record (`text`, `logodds`, ...) and suite.

        Raises:
            OutputError: if the folder cannot be made.
        """
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", suite)[:40]
        digest = hashlib.sha256(suite.encode("utf-8")).hexdigest()[:8]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)
        except OSError as error:
            raise _cannot_write(self.folder, error) from error
        return RecordFile(self.folder / f"{role}.{kind}.{slug}-{digest}.jsonl", key=key)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Keep a second audit out of the folder while this one runs.

        Raises:
            OutputError: another audit is running in it.
        """
        path = self.folder.parent / LOCK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(
                    f"{self.folder.parent}: another audit is running in this folder",
                    "wait for it, or give another --out",
                ) from None
            yield
        finally:
            # Unlinked while still held, so that nobody can hold a lock on a name that is gone.
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def has_answers(self) -> bool:
        """Whether anything that a model said is stored."""
        for file in self.folder.glob("*.jsonl"):
            if ".facts." in file.name:
                continue
            with file.open("rb") as stream:
                stream.readline()
                if stream.readline():
                    return True
        return False

    def remove(self) -> None:
        """Delete every record, texts included."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: cannot be written ({error.strerror})", "check space and permissions"
    )
