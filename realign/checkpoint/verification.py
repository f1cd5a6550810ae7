"""Is a folder still what realign wrote? Its files, tensors and index against its manifest.

Here: the checks, each byte read once for its hash and for finite values alike. Not here: reading
and writing the manifest (`manifest`), whether the repair itself was right (the repair room).
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Literal, cast

from realign.checkpoint.headers import Header, TensorInfo, read_header
from realign.checkpoint.journal import JOURNAL_NAME
from realign.checkpoint.manifest import MANIFEST_NAME, read_manifest, sha256_file
from realign.checkpoint.scan import scan_weights
from realign.checkpoint.sidecars import is_quiet, would_be_loaded
from realign.checkpoint.weights import INDEX_FILE, SINGLE_FILE
from realign.errors import CheckpointError, HeaderError, NotFoundError
from realign.progress import SILENT, Progress, Task

VERIFY_SCHEMA = "realign/verify/1"

_MOST_FILES = 4
_COPY_AGAIN = "copy the file from where it was intact, or repair again"
_INDEX_ADVICE = "copy the index from where it was intact, or repair again"
_NOT_FINITE = "do not use this output: repair again, and report it if it comes back"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as the manifest says."""

    where: str
    """A file's relative name, or a tensor's name."""
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.where} {self.what}"


