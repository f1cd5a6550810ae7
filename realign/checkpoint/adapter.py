"""A PEFT adapter over its base, readable as the merged checkpoint that it stands for.

Here: finding an adapter's base, and reading merged rows. Not here: which tensors are changed
(`pairing`), the arithmetic and the configuration of LoRA (`lora`).

What is read equals peft's `merge_and_unload`: LoRA factors on the two sides of tied embeddings both
go into the one stored matrix. Modules that were trained whole (`modules_to_save`, trained
embeddings) replace the base's; where that unties a tied output head, the merged checkpoint has a
head of its own and its config says so.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from realign.checkpoint.hashing import StreamHashes
from realign.checkpoint.headers import TensorInfo, read_header
from realign.checkpoint.lora import Factors, parse_lora_config
from realign.checkpoint.manifest import sha256_file
from realign.checkpoint.pairing import (
    ADAPTER_WEIGHTS,
    Change,
    LoraTensors,
    Pairing,
    changed_config,
    effective_tensors,
    settle_ties,
    tie_remarks,
    vocabulary_change,
)
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.reader import (
    ADAPTER_CONFIG,
    Checkpoint,
    dump_config,
    hash_files,
    open_checkpoint,
    read_json_object,
)
from realign.checkpoint.sidecars import adapter_sidecars
from realign.checkpoint.stacks import StackTarget
from realign.errors import CheckpointError, NotFoundError
from realign.progress import SILENT, Progress


class AdapterCheckpoint(Checkpoint):
    """The merged checkpoint of an adapter and its base; merges the rows that are asked for."""

    kind: Literal["full", "adapter"]

    def __init__(
        self, folder: Path, *, base: Checkpoint, source: str, commit: str | None = None
    ) -> None:
        """Read the adapter's config and header and pair its tensors with the base's.

        Raises:
            CheckpointError: the adapter cannot be merged, or is malformed.
            MismatchError: it targets modules or shapes that the base does not have.
        """
        self.source, self.folder, self.commit, self.kind = source, folder, commit, "adapter"
        self.adapter_folder = folder
        self.base = base
        self.lora = parse_lora_config(folder, read_json_object(folder / ADAPTER_CONFIG))
        self._files = TensorFiles()
        self._lock = Lock()
        self._block: tuple[str, int, Tensor] | None = None
        self._factors: tuple[str, list[Factors]] | None = None
        self._hashes: Mapping[str, str] | None = None
        self._digest: Callable[[Path], str] = sha256_file
        header = read_header(_weights(folder))
        pairing = Pairing(base, self.lora, folder)
        for name, info in header.tensors.items():
            pairing.add(name, info)
        changes = pairing.finish()
        config_changes = settle_ties(base, self.lora, changes, self._same_rows)
        self._changes: Mapping[str, Change] = changes
        self.tensors = MappingProxyType(effective_tensors(base, changes))
        config_changes |= vocabulary_change(base, self.tensors)
        self.config = changed_config(base.config, config_changes)
        self.weight_files = (*base.weight_files, header.file)
        self.remarks = (*base.remarks, *header.remarks, *tie_remarks(base, changes))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Checkpoint.read`."""
        change = self._changes.get(name)
        if change is None:
            return self.base.read(name, rows)
        if not change.loras:
            return self._start(name, change, rows)
        info = self.tensors[name]
        start, stop = (0, info.shape[0]) if rows is None else rows
        assert 0 <= start <= stop <= info.shape[0], (name, info.shape, rows)
        with self._lock:
            return self._merged(name, change, start, stop)

    def read_within(self, name: str, index: int, rows: tuple[int, int]) -> Tensor:
        """See `Checkpoint.read_within`."""
        if name in self._changes:
            return super().read_within(name, index, rows)
        return self.base.read_within(name, index, rows)

    def reads_within(self, name: str) -> bool:
        """See `Checkpoint.reads_within`."""
        return name not in self._changes and self.base.reads_within(name)

    def changes(self, name: str) -> Literal["none", "product", "other"]:
        """How one tensor differs from the base's: by products of LoRA factors, or otherwise."""
        change = self._changes.get(name)
        if change is None:
            return "none"
        plain = change.replaced is change.tokens is change.added is change.base_name is None
        if plain and change.loras and all(each.magnitude is None for each in change.loras):
            return "product"
        return "other"

    def lora_modules(self, name: str) -> tuple[str, ...]:
        """The adapter's own names of the modules whose LoRA changes one tensor."""
        change = self._changes.get(name)
        return () if change is None else tuple(each.module for each in change.loras)

    def saved_whole(self, name: str) -> TensorInfo | None:
        """The adapter's tensor that replaces one of the base, where it was trained whole."""
        change = self._changes.get(name)
        return None if change is None else change.replaced

    def trains_tokens(self, name: str) -> bool:
        """Whether single rows of one tensor are replaced."""
        change = self._changes.get(name)
        return change is not None and change.tokens is not None

    def factors(self, name: str) -> Sequence[Factors]:
        """The LoRA factors of one tensor, in at least float32; `changes(name)` is "product"."""
        assert self.changes(name) == "product", name
        with self._lock:
            return tuple(self._read_factors(name, self._changes[name]))

    def _merged(self, name: str, change: Change, start: int, stop: int) -> Tensor:
        info = self.tensors[name]
        factors = self._read_factors(name, change)
        size = min(each.block_rows for each in factors)
        if any(each.transposed and each.magnitude is not None for each in factors):
            size = info.shape[0]
        out = torch.empty((stop - start, *info.shape[1:]), dtype=info.torch_dtype)
        at = start
        while at < stop:
            first = at - at % size
            last = min(first + size, info.shape[0])
            if self._block is None or self._block[:2] != (name, first):
                self._block = None  # free the old one before the new one is made
                block = self._start(name, change, (first, last))
                for each in factors:
                    block = each.merge(block, first)
                self._block = (name, first, block)
            end = min(last, stop)
            out[at - start : end - start] = self._block[2][at - first : end - first]
            if end == info.shape[0]:
                self._block = self._factors = None  # read to its end: rarely needed again
            at = end
        return out

    def _read_factors(self, name: str, change: Change) -> list[Factors]:
        if self._factors is None or self._factors[0] != name:
            wide = torch.promote_types(self.tensors[name].torch_dtype, torch.float32)
            self._factors = (name, [self._factors_of(each, wide) for each in change.loras])
        return self._factors[1]

    def _factors_of(self, lora: LoraTensors, wide: torch.dtype) -> Factors:
        # peft multiplies the factors in float32 and adds in the wider of both types.
        def read(info: TensorInfo) -> Tensor:
            tensor = self._files.read(info)
            return tensor if tensor.dtype == torch.float64 == wide else tensor.float()

        a, b = read(lora.a), read(lora.b)
        if lora.stack is not None:
            a, b = _of_stack(a, b, lora.stack)
        return Factors(
            a=a,
            b=b,
            scale=lora.scale,
            transposed=lora.transposed,
            magnitude=None if lora.magnitude is None else read(lora.magnitude).reshape(-1),
        )

    def _start(self, name: str, change: Change, rows: tuple[int, int] | None) -> Tensor:
        """The tensor before LoRA: the base's or the trained one, with trained rows put in."""
        dtype = self.tensors[name].torch_dtype
        if change.replaced is not None:
            weight = self._files.read(change.replaced, rows).to(dtype)
        else:
            weight = self.base.read(change.base_name or name, rows)
        if change.tokens is not None:
            info, indices = change.tokens
            first = 0 if rows is None else rows[0]
            inside = [(i, at - first) for i, at in enumerate(indices)]
            inside = [(i, at) for i, at in inside if 0 <= at < weight.shape[0]]
            if inside:
                trained = self._files.read(info).to(dtype)
                weight[[at for _, at in inside]] = trained[[i for i, _ in inside]]
        if change.added is not None:
            info, scale = change.added
            weight = weight + self._files.read(info, rows).to(torch.float32) * scale
        return weight.to(dtype)

    def _same_rows(self, change: Change, other: Change) -> bool:
        """Whether a replacing head and replacing embeddings hold the same numbers."""
        if change.replaced is None or other.replaced is None:
            return False
        if change.replaced.shape != other.replaced.shape:
            return False
        return torch.equal(self._files.read(change.replaced), self._files.read(other.replaced))

    def close(self) -> None:
        """See `Checkpoint.close`; the base is closed, too."""
        self._files.close()
        self._block = self._factors = None
        self.base.close()

    def watch(self, hashes: StreamHashes) -> None:
        """See `Checkpoint.watch`; the base's files are watched, too."""
        self._files.observer, self._digest = hashes.feed, hashes.digest
        self.base.watch(hashes)

    def file_hashes(self, progress: Progress = SILENT) -> Mapping[str, str]:
        """The adapter's own files by name, the base's as "base/NAME". Computed once."""
        if self._hashes is None:
            files = (self.weight_files[-1], self.folder / ADAPTER_CONFIG)
            own = hash_files(self.folder, files, progress, digest=self._digest)
            base = self.base.file_hashes(progress)
            self._hashes = MappingProxyType(
                {**own, **{f"base/{name}": digest for name, digest in base.items()}}
            )
        return self._hashes

    def sidecars(self) -> Mapping[str, Path | bytes]:
        """See `Checkpoint.sidecars`: the base's files, the adapter's tokenizer and card."""
        found = adapter_sidecars(self.base.sidecars(), self.folder)
        if self.config != self.base.config:
            found["config.json"] = dump_config(self.config)
        return found


