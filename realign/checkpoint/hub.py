"""From a reference to a folder on this machine: paths as they are, Hub ids pinned to a commit.

A branch or tag is resolved once to a 40-hex commit and everything is fetched at that commit, so a
branch that moves during a run changes nothing. Only what is read later is fetched: configs, the
tokenizer, templates, the card and one set of safetensors weights. The environment variables of
huggingface_hub (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, ...) mean what they mean there.
"""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

from realign.checkpoint.formats import no_weights, refuse_quantised_config, what_a_file_is
from realign.checkpoint.reference import Reference
from realign.checkpoint.rules import refuse
from realign.checkpoint.sidecars import TEMPLATE_FOLDER, is_tokenizer, travels
from realign.checkpoint.weights import INDEX_FILE, SINGLE_FILE, read_index
from realign.errors import CheckpointError, NotFoundError
from realign.progress import SILENT, Progress, Task

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"(?!consolidated|adapter_model)[^/]+\.safetensors")
_SMALL = frozenset((".json", ".jinja", ".txt", ".py", ".md", ""))
_DISK = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
)
_TRUE = frozenset(("1", "ON", "YES", "TRUE"))


@dataclass(frozen=True)
class Resolved:
    """Where a reference leads."""

    folder: Path
    commit: str | None
    """40 hex digits for a Hub id, None for a local folder."""
    source: str


