"""Where realign keeps what it need not work out twice: activation statistics, hashes of files."""

from __future__ import annotations

import os
from pathlib import Path

from realign.errors import OutputError


def cache_folder(asked: str | Path | None = None) -> Path:
    """Where statistics are kept: as asked, REALIGN_CACHE, or realign/ in the user's cache.

    Made for the user alone. One that exists keeps its rights: the files in it are private.

    Raises:
        OutputError: the folder cannot be made.
    """
    if asked is None:
        asked = os.environ.get("REALIGN_CACHE")
    if asked is None:
        home = os.environ.get("XDG_CACHE_HOME")
        asked = (Path(home) if home else Path.home() / ".cache") / "realign"
    folder = Path(asked)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache folder {folder} cannot be made ({error.strerror})",
            "name another one in the environment variable REALIGN_CACHE",
        ) from error
    return folder


def hash_store(asked: str | Path | None = None) -> Path | None:
    """The cache folder for hashes of files; None where there can be none: they are only a help."""
    try:
        return cache_folder(asked)
    except OutputError:
        return None
