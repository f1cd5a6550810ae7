"""The files that a repair reads: what they were when it began, their hashes, and that they stayed.

Weight files are hashed while they are streamed, so their hashes are known only at the end. Until
then a file stands for itself by its identity: that is what an interrupted run compares before it
goes on. Here: the inputs of one run. Not here: identities and hashes of single files
(`realign.checkpoint.identity`, `realign.checkpoint.hashing`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from realign.checkpoint.hashing import HashStore, StreamHashes
from realign.checkpoint.identity import InputGuard, changed
from realign.checkpoint.reader import Checkpoint
from realign.progress import SILENT, Progress

_DECIDING = ("config.json", "adapter_config.json")
"""Small files beside the weights that decide what is read of them."""


class Sources:
    """The input files of one run, watched from now on."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint], *, store: Path | None = None) -> None:
        """Take identities, hash the small files, and watch what is read.

        Args:
            checkpoints: those that are read, by role.
            store: folder in which hashes of files at rest are kept; None: they are not.

        Raises:
            InputChangedError: a file has changed since its header was read.
        """
        self._checkpoints = checkpoints
        weights = {file for each in checkpoints.values() for file in each.weight_files}
        self._guard = InputGuard(sorted(weights))
        for checkpoint in checkpoints.values():
            self._guard.compare(checkpoint.tensors.values())
        self._small = {role: _small_files(each) for role, each in checkpoints.items()}
        self._stream = StreamHashes(None if store is None else HashStore(store))
        self._stream.expect(weights)
        for checkpoint in checkpoints.values():
            checkpoint.watch(self._stream)

    @property
    def identities(self) -> dict[str, dict[str, str]]:
        """What decides the output's bytes, by role and file: identities, or hashes of small files.

        Sorted numbers stand for the paths of weight files: where they lie does not matter.
        """
        found: dict[str, dict[str, str]] = {}
        for role, checkpoint in self._checkpoints.items():
            known = self._guard.identities
            weights = {
                f"{number}/{file.name}": known[file].text()
                for number, file in enumerate(checkpoint.weight_files)
            }
            found[role] = {**self._small[role], **weights}
        return found

    def unhashed(self) -> int:
        """Bytes of weight files that `hashes` would have to read by now."""
        return sum(self._stream.rest(file) for file in self._guard.identities)

    def hashes(self, progress: Progress = SILENT) -> dict[str, Mapping[str, str]]:
        """SHA-256 of every file by role and relative name; reads what nothing has read so far.

        Two files at a time: hashing is bound by the processor, and lets go of the interpreter.
        """
        with ThreadPoolExecutor(max_workers=2) as pool:
            futures = {
                role: pool.submit(each.file_hashes, progress)
                for role, each in self._checkpoints.items()
            }
            return {role: future.result() for role, future in futures.items()}

    def check(self) -> None:
        """Make sure that nothing has changed since.

        Raises:
            InputChangedError: names the file.
        """
        self._guard.check()
        for role, checkpoint in self._checkpoints.items():
            now = _small_files(checkpoint)
            for name, digest in self._small[role].items():
                if now.get(name) != digest:
                    raise changed(checkpoint.folder / name)


def _small_files(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of what travels with the weights and of what says how they are to be read."""
    found: dict[str, str] = {}
    for name, content in checkpoint.sidecars().items():
        data = content if isinstance(content, bytes) else _read(content)
        found[name] = hashlib.sha256(data).hexdigest()
    for number, folder in enumerate(_folders(checkpoint.weight_files)):
        for name in _DECIDING:
            if (folder / name).is_file():
                key = f"{number}/{name}" if number else name
                found[key] = hashlib.sha256(_read(folder / name)).hexdigest()
    return found


def _folders(files: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(file.parent for file in files))


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise changed(file) from error
