"""`realign.json`, file hashes and the digest of a folder: what makes an output checkable.

Here: hashing files, reading and writing the manifest of an output folder, and checking a folder
against its manifest. Not here: what a repair records in it (the repair room decides).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.errors import CheckpointError
from realign.progress import SILENT, Progress

MANIFEST_NAME = "realign.json"
MANIFEST_SCHEMA = "realign/repair-manifest/1"

_CHUNK = 8 * 2**20
_LEFT_OUT_FOLDERS = {".git", ".cache", ".eval_results", "realign-audit"}
_LEFT_OUT_FILES = {"README.md", ".gitattributes"}


def sha256_file(path: Path, advance: Callable[[float], None] | None = None) -> str:
    """SHA-256 of a file as 64 hex digits, read in chunks; `advance` gets the bytes of each."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
            if advance is not None:
                advance(count)
    return digest.hexdigest()


def content_digest(folder: Path) -> str:
    """One digest of a folder's content, stable under writing a report or a model card into it.

    SHA-256 over the lines "<sha256>  <path>" of all files, sorted by path as bytes. Left out:
    version control, caches, evaluation results, the model card and signatures.
    """
    lines: list[tuple[bytes, str]] = []
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        if (
            not path.is_file()
            or set(relative.parts) & _LEFT_OUT_FOLDERS
            or relative.as_posix() in _LEFT_OUT_FILES
            or path.suffix == ".sig"
        ):
            continue
        name = relative.as_posix()
        lines.append((os.fsencode(name), f"{sha256_file(path)}  {name}\n"))
    lines.sort()
    return hashlib.sha256("".join(line for _, line in lines).encode("utf-8")).hexdigest()


def dump_json(value: Mapping[str, Any]) -> str:
    """JSON for files that people read and programs compare: sorted keys, indented, no NaN."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(folder: Path) -> Mapping[str, Any] | None:
    """The manifest of a folder, or None where realign did not write one.

    Raises:
        CheckpointError: the file is there but is no manifest this version can read.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "restore the file") from None
    if not isinstance(value, dict) or cast(dict[str, Any], value).get("schema") != MANIFEST_SCHEMA:
        raise CheckpointError(
            f"{path} is not a {MANIFEST_SCHEMA} manifest", "upgrade realign or restore the file"
        )
    return cast(dict[str, Any], value)


@dataclass(frozen=True)
class VerifyReport:
    """What checking a folder against its manifest found."""

    checked: int
    """Files compared."""
    problems: tuple[str, ...]
    """One sentence each; empty when the folder is what the manifest says."""


def verify_output(folder: Path, progress: Progress = SILENT) -> VerifyReport:
    """Compare every file of an output with the hash in its manifest.

    Raises:
        CheckpointError: there is no manifest, or it lists no files.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(
            f"{folder} has no {MANIFEST_NAME}", "only outputs of realign can be verified"
        )
    output = manifest.get("output")
    files = cast(dict[str, Any], output).get("files") if isinstance(output, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / MANIFEST_NAME} lists no files", "repair again")
    expected = cast(dict[str, str], files)
    problems: list[str] = []
    with progress.task(f"verify {folder.name}", total=len(expected)) as task:
        for name, digest in sorted(expected.items()):
            path = folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif sha256_file(path) != digest:
                problems.append(f"{name} differs from what realign wrote")
            task.advance()
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    problems += [
        f"{name} was added since"
        for name in sorted(present - set(expected) - {MANIFEST_NAME})
        if name.endswith((".safetensors", ".bin"))
    ]
    return VerifyReport(len(expected), tuple(problems))
