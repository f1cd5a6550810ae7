"""Writing a checkpoint so that it appears whole or not at all.

Everything is written into a hidden folder beside the target, `.NAME.realign-partial`, flushed to disk
and renamed. A journal in that folder lists the finished shards with their hashes and the facts that
their tensors left behind, so that an interrupted run with the same fingerprint goes on where it
stopped, and bytes that do not match the journal are written again. The folder is locked: two runs
cannot write one target.

Here: the layout of the output, the streaming shard writer, the atomic folder. Not here: which bytes
to write (the repair room) and which small files travel along (`sidecars`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor

from realign.checkpoint.headers import DTYPES, INDEX_FILE, SINGLE_FILE
from realign.checkpoint.manifest import dump_json, sha256_file
from realign.checkpoint.reader import Checkpoint
from realign.errors import OutputError
from realign.progress import SILENT, Progress

JOURNAL = "journal.json"

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the output: enough to write its header entry."""

    name: str
    dtype: str
    """Safetensors spelling."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class ShardLayout:
    """One output file and its tensors in the order in which they are written."""

    filename: str
    tensors: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, header excluded."""
        return sum(tensor.nbytes for tensor in self.tensors)


def plan_layout(checkpoint: Checkpoint) -> tuple[ShardLayout, ...]:
    """The same files holding the same tensors in the same order as the checkpoint itself.

    An adapter's layout is that of its base, whose tensor names it shows.
    """
    groups: dict[str, list[TensorSpec]] = {}
    for info in checkpoint.tensors.values():
        spec = TensorSpec(info.name, info.dtype, info.shape)
        groups.setdefault(info.file.name, []).append(spec)
    if len(groups) == 1:
        return (ShardLayout(SINGLE_FILE, tuple(*groups.values())),)
    return tuple(ShardLayout(name, tuple(groups[name])) for name in sorted(groups))


def partial_path(target: Path) -> Path:
    """The hidden sibling in which `target` is built."""
    return target.parent / f".{target.name}.realign-partial"


