"""A checkpoint opened lazily: every header at once, tensor bytes only when asked for.

Here: the interface that every room above reads through, the folder of safetensors files that
implements it, and `open_checkpoint`. Not here: adapters (`adapter`), pairing tensors (`matching`).

Bytes come by `pread` (see `pread`), never by memory mapping.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, cast

from torch import Tensor

from realign.checkpoint.formats import refuse_quantised_config
from realign.checkpoint.hashing import StreamHashes
from realign.checkpoint.headers import TensorInfo
from realign.checkpoint.hub import resolve
from realign.checkpoint.manifest import sha256_file
from realign.checkpoint.names import find_embedding, find_head, says_tied
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.reference import parse_reference
from realign.checkpoint.sidecars import folder_sidecars
from realign.checkpoint.weights import INDEX_FILE, SINGLE_FILE, read_tensors, why_no_weights
from realign.errors import CheckpointError, NotFoundError
from realign.progress import SILENT, Progress

ADAPTER_CONFIG = "adapter_config.json"


class Checkpoint(ABC):
    """Named tensors with a config, read on demand. A context manager; `close` frees its files."""

    source: str
    """As the user typed it."""
    folder: Path
    """Where tokenizer, templates and other small files are."""
    commit: str | None
    """The 40-hex Hub commit, None for a local folder."""
    kind: Literal["full", "adapter"]
    config: Mapping[str, Any]
    """The parsed config.json."""
    tensors: Mapping[str, TensorInfo]
    """Effective tensors: an adapter shows its base's names, merged."""
    weight_files: tuple[Path, ...]
    """Every file whose bytes decide the weights."""
    remarks: tuple[str, ...] = ()
    """What is unusual without being wrong; worth a line in a plan."""

    @abstractmethod
    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor in its dtype on disk, on the CPU, in memory of its own.

        Args:
            name: a key of `tensors`.
            rows: half-open range on the first dimension; None reads everything.

        Raises:
            HeaderError: the file ended early (it changed or was cut since it was opened).
        """

    def read_within(self, name: str, index: int, rows: tuple[int, int]) -> Tensor:
        """Rows [start, stop) of one matrix of a stack of three dimensions, as `read` gives them."""
        return self.read(name, (index, index + 1))[0][slice(*rows)]

    def reads_within(self, name: str) -> bool:
        """Whether `read_within` of this tensor holds and reads no more than what it returns."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Release open files. Reading afterwards opens them again."""

    @abstractmethod
    def file_hashes(self, progress: Progress = SILENT) -> Mapping[str, str]:
        """SHA-256 of every weight file and of config and tokenizer files, by relative name."""

    def watch(self, hashes: StreamHashes) -> None:
        """Let `hashes` see what is read of weight files; it then answers for their SHA-256.

        A checkpoint that does not say what it reads has its files read once more for that.
        """
        return

    @abstractmethod
    def sidecars(self) -> Mapping[str, Path | bytes]:
        """The small files of an output made from this checkpoint, by relative name.

        A path is copied byte for byte; bytes stand for a file whose content follows from two.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FolderCheckpoint(Checkpoint):
    """A folder in Hugging Face layout with safetensors weights, one file or many."""

    def __init__(self, folder: Path, *, source: str, commit: str | None = None) -> None:
        """Read config and headers.

        Raises:
            CheckpointError: the folder is no model, or its weights cannot be read; see `headers`.
        """
        self.source, self.folder, self.commit, self.kind = source, folder, commit, "full"
        self.config = read_config(folder)
        refuse_quantised_config(folder, self.config)
        weights, tensors, self.remarks = read_tensors(folder, self.config)
        self.weight_files = weights.files
        self._files = TensorFiles()
        self._says_more: Mapping[str, Any] = {}
        self.tensors = MappingProxyType(self._without_tied_copy(dict(tensors)))
        self.config = MappingProxyType({**self.config, **self._says_more})
        self._hashes: Mapping[str, str] | None = None
        self._digest: Callable[[Path], str] = sha256_file

    def _without_tied_copy(self, tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Drop a stored head that only repeats the embeddings it is tied to.

        Loaders tie it again. Left in, it would have to be edited in step with the embeddings.
        """
        embedding, head = find_embedding(tensors), find_head(tensors)
        said = says_tied(self.config)
        if embedding is None or head is None or said is False:
            return tensors
        if self._files.same(tensors[embedding], tensors[head]):
            self.remarks += (f"{head} repeats {embedding}, to which it is tied: left out",)
            del tensors[head]
            # Some classes tie only where they are told to: without the copy, it must be said.
            self._says_more = {"tie_word_embeddings": True} if said is None else {}
        elif said:
            self.remarks += (f"{head} differs from {embedding} although the config ties them",)
        return tensors

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Checkpoint.read`."""
        return self._files.read(self.tensors[name], rows)

    def read_within(self, name: str, index: int, rows: tuple[int, int]) -> Tensor:
        """See `Checkpoint.read_within`."""
        info = self.tensors[name]
        stack, height, width = info.shape
        first = index * height
        flat = replace(info, shape=(stack * height, width))
        return self._files.read(flat, (first + rows[0], first + rows[1]))

    def reads_within(self, name: str) -> bool:
        """See `Checkpoint.reads_within`."""
        return True

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._files.close()

    def watch(self, hashes: StreamHashes) -> None:
        """See `Checkpoint.watch`."""
        self._files.observer, self._digest = hashes.feed, hashes.digest

    def file_hashes(self, progress: Progress = SILENT) -> Mapping[str, str]:
        """See `Checkpoint.file_hashes`. Computed once per instance."""
        if self._hashes is None:
            self._hashes = hash_files(self.folder, self.weight_files, progress, digest=self._digest)
        return self._hashes

    def sidecars(self) -> Mapping[str, Path | bytes]:
        """See `Checkpoint.sidecars`."""
        found: dict[str, Path | bytes] = dict(folder_sidecars(self.folder))
        if self._says_more:
            found["config.json"] = dump_config(self.config)
        return found


def dump_config(config: Mapping[str, Any]) -> bytes:
    """A config as the bytes of config.json."""
    return f"{json.dumps(dict(config), indent=2, ensure_ascii=False)}\n".encode()


def hash_files(
    folder: Path,
    others: tuple[Path, ...],
    progress: Progress = SILENT,
    *,
    digest: Callable[[Path], str] = sha256_file,
) -> Mapping[str, str]:
    """SHA-256 of the small files of a folder and of `others` in it, by relative name."""
    small = folder_sidecars(folder).values()
    files = sorted({*others, *small})
    with progress.task(
        f"hash {folder.name}", total=sum(f.stat().st_size for f in files), unit="B"
    ) as task:
        hashes: dict[str, str] = {}
        for file in files:
            hashes[file.relative_to(folder).as_posix()] = digest(file)
            task.advance(file.stat().st_size)
    return MappingProxyType(hashes)


def read_config(folder: Path) -> Mapping[str, Any]:
    """The parsed config.json of a model folder.

    Raises:
        NotFoundError: there is none; CheckpointError: it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        if not any(folder.glob("*.safetensors")):
            raise NotFoundError(*why_no_weights(folder))
        raise NotFoundError(
            f"{folder} is no model folder: it has no config.json",
            "give the folder that holds config.json and the weights",
        )
    config = read_json_object(path)
    for part in (config, config.get("text_config")):
        kind = (
            cast(Mapping[str, Any], part).get("model_type") if isinstance(part, Mapping) else None
        )
        if not isinstance(kind, str | None):
            raise CheckpointError(f"{path}: model_type is {kind!r}, no name", "restore the file")
    return config


def read_json_object(path: Path) -> Mapping[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        CheckpointError: it does not; the message names the file.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}", "check the file and its rights"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", "restore the file") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object", "restore the file")
    return MappingProxyType(cast(dict[str, Any], value))


def open_checkpoint(
    source: str | Path,
    *,
    adapter_base: Checkpoint | None = None,
    offline: bool = False,
    progress: Progress = SILENT,
) -> Checkpoint:
    """Open a checkpoint by path, Hub id (`org/name@rev`) or `MODEL+ADAPTER`; headers only.

    Args:
        source: what to open. A folder with adapter_config.json is a PEFT adapter.
        adapter_base: the model under an adapter, where it is already open; otherwise the adapter's
            own `base_model_name_or_path` is opened.
        offline: resolve Hub ids from the local cache only.
        progress: shows downloads.

    Raises:
        NotFoundError: nothing is there, or the Hub cannot be reached.
        CheckpointError: what is there cannot be read; the message names the file.
    """
    from realign.checkpoint.adapter import open_adapter

    reference = parse_reference(source)
    if reference.adapter is not None:
        base = open_checkpoint(
            reference.text[: -len(reference.adapter) - 1], offline=offline, progress=progress
        )
        return open_checkpoint(
            reference.adapter, adapter_base=base, offline=offline, progress=progress
        )
    resolved = resolve(reference, offline=offline, progress=progress)
    if (resolved.folder / ADAPTER_CONFIG).is_file():
        _refuse_both(resolved.folder)
        return open_adapter(
            resolved.folder,
            source=reference.text,
            commit=resolved.commit,
            base=adapter_base,
            offline=offline,
            progress=progress,
        )
    return FolderCheckpoint(resolved.folder, source=reference.text, commit=resolved.commit)


def _refuse_both(folder: Path) -> None:
    if any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(
            f"{folder} holds a whole model and an adapter: loaders disagree on what it is",
            f"move {ADAPTER_CONFIG} and the adapter's weights into a folder of their own",
        )
