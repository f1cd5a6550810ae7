"""One file of a Hub dataset, at a commit that the user names: hf://datasets/org/name@COMMIT/path.

A suite that may change under its name is no instrument, so branches and tags are refused, with the
commit they point to now. Fetched through the cache that models use; the same variables apply.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from realign.checkpoint.hub import cache_folder, explain, is_offline, progress_bar
from realign.checkpoint.reference import Reference
from realign.errors import RealignError, UsageError
from realign.progress import SILENT, Progress

DATASET_PREFIX = "hf://datasets/"

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_URL = re.compile(
    rf"hf://datasets/(?P<name>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?/(?P<file>.+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class DatasetFile:
    """A file that lies in the local cache, and where it comes from."""

    path: Path
    commit: str
    source: str
    """As typed."""


def fetch_dataset_file(
    text: str, *, offline: bool = False, progress: Progress = SILENT
) -> DatasetFile:
    """Find one file of a dataset, downloading it where the cache lacks it.

    Args:
        text: `hf://datasets/org/name@<40 hexadecimal digits>/path`.
        offline: answer from the local cache only.
        progress: shows the download in bytes.

    Raises:
        UsageError: the text has another form, or names a branch, a tag or no revision at all; the
            hint shows the commit where the Hub can be asked.
        NotFoundError: there is no such file, access is denied, or the Hub cannot be reached.
        CheckpointError: the file cannot be stored.
    """
    found = _URL.fullmatch(text)
    if found is None or ".." in PurePosixPath(found["file"]).parts:
        raise UsageError(
            f"{text} names no file of a dataset", "write hf://datasets/org/name@COMMIT/path/to/file"
        )
    name, revision, file = found["name"], found["revision"], found["file"]
    offline = is_offline(offline)
    if revision is None or not _COMMIT.fullmatch(revision):
        raise _unpinned(name, revision, file, offline=offline)
    from huggingface_hub import hf_hub_download

    try:
        with (
            progress.task(f"fetch {name}/{file}", total=None, unit="B") as task,
            warnings.catch_warnings(),
        ):
            # If it is so, the error follows, and is the one thing to be said.
            warnings.filterwarnings("ignore", message="Not enough free disk space")
            path = hf_hub_download(
                name,
                file,
                repo_type="dataset",
                revision=revision,
                cache_dir=cache_folder(),
                endpoint=_endpoint(),
                library_name="realign",
                local_files_only=offline,
                tqdm_class=progress_bar(task),
            )
    except Exception as error:
        # The client's transport errors are no public names of it, so they cannot be listed here.
        raise _explained(error, name, revision, text) from error
    return DatasetFile(Path(path), revision, text)


def _unpinned(name: str, revision: str | None, file: str, *, offline: bool) -> UsageError:
    """Say which commit to name; without the Hub, only that one must be named."""
    at = f"{DATASET_PREFIX}{name}"
    written = f"{at}@{revision}/{file}" if revision else f"{at}/{file}"
    says = f"names {revision!r}, which can move" if revision else "names no commit"
    message = f"{written} {says}: a suite from the Hub is pinned to a commit"
    if offline:
        return UsageError(message, f"write {at}@COMMIT/{file} with the 40 digits of the commit")
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=_endpoint(), library_name="realign").dataset_info(
            name, revision=revision
        )
    except Exception as error:
        raise _explained(error, name, revision, written) from error
    return UsageError(message, f"its commit now: write {at}@{info.sha}/{file}")


def _explained(error: Exception, name: str, revision: str | None, text: str) -> RealignError:
    reference = Reference(text, name, revision, None, False)
    return explain(error, reference, text, kind="dataset")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None