@dataclass
class OutputFolder:
    """A folder being built; a context manager.

    Leaving it after `commit` leaves the finished target. Leaving it by an exception removes
    everything, except for KeyboardInterrupt, which keeps the finished shards for the next run.
    """

    target: Path
    fingerprint: str
    """Identifies inputs, method and parameters: only an equal run resumes."""
    progress: Progress = SILENT
    hashes: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of every file written so far, by name relative to the folder."""

    def __post_init__(self) -> None:
        self.target = Path(os.path.abspath(self.target))  # noqa: PTH100 - resolve() follows links
        self.partial = partial_path(self.target)
        self._journal: dict[str, Any] = {"fingerprint": self.fingerprint, "shards": {}}
        self._lock: int | None = None
        self._committed = False

    def __enter__(self) -> Self:
        """Lock the partial folder and pick up what an equal, interrupted run finished.

        Raises:
            OutputError: the target exists, cannot be written, or another run is writing it.
        """
        if os.path.lexists(self.target):
            raise OutputError(
                f"{self.target} exists already", "choose another folder or remove it first"
            )
        with self._friendly():
            self.partial.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self._resume()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self._committed:
                return
            if kind is not None and issubclass(kind, KeyboardInterrupt) and self._journal["shards"]:
                self.progress.note(
                    f"interrupted: finished shards are kept in {self.partial}; "
                    "run the same command again to go on, or delete that folder"
                )
                return
            shutil.rmtree(self.partial, ignore_errors=True)
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _acquire(self) -> None:
        handle = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another run may have renamed or removed the folder between our open and our lock.
            held = os.fstat(handle).st_ino == self.partial.stat().st_ino
        except OSError:
            held = False
        if not held:
            os.close(handle)
            raise OutputError(
                f"another run is writing {self.target}", "wait for it or choose another folder"
            )
        self._lock = handle

    def _resume(self) -> None:
        try:
            journal = json.loads((self.partial / JOURNAL).read_text("utf-8"))
            shards = cast(dict[str, Any], journal["shards"])
            known = journal["fingerprint"] == self.fingerprint
        except (OSError, ValueError, KeyError, TypeError):
            shards, known = {}, False
        keep = {JOURNAL, *shards} if known else set[str]()
        for path in self.partial.iterdir():
            if path.name not in keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, record in shards.items() if known else ():
            path = self.partial / name
            if path.is_file() and sha256_file(path) == record["sha256"]:
                self._journal["shards"][name] = record
                self.hashes[name] = record["sha256"]
                self.progress.note(f"resumed: {name} is already written")

    def finished(self, layout: ShardLayout) -> Mapping[str, Any] | None:
        """The facts of a shard that an earlier run finished, or None where it must be written."""
        record = self._journal["shards"].get(layout.filename)
        return None if record is None else cast(Mapping[str, Any], record["facts"])

    @contextmanager
    def shard(self, layout: ShardLayout) -> Iterator[ShardWriter]:
        """Write one file; on leaving, it is complete, flushed and in the journal.

        Raises:
            OutputError: the disk is full or refuses.
        """
        path = self.partial / layout.filename
        with self._friendly():
            # The mode leaves room for the umask, unlike that of the reference writer (0600).
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            writer = ShardWriter(handle, layout, self._friendly)
            yield writer
            digest = writer.finish()
        finally:
            os.close(handle)
        self.hashes[layout.filename] = digest
        self._journal["shards"][layout.filename] = {"sha256": digest, "facts": writer.facts}
        self._write_journal()

    def _write_journal(self) -> None:
        with self._friendly():
            fresh = self.partial / (JOURNAL + ".new")
            _write_flushed(fresh, dump_json(self._journal).encode("utf-8"))
            fresh.replace(self.partial / JOURNAL)

    def copy_file(self, source: Path, name: str) -> None:
        """Copy one small file byte for byte under `name` (relative, forward slashes)."""
        with self._friendly():
            self.write_bytes(name, source.read_bytes())

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write one small file under `name` (relative, forward slashes)."""
        with self._friendly():
            path = self.partial / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_flushed(path, data)
            self.hashes[name] = hashlib.sha256(data).hexdigest()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write one JSON file in canonical order."""
        self.write_bytes(name, dump_json(value).encode("utf-8"))

    def write_index(self, layouts: Sequence[ShardLayout]) -> None:
        """Write the index of a sharded checkpoint; a single file needs none."""
        if len(layouts) == 1 and layouts[0].filename == SINGLE_FILE:
            return
        self.write_json(
            INDEX_FILE,
            {
                "metadata": {"total_size": sum(layout.nbytes for layout in layouts)},
                "weight_map": {t.name: layout.filename for layout in layouts for t in layout.tensors},
            },
        )

    def commit(self) -> Path:
        """Make the folder appear under its name, whole.

        Raises:
            OutputError: the target appeared meanwhile, or the file system refuses.
        """
        with self._friendly():
            (self.partial / JOURNAL).unlink(missing_ok=True)
            for folder in {self.partial, *(p for p in self.partial.rglob("*") if p.is_dir())}:
                _flush_folder(folder)
            if os.path.lexists(self.target):
                raise OutputError(
                    f"{self.target} appeared while the run was writing it",
                    "choose another folder or remove it first",
                )
            self.partial.rename(self.target)
            self._committed = True
            _flush_folder(self.target.parent)
        return self.target

    @contextmanager
    def _friendly(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _explain(error, self.target) from None


def _explain(error: OSError, target: Path) -> OutputError:
    if error.errno in _FULL:
        return OutputError(
            f"the disk is full (or a limit is reached) while writing {target}; nothing was kept",
            "free space or choose another disk",
        )
    if error.errno in _DENIED:
        return OutputError(
            f"{target} cannot be written: {error.strerror}", "check the permissions of its folder"
        )
    return OutputError(f"writing {target} failed: {error}", "choose another folder")


class ShardWriter:
    """One safetensors file written front to back, its hash computed on the way."""

    def __init__(
        self, handle: int, layout: ShardLayout, friendly: Callable[[], Any]
    ) -> None:
        self.facts: dict[str, Any] = {}
        """JSON-able remarks kept in the journal with this shard (report rows of its tensors)."""
        self._handle = handle
        self._friendly = friendly
        self._digest = hashlib.sha256()
        self._queue = [(spec, spec.nbytes) for spec in reversed(layout.tensors)]
        self._put(_header(layout))

    def write(self, name: str, piece: Tensor) -> None:
        """Append a tensor or its next rows; tensors come in the order of the layout.

        Args:
            name: the tensor this piece belongs to.
            piece: any shape; its bytes follow those written before.
        """
        while self._queue and self._queue[-1][1] == 0:
            self._queue.pop()
        assert self._queue, f"{name}: the shard is already complete"
        spec, left = self._queue[-1]
        assert spec.name == name, f"expected {spec.name}, got {name}"
        assert piece.dtype == DTYPES[spec.dtype], f"{name}: {piece.dtype} is not {spec.dtype}"
        data = memoryview(
            piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        )
        assert len(data) <= left, f"{name}: {len(data)} bytes given, {left} expected"
        self._queue[-1] = (spec, left - len(data))
        self._put(data)

    def finish(self) -> str:
        """Flush to disk and return the SHA-256 of the whole file."""
        missing = [spec.name for spec, left in self._queue if left]
        assert not missing, f"not written: {missing}"
        with self._friendly():
            os.fsync(self._handle)
        return self._digest.hexdigest()

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._digest.update(view)
        with self._friendly():
            while view:
                view = view[os.write(self._handle, view) :]


def _header(layout: ShardLayout) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in layout.tensors:
        end = position + spec.nbytes
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensor data start on an 8-byte boundary
    return struct.pack("<Q", len(text)) + text


def _write_flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
