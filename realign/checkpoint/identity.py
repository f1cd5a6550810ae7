"""Which file it was: identities of input files, and the check that none changed meanwhile.

A file's identity is what its file system says of it (device, inode, size, times of the last change
of content and of the inode). Programs cannot set the last of these, so whatever writes to a file,
replaces it or sets its times back changes its identity. Here: identities and comparing them. Not
here: hashes of contents (`hashing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from realign.checkpoint.headers import TensorInfo, read_header
from realign.errors import CheckpointError, InputChangedError


@dataclass(frozen=True)
class FileIdentity:
    """What a file system says of one file."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    """Last change of the content."""
    ctime_ns: int
    """Last change of content, name, rights or times; set by the system alone."""

    def text(self) -> str:
        """The identity as one word, for keys and fingerprints."""
        return f"{self.device}-{self.inode}-{self.size}-{self.mtime_ns}-{self.ctime_ns}"


class InputGuard:
    """Remembers weight files as they are now; says later whether one of them changed."""

    def __init__(self, files: Iterable[Path]) -> None:
        """Take identities and headers.

        Raises:
            InputChangedError: a file is gone, or its header is no longer one.
        """
        self.identities: Mapping[Path, FileIdentity] = {file: identity_of(file) for file in files}
        self._headers = {file: _header(file) for file in self.identities}

    def compare(self, tensors: Iterable[TensorInfo]) -> None:
        """Compare with what headers said when they were read first.

        Args:
            tensors: as they were read from the guarded files; others are passed over.

        Raises:
            InputChangedError: names the first file that says something else by now.
        """
        for info in tensors:
            header = self._headers.get(info.file)
            if header is not None and info.name in header and header[info.name] != info:
                raise changed(info.file)

    def check(self) -> None:
        """Compare with the files as they are now.

        Raises:
            InputChangedError: names the first file that changed.
        """
        for file, identity in self.identities.items():
            if identity_of(file) != identity or _header(file) != self._headers[file]:
                raise changed(file)


def changed(file: Path) -> InputChangedError:
    """What to tell of a file that is no longer what it was when the run began."""
    return InputChangedError(
        f"{file} changed while it was being read: the result would mix two checkpoints",
        "nothing was written; wait until no program writes to that folder, then run again",
    )


def identity_of(file: Path) -> FileIdentity:
    """The identity of what a path leads to, through symbolic links.

    Raises:
        InputChangedError: nothing is there any more.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise changed(file) from error
    return FileIdentity(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def _header(file: Path) -> Mapping[str, TensorInfo]:
    try:
        return read_header(file).tensors
    except CheckpointError as error:
        raise changed(file) from error
