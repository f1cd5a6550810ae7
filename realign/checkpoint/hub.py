"""From a reference to a folder on this machine: local paths as they are, Hub ids pinned to a commit.

A branch or tag is resolved once to a 40-hex commit and everything is fetched at that commit, so a
branch that moves during a run changes nothing. Environment variables of huggingface_hub (HF_TOKEN,
HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, ...) mean what they mean there.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from realign.checkpoint.reference import Reference
from realign.errors import CheckpointError, NotFoundError
from realign.progress import SILENT, Progress

FETCH = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.py",
    "*.md",
    "LICENSE*",
)
"""What a checkpoint needs. Python files are copied with it and never executed."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Resolved:
    """Where a reference leads."""

    folder: Path
    commit: str | None
    """40 hex digits for a Hub id, None for a local folder."""
    source: str


def is_offline(offline: bool) -> bool:
    """Whether the network is ruled out by argument or environment."""
    wanted = {"1", "ON", "YES", "TRUE"}
    return offline or any(
        os.environ.get(name, "").upper() in wanted
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def resolve(
    reference: Reference, *, offline: bool = False, progress: Progress = SILENT
) -> Resolved:
    """Find the folder of a reference, downloading it where it is a Hub id.

    Raises:
        NotFoundError: nothing is there, access is denied, or the Hub cannot be reached.
        CheckpointError: the path is a file.
    """
    if reference.is_local:
        folder = Path(reference.model).expanduser().resolve()
        if not folder.is_dir():
            raise CheckpointError(
                f"{reference.text} is a file, not a model folder", "give the folder that holds it"
            )
        return Resolved(folder, None, reference.text)
    return _fetch(reference, offline=is_offline(offline), progress=progress)


def _fetch(reference: Reference, *, offline: bool, progress: Progress) -> Resolved:
    # Imported here: the client pulls in an HTTP stack that local folders never need.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = reference.model, reference.revision
    at = f"{name}@{revision}" if revision else name
    try:
        commit = revision
        if not offline and not _COMMIT.fullmatch(revision or ""):
            commit = HfApi().model_info(name, revision=revision).sha
        progress.note(f"{at}: {'from the local cache' if offline else f'commit {commit}'}")
        folder = Path(
            snapshot_download(
                name,
                revision=commit,
                allow_patterns=list(FETCH),
                local_files_only=offline,
                library_name="realign",
            )
        )
    except GatedRepoError:
        raise NotFoundError(
            f"{at} is gated and this token has no access",
            f"request access on the page of {name} and set HF_TOKEN",
        ) from None
    except RevisionNotFoundError:
        raise NotFoundError(
            f"{name} has no revision {revision}", "check the branch, tag or commit"
        ) from None
    except RepositoryNotFoundError:
        raise NotFoundError(
            f"there is no folder {name} here and no model {name} on the Hub",
            "check the spelling; for a private model set HF_TOKEN",
        ) from None
    except (LocalEntryNotFoundError, FileNotFoundError):
        raise NotFoundError(
            f"{at} is not in the local cache and cannot be fetched from here",
            f"with a network, run: hf download {name}"
            + (f" --revision {revision}" if revision else ""),
        ) from None
    except HFValidationError as error:
        raise NotFoundError(f"{at} is no valid Hub id: {error}", "use org/name") from None
    except HfHubHTTPError as error:
        raise NotFoundError(
            f"the Hub answered with an error for {at}: {_first_line(error)}",
            "try again later, or download the model and give its folder",
        ) from None
    except OSError as error:
        raise NotFoundError(
            f"the Hub cannot be reached for {at}: {_first_line(error)}",
            "check the network, or download the model elsewhere and give its folder",
        ) from None
    # The name of a snapshot folder is its commit: this is how an offline run learns it.
    return Resolved(folder, folder.name if _COMMIT.fullmatch(folder.name) else commit, at)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
