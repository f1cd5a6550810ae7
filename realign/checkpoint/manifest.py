"""`realign.json`, file hashes and the digest of a folder: what makes an output checkable.

Here: hashing files, reading and spelling the manifest of an output folder. Not here: checking a
folder against it (`verification`), what a repair records in it (the repair room decides).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from realign.checkpoint.sidecars import MANIFEST_NAME
from realign.errors import CheckpointError

if TYPE_CHECKING:
    from realign.checkpoint.shards import ShardLayout

__all__ = [
    "MANIFEST_NAME",
    "MANIFEST_SCHEMA",
    "content_digest",
    "dump_json",
    "read_manifest",
    "redact_command",
    "sha256_file",
    "tensor_list",
]

MANIFEST_SCHEMA = "realign/repair-manifest/1"

REDACTED = "***"

_SECRET = r"(?:[a-z0-9_-]*[_-])?(?:token|password|secret|api[_-]?key)"
_SECRET_OPTION = re.compile(rf"--?{_SECRET}", re.IGNORECASE)
_SECRET_VALUE = re.compile(rf"((?:^|[?&;])(?:--?)?{_SECRET}=)[^&#]*", re.IGNORECASE)
# Of hf://org/name@revision the at sign is no user's.
_USER = re.compile(r"((?<![a-z0-9+.-])(?!hf:)[a-z][a-z0-9+.-]*://)[^/?#\s]*@", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")

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


def redact_command(arguments: Sequence[str]) -> tuple[str, ...]:
    """A command line as it may be published: no user in a URL, no value of a token.

    Left out are the user part of URLs, and replaced by *** are the values of options and settings
    named like a token, password, secret or key (`--token X`, `--hub-token=X`, `HF_TOKEN=X`,
    `?token=X`) and access tokens of the Hub wherever they stand.
    """
    found: list[str] = []
    hidden = False
    for argument in arguments:
        if hidden:
            found.append(REDACTED)
            hidden = False
            continue
        hidden = _SECRET_OPTION.fullmatch(argument) is not None
        argument = _SECRET_VALUE.sub(rf"\g<1>{REDACTED}", argument)
        found.append(_HUB_TOKEN.sub(REDACTED, _USER.sub(r"\g<1>", argument)))
    return tuple(found)


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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "restore the file") from None
    if not isinstance(value, dict) or cast(dict[str, Any], value).get("schema") != MANIFEST_SCHEMA:
        raise CheckpointError(
            f"{path} is not a {MANIFEST_SCHEMA} manifest", "upgrade realign or restore the file"
        )
    return cast(dict[str, Any], value)


def tensor_list(layout: Iterable[ShardLayout]) -> dict[str, list[Any]]:
    """What a manifest says of the tensors of an output: name to [dtype, shape]."""
    return {spec.name: [spec.dtype, list(spec.shape)] for shard in layout for spec in shard.tensors}
