"""Which weight files of an unfinished output are finished: what a later run goes on from.

The journal lies in the hidden folder of the output and lists finished weight files with their
hashes. A run with the same fingerprint takes up those whose bytes are intact. Here: the journal.
Not here: the folder (`claim`), what is written into it (`writer`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from typing import Any, cast

from realign.checkpoint.claim import Claim, sync_folder
from realign.checkpoint.manifest import dump_json, sha256_file
from realign.checkpoint.shards import ShardLayout
from realign.progress import Progress

JOURNAL_NAME = "journal.json"
JOURNAL_SCHEMA = "realign/journal/1"


class Journal:
    """The finished weight files of one output."""

    def __init__(self, claim: Claim, fingerprint: str) -> None:
        """Nothing is read before `take_up`.

        Args:
            claim: the folder.
            fingerprint: of the run; only what a run with the same one has finished is taken up.
        """
        self._claim, self._fingerprint = claim, fingerprint
        self.finished: dict[str, dict[str, Any]] = {}
        """By name: `sha256`, `size` and the writer's `facts`."""

    def take_up(self, progress: Progress) -> None:
        """Find what an interrupted run has finished, remove everything else.

        Args:
            progress: told what is resumed or discarded.
        """
        folder = self._claim.folder
        journal = self._read()
        left = [path for path in folder.iterdir() if path.name != JOURNAL_NAME]
        if journal is not None and journal.get("fingerprint") == self._fingerprint:
            shards = cast(dict[str, dict[str, Any]], journal.get("shards", {}))
            with progress.task(
                "check finished files", total=sum(e["size"] for e in shards.values()), unit="B"
            ) as task:
                for name, entry in shards.items():
                    if self._is_intact(name, entry):
                        self.finished[name] = entry
                    task.advance(entry["size"])
            if self.finished:
                progress.note(
                    f"resuming: {len(self.finished)} weight files of an interrupted run are intact"
                )
        elif left:
            progress.note(f"discarding what another, interrupted run left in {folder}")
        kept = {name.split("/")[0] for name in self.finished}  # weight files may lie in folders
        for path in left:
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._write()

    def is_done(self, layout: ShardLayout) -> bool:
        """Whether this weight file is finished, in this run or by an interrupted one."""
        entry = self.finished.get(layout.filename)
        return entry is not None and entry["size"] == layout.file_size

    def add(self, name: str, *, sha256: str, size: int, facts: Mapping[str, Any]) -> None:
        """Note that a weight file is finished.

        Raises:
            OutputError: the disk is full or not writable, or the folder is not ours any more.
        """
        with self._claim.writing():
            self.finished[name] = {"sha256": sha256, "size": size, "facts": dict(facts)}
            self._write()

    def remove(self) -> None:
        """Take the journal out of an output that is complete."""
        (self._claim.folder / JOURNAL_NAME).unlink()

    def _read(self) -> dict[str, Any] | None:
        try:
            value = json.loads((self._claim.folder / JOURNAL_NAME).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(value, dict):
            return None
        journal = cast(dict[str, Any], value)
        return journal if journal.get("schema") == JOURNAL_SCHEMA else None

    def _is_intact(self, name: str, entry: Mapping[str, Any]) -> bool:
        path = self._claim.folder / name
        return (
            path.is_file()
            and entry["size"] == path.stat().st_size
            and sha256_file(path) == entry["sha256"]
        )

    def _write(self) -> None:
        journal = {
            "schema": JOURNAL_SCHEMA,
            "fingerprint": self._fingerprint,
            "shards": self.finished,
        }
        folder = self._claim.folder
        new = folder / f"{JOURNAL_NAME}.new"
        with self._claim.writing():
            self._claim.write_file(new, dump_json(journal).encode("utf-8"))
            new.replace(folder / JOURNAL_NAME)
            sync_folder(folder)
