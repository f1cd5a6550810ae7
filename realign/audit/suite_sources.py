"""What a user types after `--suite`, read: a core suite, a file of ours, a published file.

Here: which reader a source goes to. Not here: the readers (`core_suites`, `suites`, `loaders`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from realign.audit.anchors import CORE_ANCHORS
from realign.audit.core_suites import CORE_SUITES, core_suite
from realign.audit.loaders import PUBLIC_SUITES, load_public
from realign.audit.suites import Suite, load_suite, parse_suite_argument
from realign.checkpoint.hub_datasets import DATASET_PREFIX, fetch_dataset_file
from realign.errors import SuiteError, UsageError
from realign.progress import SILENT, Progress


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine, and what reports say of it."""

    path: Path
    source: str
    revision: str | None
    """The commit of a file from the Hub."""


def local_file(
    source: str | Path, *, offline: bool = False, progress: Progress = SILENT
) -> LocalFile:
    """The file that a source names: a path as it is, a pinned file of a Hub dataset fetched.

    Raises:
        UsageError: a file of the Hub without its commit.
        NotFoundError: the Hub has no such file, or cannot be asked.
    """
    text = str(source)
    if not text.startswith("hf://"):
        return LocalFile(Path(text), text, None)
    if not text.startswith(DATASET_PREFIX):
        raise UsageError(
            f"{text} is no dataset", f"write {DATASET_PREFIX}org/name@COMMIT/path/to/file"
        )
    found = fetch_dataset_file(text, offline=offline, progress=progress)
    return LocalFile(found.path, text, found.commit)


def read_suites(
    argument: str | Path, *, offline: bool = False, progress: Progress = SILENT
) -> tuple[Suite, ...]:
    """Read one `--suite` argument.

    Args:
        argument: `core-harmful`, `core-safe`, `FILE`, `KIND=FILE` (JSON lines of realign) or
            `NAME=FILE` (a published file). FILE is a path, or
            `hf://datasets/org/name@COMMIT/path`.
        offline: files of the Hub come from the local cache.
        progress: shows a download.

    Returns:
        One suite; XSTest gives two.

    Raises:
        UsageError: no such kind or name, a file that needs one, a file of the Hub without commit.
        SuiteError: the file cannot be read as what it is said to be.
        NotFoundError: the Hub has no such file, or cannot be asked.
    """
    text = str(argument)
    if text in CORE_SUITES:
        return (core_suite(text),)
    if text == CORE_ANCHORS:
        raise SuiteError(
            "core-anchors is no suite: anchors calibrate repairs",
            f"audit {' and '.join(CORE_SUITES)}, which share no prompt with them",
        )
    head, separator, tail = text.partition("=")
    if separator and head in PUBLIC_SUITES:
        file = local_file(tail, offline=offline, progress=progress)
        return load_public(head, file.path, source=file.source, revision=file.revision)
    kind, path = parse_suite_argument(text, known=tuple(PUBLIC_SUITES))
    if path.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        raise UsageError(
            f"--suite {text}: realign's own suites are JSON lines (.jsonl)",
            f"for a published file write NAME={path} with a name of: {', '.join(PUBLIC_SUITES)}",
        )
    file = local_file(path, offline=offline, progress=progress)
    return (load_suite(file.path, kind=kind, source_name=file.source, revision=file.revision),)