def _of_stack(a: Tensor, b: Tensor, stack: StackTarget) -> tuple[Tensor, Tensor]:
    """The factors of a stack, or of one expert in it; A lies expert by expert, B rank by rank.

    Returns:
        ([experts, r, d_in], [experts, d_out, r]), or ([r, d_in], [rows, r]) of one expert.
    """
    by_expert = a.reshape(stack.experts, -1, a.shape[1])
    by_rank = b.reshape(b.shape[0], -1, stack.experts).permute(2, 0, 1)
    if stack.expert is None:
        return by_expert, by_rank
    assert stack.rows is not None
    return by_expert[stack.expert], by_rank[stack.expert, slice(*stack.rows)]


def _weights(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").is_file():
        raise NotFoundError(
            f"{folder} holds its adapter only as a pickle; realign never unpickles",
            "convert it in an isolated environment: load with peft and save_pretrained again",
        )
    raise NotFoundError(f"{folder} has no {ADAPTER_WEIGHTS}", "download or export it again")


def open_adapter(
    folder: Path,
    *,
    source: str,
    commit: str | None = None,
    base: Checkpoint | None = None,
    offline: bool = False,
    progress: Progress = SILENT,
) -> AdapterCheckpoint:
    """Open an adapter folder over `base`, or over the base that its config names.

    A relative path in the config is looked up from the working folder, then from the adapter's own.

    Raises:
        NotFoundError: the base cannot be found; CheckpointError, MismatchError: as
            `AdapterCheckpoint`.
    """
    if base is None:
        config = read_json_object(folder / ADAPTER_CONFIG)
        parse_lora_config(folder, config)  # a refusal should not wait for a download
        _weights(folder)
        base = _open_base(folder, config, offline=offline, progress=progress)
    return AdapterCheckpoint(folder, base=base, source=source, commit=commit)


def _open_base(
    folder: Path, config: Mapping[str, Any], *, offline: bool, progress: Progress
) -> Checkpoint:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise NotFoundError(
            f"{folder / ADAPTER_CONFIG} names no base model",
            f"name it: BASE+{shlex.quote(str(folder))}",
        )
    for place in _places(name, folder):
        if place.resolve() == folder.resolve():
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG} names the adapter itself as its base",
                f"name the base: BASE+{shlex.quote(str(folder))}",
            )
        if place.is_dir():
            return open_checkpoint(place, offline=offline, progress=progress)
    revision = config.get("revision")
    try:
        return open_checkpoint(
            f"{name}@{revision}" if isinstance(revision, str) and revision else name,
            offline=offline,
            progress=progress,
        )
    except CheckpointError as error:
        raise type(error)(
            f"the base of the adapter {folder} cannot be opened: {error.message}",
            f"{error.hint}; or name the base yourself: BASE+{shlex.quote(str(folder))}",
        ) from error


def _places(name: str, folder: Path) -> Sequence[Path]:
    path = Path(name).expanduser()
    return (path, folder / path)
