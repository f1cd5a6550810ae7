"""That a patch stays what it was when it was opened, for as long as it is read.

A patch is small, so it is hashed at once; its files are compared again before an output gets its
name. Here: the files of one patch. Not here: those of models (`sources`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from realign.checkpoint.headers import read_header
from realign.checkpoint.identity import InputGuard, changed
from realign.checkpoint.manifest import MANIFEST_NAME, read_manifest, sha256_file
from realign.checkpoint.reader import read_json_object
from realign.checkpoint.sidecars import folder_sidecars
from realign.errors import CheckpointError
from realign.repair.patch_content import ADAPTER_CONFIG
from realign.repair.patch_file import PatchFile


class PatchGuard:
    """The files of one opened patch, watched from now on.

    As a context manager it names a changed file as the reason for an error inside the context.
    """

    def __init__(self, patch: PatchFile) -> None:
        """Take identities and hashes, then compare with what was parsed when it was opened.

        Raises:
            InputChangedError: names a file that says something else by now.
        """
        self._patch = patch
        self._weights = InputGuard([patch.weights])
        self._small = self._hash_small()
        self._compare()
        self.digest = self._digest()
        """SHA-256 of the weight file."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides an output made from the patch: SHA-256 of each of its files."""
        return {"weights": self.digest, **self._small}

    def check(self) -> None:
        """Make sure that nothing has changed since.

        Raises:
            InputChangedError: names the file.
        """
        self._weights.check()
        now = self._hash_small()
        for name in sorted(now.keys() | self._small.keys()):
            if now.get(name) != self._small.get(name):
                raise changed(self._patch.folder / name)

    def _compare(self) -> None:
        patch = self._patch
        try:
            if dict(read_header(patch.weights).tensors) != dict(patch.tensors):
                raise changed(patch.weights)
            if _differ(read_json_object(patch.folder / ADAPTER_CONFIG), patch.config):
                raise changed(patch.folder / ADAPTER_CONFIG)
            if _differ(read_manifest(patch.folder), patch.manifest):
                raise changed(patch.folder / MANIFEST_NAME)
        except CheckpointError:
            self.check()  # gone or damaged between two looks at it
            raise

    def _digest(self) -> str:
        try:
            return sha256_file(self._patch.weights)
        except OSError as error:
            raise changed(self._patch.weights) from error

    def _hash_small(self) -> dict[str, str]:
        folder = self._patch.folder
        try:
            files = folder_sidecars(folder)
            own = {name: folder / name for name in (ADAPTER_CONFIG, MANIFEST_NAME)}
            files |= {name: path for name, path in own.items() if path.is_file()}
            return {
                name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
            }
        except OSError as error:
            raise changed(folder) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell the reason of an error, where it is a file that changed."""
        if isinstance(error, Exception):
            self.check()


def _differ(one: Mapping[str, Any] | None, two: Mapping[str, Any] | None) -> bool:
    """Whether two parsed files differ; as text, because NaN differs from itself as a number."""
    return json.dumps(dict(one or {})) != json.dumps(dict(two or {}))