@dataclass(frozen=True)
class VerifyReport:
    """What checking a folder against its manifest found."""

    folder: Path
    kind: Literal["checkpoint", "patch"]
    checked: int
    """Files compared."""
    tensors: int
    """Tensors found in them."""
    nbytes: int
    """Bytes read."""
    problems: tuple[Problem, ...]
    """Empty when the folder is what the manifest says."""

    @property
    def intact(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report as JSON, schema realign/verify/1."""
        return {
            "schema": VERIFY_SCHEMA,
            "folder": str(self.folder),
            "kind": self.kind,
            "intact": self.intact,
            "files": self.checked,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "problems": [asdict(problem) for problem in self.problems],
        }


def verify_output(folder: Path, progress: Progress = SILENT) -> VerifyReport:
    """Check an output of a repair, or a LoRA patch, against its manifest.

    Checked are the hash of every file, the list of tensors with type and shape, that every
    floating-point number is finite (buffers may hold infinity), that the index leads to the tensors
    where they are, and that nothing was added which a loader would take up. The manifest itself is
    trusted: who can rewrite it can rewrite the hashes.

    Args:
        folder: what a repair wrote.
        progress: shows bytes read.

    Raises:
        NotFoundError: there is no such folder.
        CheckpointError: there is no manifest, or it cannot be read or lists no files.
    """
    manifest = _require_manifest(folder)
    output = _object(manifest.get("output"))
    listed = _object(output.get("files"))
    if not listed or not all(isinstance(digest, str) for digest in listed.values()):
        raise CheckpointError(f"{folder / MANIFEST_NAME} lists no files", "repair again")
    expected = cast(Mapping[str, str], listed)
    present = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    nbytes = sum(present[name].stat().st_size for name in expected if name in present)
    with progress.task(f"verify {folder.name}", total=nbytes, unit="B") as task:
        files = _check_files(expected, present, task)
    # Weights in a folder of their own are a checkpoint of their own, with its own manifest: here
    # their bytes count, not their names.
    own = {name: file for name, file in files.items() if "/" not in name}
    headers = {name: file.header for name, file in own.items() if file.header is not None}
    found = {
        name: info
        for _, header in sorted(headers.items())
        for name, info in sorted(header.tensors.items())
    }
    index = _read_index(present)
    tensors = _object(output.get("tensors"))
    lost = [name for name in own if name.endswith(".safetensors") and name not in headers]
    held = _held(lost, set(tensors) - set(found), index)
    problems = [
        problem for name, file in files.items() for problem in _with_count(file, held[name])
    ]
    problems += _additions(folder, set(present) - set(expected) - {MANIFEST_NAME})
    gone = set[str]().union(*held.values())
    problems += _tensor_problems(found, {n: each for n, each in tensors.items() if n not in gone})
    problems += _index_problems(index, headers, lost=lost)
    return VerifyReport(
        folder=folder,
        kind="patch" if manifest.get("kind") == "patch" else "checkpoint",
        checked=len(expected),
        tensors=len(found),
        nbytes=nbytes,
        problems=tuple(problems),
    )


def _require_manifest(folder: Path) -> Mapping[str, Any]:
    """The manifest, or an error that says what the folder is instead."""
    if not folder.is_dir():
        partial = folder.absolute().parent / f".{folder.name}.realign-partial"
        if partial.is_dir():
            raise NotFoundError(
                f"{folder} does not exist: a repair into it has not finished",
                "run the same repair again, it goes on where it stopped",
            )
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise NotFoundError(f"{folder} {what}", "give the folder that a repair wrote")
    manifest = read_manifest(folder)
    if manifest is not None:
        return manifest
    if (folder / JOURNAL_NAME).is_file() and folder.name.endswith(".realign-partial"):
        raise CheckpointError(
            f"{folder} is what an unfinished repair has left",
            "run the same repair again, it goes on where it stopped; or remove the folder",
        )
    raise CheckpointError(
        f"{folder} has no {MANIFEST_NAME}: only outputs of realign repair can be verified",
        "the manifest is what the folder is compared with; to compare two checkpoints with each "
        "other, use realign diff A B",
    )


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _additions(folder: Path, added: Collection[str]) -> Iterator[Problem]:
    """What a loader would take up though no repair wrote it."""
    for name in sorted(added):
        if would_be_loaded(name):
            yield Problem(name, "was added since", "remove it: a loader may take it up")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # A loader follows the link; what lies behind it can be anything, and change at any time.
        if path.is_symlink() and path.is_dir() and not is_quiet(name):
            yield Problem(
                name, "is a link to a folder, which realign never writes", "remove the link"
            )


@dataclass(frozen=True)
class _File:
    """What was found in one file."""

    header: Header | None
    """Of weight files that can be read."""
    problems: tuple[Problem, ...]


def _check_files(
    expected: Mapping[str, str], present: Mapping[str, Path], task: Task
) -> dict[str, _File]:
    """Every listed file by name, in order; several are read at once."""
    counted = _Counted(task)
    with ThreadPoolExecutor(max_workers=min(_MOST_FILES, os.cpu_count() or 1)) as pool:
        jobs = {
            name: pool.submit(_check_file, name, present.get(name), digest, counted)
            for name, digest in sorted(expected.items())
        }
        try:
            return {name: job.result() for name, job in jobs.items()}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Counted:
    """A task that several threads advance."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._lock = Lock()

    def advance(self, amount: float = 1.0) -> None:
        with self._lock:
            self._task.advance(amount)


def _check_file(name: str, path: Path | None, digest: str, task: Task) -> _File:
    if path is None:
        return _File(None, (Problem(name, "is missing", _COPY_AGAIN),))
    header: Header | None = None
    problems: list[Problem] = []
    if path.suffix == ".safetensors":
        try:
            header = read_header(path)
        except HeaderError as error:
            problems.append(Problem(name, f"cannot be read: {error.message}", _COPY_AGAIN))
    if header is None:
        actual, damaged = sha256_file(path, task.advance), ()
    else:
        actual, damaged = scan_weights(header, task)
    if actual != digest:
        problems.append(Problem(name, "differs from what realign wrote", _COPY_AGAIN))
    problems += [
        Problem(tensor, f"in {name} holds NaN or infinity", _NOT_FINITE) for tensor in damaged
    ]
    return _File(header, tuple(problems))


def _held(
    lost: Sequence[str], missing: Set[str], index: Mapping[str, Any] | Problem | None
) -> Mapping[str, Set[str]]:
    """The missing tensors by the lost file that held them: one problem, not one for each."""
    held: dict[str, set[str]] = defaultdict(set)
    named: Mapping[str, Any] = index if isinstance(index, Mapping) else {}
    for tensor in missing:
        file = named.get(tensor, lost[0] if len(lost) == 1 else None)
        if file in lost:
            held[file].add(tensor)
    return held


def _with_count(file: _File, held: Set[str]) -> tuple[Problem, ...]:
    """The problems of a file; where it is lost, the first says how many tensors went with it."""
    if not file.problems or not held:
        return file.problems
    first, *others = file.problems
    count = f"{len(held)} tensor{'' if len(held) == 1 else 's'}"
    return (replace(first, what=f"{first.what}; it held {count}"), *others)


def _tensor_problems(
    found: Mapping[str, TensorInfo], expected: Mapping[str, Any]
) -> Iterator[Problem]:
    """Differences from the manifest's list; manifests of earlier versions have none."""
    if not expected:
        return
    for name in sorted(set(expected) | set(found)):
        here = found.get(name)
        if here is None:
            yield Problem(name, "is missing: the manifest lists this tensor", _COPY_AGAIN)
        elif name not in expected:
            yield Problem(
                name, f"in {here.file.name} is a tensor the manifest does not list", _COPY_AGAIN
            )
        elif [here.dtype, list(here.shape)] != expected[name]:
            yield Problem(
                name,
                f"in {here.file.name} is {_spelled([here.dtype, list(here.shape)])} instead of "
                f"{_spelled(expected[name])}",
                _COPY_AGAIN,
            )


def _spelled(entry: Any) -> str:
    kind, shape = entry if isinstance(entry, list) and len(cast(Any, entry)) == 2 else (entry, "")
    return f"{kind} {shape}".rstrip()


def _read_index(present: Mapping[str, Path]) -> Mapping[str, Any] | Problem | None:
    """The index's file of every tensor; a problem where it is unreadable, None without one."""
    if INDEX_FILE not in present or SINGLE_FILE in present:
        return None
    try:
        index = json.loads(present[INDEX_FILE].read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        return Problem(INDEX_FILE, f"is not valid JSON: {error}", _INDEX_ADVICE)
    return _object(_object(index).get("weight_map"))


def _index_problems(
    named: Mapping[str, Any] | Problem | None, headers: Mapping[str, Header], *, lost: Sequence[str]
) -> Iterator[Problem]:
    """The index must name exactly the tensors of the shards, each in the file that holds it.

    What it says of files that are lost themselves cannot be checked.
    """
    advice = _INDEX_ADVICE
    if named is None or isinstance(named, Problem):
        if named is not None:
            yield named
        return
    stored = {tensor: file for file, header in headers.items() for tensor in header.tensors}
    for tensor in sorted(set(named) | set(stored)):
        if tensor not in stored and named[tensor] in lost:
            continue
        if tensor not in stored:
            yield Problem(INDEX_FILE, f"names the tensor {tensor}, which no file holds", advice)
        elif named.get(tensor) != stored[tensor]:
            leads = f"leads to {named[tensor]}" if tensor in named else "leads nowhere"
            yield Problem(INDEX_FILE, f"{leads} for {tensor}, which is in {stored[tensor]}", advice)


def _object(value: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}