def is_offline(offline: bool) -> bool:
    """Whether the network is ruled out by argument or environment."""
    return offline or any(
        os.environ.get(name, "").upper() in _TRUE
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def resolve(
    reference: Reference, *, offline: bool = False, progress: Progress = SILENT
) -> Resolved:
    """Find the folder of a reference, downloading it where it is a Hub id.

    Args:
        reference: what to find.
        offline: answer from the local cache only.
        progress: shows the download in bytes.

    Raises:
        NotFoundError: nothing is there, access is denied, or the Hub cannot be reached.
        CheckpointError: the path is a file, or the repository holds no weights that can be read.
    """
    if reference.is_local:
        folder = Path(reference.model).expanduser()
        if not folder.is_dir():
            raise CheckpointError(*what_a_file_is(folder))
        return Resolved(folder, None, reference.text)
    at = f"{reference.model}@{reference.revision}" if reference.revision else reference.model
    try:
        found = (_from_cache if is_offline(offline) else _download)(reference, progress)
    except CheckpointError:
        raise
    except Exception as error:
        # The client's transport errors are no public names of it, so they cannot be listed here.
        raise explain(error, reference, at) from error
    folder = found / reference.subfolder if reference.subfolder else found
    if not folder.is_dir():
        raise NotFoundError(f"{at} has no folder {reference.subfolder}", "check the subfolder")
    # The name of a snapshot folder is its commit: this is how an offline run learns it.
    return Resolved(folder, found.name, reference.text)


def cache_folder() -> str | None:
    """The client's cache, as the environment says now; None for its default."""
    # Looked up now and not when the client was imported.
    if folder := os.environ.get("HF_HUB_CACHE"):
        return folder
    home = os.environ.get("HF_HOME")
    return str(Path(home).expanduser() / "hub") if home else None


def _from_cache(reference: Reference, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    # What every checkpoint has: which other files are missing is found when they are read.
    prefix = f"{reference.subfolder}/" if reference.subfolder else ""
    return Path(
        snapshot_download(
            reference.model,
            revision=reference.revision,
            cache_dir=cache_folder(),
            allow_patterns=[f"{prefix}config.json", f"{prefix}adapter_config.json"],
            local_files_only=True,
        )
    )


def _download(reference: Reference, progress: Progress) -> Path:
    # Imported here: the client pulls in an HTTP stack that local folders never need.
    from huggingface_hub import HfApi, hf_hub_download

    endpoint, cache = os.environ.get("HF_ENDPOINT") or None, cache_folder()
    info = HfApi(endpoint=endpoint, library_name="realign").model_info(
        reference.model, revision=reference.revision, files_metadata=True
    )
    commit = info.sha
    assert commit is not None and _COMMIT.fullmatch(commit), commit
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = wanted_files(sizes, reference.subfolder)
    if not wanted.weights:
        raise CheckpointError(*_no_weights(reference, sizes))
    progress.note(f"{reference.text}: commit {commit}")

    def fetch(names: Sequence[str], what: str) -> Path:
        total = sum(sizes[name] for name in names)
        with progress.task(what, total=total, unit="B") as task, warnings.catch_warnings():
            # If it is so, the error follows, and is the one thing to be said.
            warnings.filterwarnings("ignore", message="Not enough free disk space")
            places = [
                Path(
                    hf_hub_download(
                        reference.model,
                        name,
                        revision=commit,
                        cache_dir=cache,
                        endpoint=endpoint,
                        library_name="realign",
                        tqdm_class=progress_bar(task),
                    )
                )
                for name in names
            ]
        # Every file lies in the snapshot under its own relative name.
        return places[0].parents[len(PurePosixPath(names[0]).parts) - 1]

    weights = wanted.weights
    if wanted.others:
        snapshot = fetch(wanted.others, f"fetch {reference.model}: small files")
        weights = _settle(snapshot, wanted, sizes, reference)
    snapshot = fetch(weights, f"fetch {reference.model}")
    if reference.revision != commit:
        # The client notes where a branch points only when asked by branch; we ask by commit, and
        # without the note a later run could not find the branch offline.
        note = snapshot.parents[1] / "refs" / (reference.revision or "main")
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(commit, encoding="utf-8")
    return snapshot


def progress_bar(task: Task) -> Any:
    """A stand-in for the client's progress bar that reports to ours."""

    class Bar:
        def __init__(self, *_: Any, initial: float = 0, **__: Any) -> None:
            self.update(initial)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            task.advance(n or 0)

        def __getattr__(self, _: str) -> Any:
            return lambda *_, **__: None

    return Bar


def _settle(
    snapshot: Path, wanted: Wanted, names: Iterable[str], reference: Reference
) -> tuple[str, ...]:
    """The weights to fetch, now that config and index are here; refuses what they rule out."""
    sub = reference.subfolder
    folder, prefix = (snapshot / sub, f"{sub}/") if sub else (snapshot, "")
    config: Any = None
    with suppress(OSError, ValueError, RecursionError):  # the reader says what is wrong with it
        config = json.loads((folder / "config.json").read_text("utf-8"))
    if not isinstance(config, dict):
        return wanted.weights
    config = cast(dict[str, Any], config)
    refuse_quantised_config(folder, config)
    named = config.get("transformers_weights")
    index = named if isinstance(named, str) else INDEX_FILE
    if isinstance(named, str) and named.endswith(".safetensors") and prefix + named in names:
        return (prefix + named,)
    if SINGLE_FILE in {name.removeprefix(prefix) for name in wanted.weights}:
        return wanted.weights
    if not (folder / index).is_file():
        return wanted.weights
    files = sorted(set(read_index(folder / index)[0].values()))
    for file in files:
        if prefix + file not in names:
            raise refuse("RA021", folder / index, f"it names {file}, which {reference.text} lacks")
    return tuple(prefix + file for file in files)


@dataclass(frozen=True)
class Wanted:
    """The files of a repository that are fetched."""

    weights: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """Small files first: what is refused by its config is refused before the weights come."""
        return (*self.others, *self.weights)


def wanted_files(names: Iterable[str], subfolder: str | None = None) -> Wanted:
    """Choose from a repository's files: one set of weights, as a loader does, and small files."""
    prefix = f"{subfolder}/" if subfolder else ""
    here = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    small = [
        name
        for short, name in here.items()
        if _is_small(PurePosixPath(short)) or short in {"adapter_config.json"}
    ]
    if SINGLE_FILE in here:
        weights = [SINGLE_FILE]
    elif INDEX_FILE in here:
        small.append(here[INDEX_FILE])
        weights = [short for short in here if _SHARD.fullmatch(short)]
    else:
        weights = [short for short in here if short == "adapter_model.safetensors"]
    return Wanted(tuple(sorted(here[short] for short in weights)), tuple(sorted(small)))


def _is_small(path: PurePosixPath) -> bool:
    in_place = len(path.parts) == 1 or path.parts[0] == TEMPLATE_FOLDER
    small = path.suffix.lower() in _SMALL or is_tokenizer(path.name)
    return in_place and travels(path.name) and small


def _no_weights(reference: Reference, names: Iterable[str]) -> tuple[str, str]:
    place = PurePosixPath(reference.subfolder or "")
    paths = [PurePosixPath(name) for name in names]
    folders = sorted({str(p.parent) for p in paths if p.suffix == ".safetensors"} - {str(place)})
    known = no_weights(reference.text, [path.name for path in paths if path.parent == place])
    if known is not None:
        return known
    if folders:
        at = f" in {place}" if reference.subfolder else " at its top"
        first = reference.model if folders[0] == "." else f"hf://{reference.model}/{folders[0]}"
        held = ", ".join("its top" if name == "." else name for name in folders[:3])
        return (
            f"{reference.text} holds no safetensors weights{at}",
            f"it has some in {held}: name {first}, or check the subfolder",
        )
    return f"{reference.text} holds no safetensors weights", "check the id and the subfolder"


def explain(
    error: Exception, reference: Reference, at: str, *, kind: Literal["model", "dataset"] = "model"
) -> CheckpointError:
    """Say what a failure of the Hub's client means, and what to do.

    Args:
        error: what the client raised.
        reference: the repository that was asked for.
        at: how messages name it.
        kind: of the repository.

    Returns:
        The error to raise.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = reference.model, reference.revision
    place = "folder" if kind == "model" else "file"
    if isinstance(error, GatedRepoError):
        return NotFoundError(
            f"{at} is gated and this token has no access",
            f"request access on the page of {name} and set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(
            f"{name} has no revision {revision}", "check the branch, tag or commit"
        )
    if isinstance(error, RepositoryNotFoundError):
        return NotFoundError(
            f"there is no folder {name} here and no model {name} on the Hub that you can see"
            if kind == "model"
            else f"there is no dataset {name} on the Hub that you can see",
            f"check the spelling; for a private {kind} set HF_TOKEN",
        )
    if isinstance(error, LocalEntryNotFoundError):
        fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        fetch += "" if kind == "model" else " --repo-type dataset"
        return NotFoundError(
            f"{at} is not in the local cache, and no network may be used",
            f"with a network, run: {fetch}",
        )
    if isinstance(error, EntryNotFoundError):
        return NotFoundError(f"{at}: {_first_line(error)}", "check the id and the revision")
    if isinstance(error, HFValidationError):
        return NotFoundError(f"{at} is no valid Hub id: {_first_line(error)}", "use org/name")
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code in {401, 403}:
            return NotFoundError(
                f"access to {at} is denied (HTTP {code})",
                f"set HF_TOKEN to a token that may read {name}",
            )
        return NotFoundError(
            f"the Hub answered HTTP {code} for {at}: {_first_line(error)}",
            f"try again later, or download the {kind} elsewhere and give its {place}",
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        return CheckpointError(
            f"{at} cannot be stored in the Hub's cache: {error.strerror} "
            f"({error.filename or cache_folder() or 'the default place'})",
            "free some space, or set HF_HOME to a folder on another disk",
        )
    if isinstance(error, OSError) and "onsistency check" in str(error):
        return CheckpointError(
            f"the download of {at} is incomplete: {_first_line(error)}",
            "run the same command again: it fetches what is missing",
        )
    return NotFoundError(
        f"the Hub cannot be reached for {at}: {_first_line(error)}",
        f"check the network, or download the {kind} elsewhere and give its {place}; what is in the "
        "local cache can be used with HF_HUB_OFFLINE=1",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
