"""A PEFT adapter over its base, readable as the merged checkpoint that it stands for.

Here: finding an adapter's base, pairing adapter tensors with base tensors, and reading merged rows.
Not here: the arithmetic and the configuration of LoRA (`lora`).

What is read equals peft's `merge_and_unload`: LoRA factors on the two sides of tied embeddings both
go into the one stored matrix. Modules that were trained whole (`modules_to_save`, trained
embeddings) replace the base's; where that unties a tied output head, the merged checkpoint has a
head of its own and its config says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor

from realign.checkpoint.headers import TensorInfo, read_header
from realign.checkpoint.lora import Factors, LoraConfig, parse_lora_config
from realign.checkpoint.names import find_embedding, find_head, is_conv1d, is_tied, role_of
from realign.checkpoint.pread import TensorFiles
from realign.checkpoint.reader import (
    ADAPTER_CONFIG,
    Checkpoint,
    hash_files,
    open_checkpoint,
    read_json_object,
)
from realign.checkpoint.sidecars import adapter_sidecars
from realign.errors import CheckpointError, MismatchError, NotFoundError
from realign.progress import SILENT, Progress

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector"
    r"|token_adapter\.trainable_tokens_delta)"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?"
)
_HEAD = "lm_head"


@dataclass(eq=False)
class _Change:
    """All that an adapter does to one effective tensor, in the order in which it is done."""

    replaced: TensorInfo | None = None
    """Trained whole, or saved with its LoRA: read from the adapter."""
    own: bool = False
    """Trained whole, as a copy that no longer serves the other side of a tie."""
    base_name: str | None = None
    """The base tensor to start from, where it has another name."""
    tokens: tuple[TensorInfo, tuple[int, ...]] | None = None
    """Trained rows and where they go."""
    loras: list[_Lora] = field(default_factory=list["_Lora"])
    added: tuple[TensorInfo, float] | None = None
    """A trained bias correction and its factor."""


@dataclass(frozen=True, eq=False)
class _Lora:
    module: str
    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None
    embedding: bool
    scale: float
    transposed: bool


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
        header = read_header(_weights(folder))
        pairing = _Pairing(base, self.lora, folder)
        for name, info in header.tensors.items():
            pairing.add(name, info)
        changes = pairing.finish()
        config_changes = _settle_ties(base, self.lora, changes, self._same_rows)
        self._changes: Mapping[str, _Change] = changes
        self.tensors = MappingProxyType(_effective(base, changes))
        config_changes |= _vocabulary_change(base, self.tensors)
        self.config = _changed_config(base.config, config_changes)
        self.weight_files = (*base.weight_files, header.file)
        self.remarks = (*base.remarks, *header.remarks, *_tie_remarks(base, changes))

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

    def _merged(self, name: str, change: _Change, start: int, stop: int) -> Tensor:
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

    def _read_factors(self, name: str, change: _Change) -> list[Factors]:
        if self._factors is None or self._factors[0] != name:
            wide = torch.promote_types(self.tensors[name].torch_dtype, torch.float32)
            self._factors = (name, [self._factors_of(each, wide) for each in change.loras])
        return self._factors[1]

    def _factors_of(self, lora: _Lora, wide: torch.dtype) -> Factors:
        # peft multiplies the factors in float32 and adds in the wider of both types.
        def read(info: TensorInfo) -> Tensor:
            tensor = self._files.read(info)
            return tensor if tensor.dtype == torch.float64 == wide else tensor.float()

        return Factors(
            a=read(lora.a),
            b=read(lora.b),
            scale=lora.scale,
            transposed=lora.transposed,
            magnitude=None if lora.magnitude is None else read(lora.magnitude).reshape(-1),
        )

    def _start(self, name: str, change: _Change, rows: tuple[int, int] | None) -> Tensor:
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

    def _same_rows(self, name: str, change: _Change, other: _Change) -> bool:
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

    def file_hashes(self, progress: Progress = SILENT) -> Mapping[str, str]:
        """The adapter's own files by name, the base's as "base/NAME". Computed once."""
        if self._hashes is None:
            files = (self.weight_files[-1], self.folder / ADAPTER_CONFIG)
            own = hash_files(self.folder, files, progress)
            base = self.base.file_hashes(progress)
            self._hashes = MappingProxyType(
                {**own, **{f"base/{name}": digest for name, digest in base.items()}}
            )
        return self._hashes

    def sidecars(self) -> Mapping[str, Path | bytes]:
        """See `Checkpoint.sidecars`: the base's files, the adapter's tokenizer and card."""
        found = adapter_sidecars(self.base.sidecars(), self.folder)
        if self.config != self.base.config:
            text = json.dumps(dict(self.config), indent=2, ensure_ascii=False)
            found["config.json"] = f"{text}\n".encode()
        return found


class _Pairing:
    """Collects an adapter's tensors by the base tensor that they change."""

    def __init__(self, base: Checkpoint, lora: LoraConfig, folder: Path) -> None:
        self._base, self._lora, self._folder = base, lora, folder
        self._parts: dict[str, dict[str, TensorInfo]] = {}
        self._changes: dict[str, _Change] = {}

    def add(self, name: str, info: TensorInfo) -> None:
        plain = name.removeprefix("base_model.model.")
        found = _KEY.fullmatch(plain)
        if found is None:
            self._replace(plain, info)
            return
        part = found["part"].removeprefix("token_adapter.")
        if found["leaf"] == ".bias":
            part += ".bias"
        self._parts.setdefault(found["module"], {})[part] = info

    def _replace(self, plain: str, info: TensorInfo) -> None:
        if ".original_module." in plain:
            return
        plain = plain.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        under_lora = ".base_layer." in plain
        plain = plain.replace(".base_layer.", ".")
        name = self._resolve(plain)
        if name is None and under_lora:
            name = self._tied_head(plain.removesuffix(".weight"))
        if name is None and plain.split(".")[-2:] == [_HEAD, "weight"]:
            name = plain  # a tied head that was trained on its own; settled in `_settle_ties`
        if name is None:
            raise self._absent(plain)
        have = self._base.tensors.get(name)
        if have is not None and have.shape != info.shape and not _resized(have, info):
            raise self._misfit(plain, info, have)
        change = self._change(name)
        change.replaced, change.own = info, not under_lora

    def _change(self, name: str) -> _Change:
        return self._changes.setdefault(name, _Change())

    def finish(self) -> dict[str, _Change]:
        # Embeddings before the head, as peft merges modules in the model's order.
        for module in sorted(self._parts, key=lambda m: (m.endswith(_HEAD), m)):
            self._apply(module, self._parts[module])
        if not self._changes:
            raise CheckpointError(
                f"{self._folder / ADAPTER_WEIGHTS} holds no adapter tensors", "export it again"
            )
        return self._changes

    def _apply(self, module: str, parts: Mapping[str, TensorInfo]) -> None:
        name = self._resolve(f"{module}.weight") or self._tied_head(module)
        if name is None:
            raise self._absent(module)
        change = self._change(name)
        have = change.replaced or self._base.tensors[name]
        if "trainable_tokens_delta" in parts:
            change.tokens = self._tokens(module, parts["trainable_tokens_delta"], have)
        embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
        keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        a, b = (parts.get(key) for key in keys)
        if a is None and b is None:
            return
        if a is None or b is None:
            raise CheckpointError(
                f"{self._folder / ADAPTER_WEIGHTS} has only one of {keys[0]} and {keys[1]} "
                f"for {module}",
                "export the adapter again",
            )
        magnitude = parts.get("lora_magnitude_vector")
        if self._lora.dora != (magnitude is not None):
            raise CheckpointError(
                f"{module}: the DoRA magnitude is {'missing' if self._lora.dora else 'unexpected'}",
                "adapter_config.json and the weights do not belong together",
            )
        lora = _Lora(
            module, a, b, magnitude, embedding, self._lora.scale_of(module), transposed=False
        )
        change.loras.append(self._oriented(lora, have))
        if "lora_B.bias" in parts:
            bias = self._resolve(f"{module}.bias")
            if bias is None:
                raise self._absent(f"{module}.bias")
            if parts["lora_B.bias"].shape != self._base.tensors[bias].shape:
                raise self._misfit(f"{module}.bias", parts["lora_B.bias"], self._base.tensors[bias])
            self._change(bias).added = (parts["lora_B.bias"], lora.scale)

    def _oriented(self, lora: _Lora, have: TensorInfo) -> _Lora:
        """Check the shapes against the rank in the config, and settle how the weight is stored."""
        rank = self._lora.rank_of(lora.module)
        if len(lora.a.shape) != 2 or len(lora.b.shape) != 2 or len(have.shape) != 2:
            raise self._misfit(lora.module, lora.a, have)
        if lora.a.shape[0] != rank or lora.b.shape[1] != rank:
            raise CheckpointError(
                f"{lora.module}: the factors have shapes {list(lora.a.shape)} and "
                f"{list(lora.b.shape)}, the config says rank {rank}",
                "adapter_config.json and the weights do not belong together",
            )
        product = (lora.b.shape[0], lora.a.shape[1])
        transposed = lora.embedding or is_conv1d(self._base.config, lora.module.split(".")[-1])
        if not transposed and self._lora.fan_in_fan_out and product != have.shape:
            transposed = True
        if (product[::-1] if transposed else product) != have.shape:
            raise MismatchError(
                f"{lora.module}: the LoRA product is {list(product)}, the base "
                f"{self._base.source} has {list(have.shape)}",
                "the adapter was trained on another base: name the right one as BASE+ADAPTER",
            )
        return replace(lora, transposed=transposed)

    def _tokens(
        self, module: str, info: TensorInfo, have: TensorInfo
    ) -> tuple[TensorInfo, tuple[int, ...]]:
        for key, indices in self._lora.token_indices.items():
            if module == key or module.endswith(f".{key}"):
                fits = info.shape == (len(indices), *have.shape[1:])
                if not fits or not all(0 <= i < have.shape[0] for i in indices):
                    raise self._misfit(module, info, have)
                return info, indices
        raise CheckpointError(
            f"{self._folder / ADAPTER_CONFIG} does not say which tokens {module} trains",
            "export the adapter again",
        )

    def _resolve(self, name: str) -> str | None:
        """The base tensor of an adapter's name; files may lack the prefix that peft sees."""
        tensors = self._base.tensors
        parts = name.split(".")
        for drop in range(min(3, len(parts) - 1)):
            tail = ".".join(parts[drop:])
            if tail in tensors:
                return tail
        longer = [each for each in tensors if each.endswith(f".{name}")]
        return longer[0] if len(longer) == 1 else None

    def _tied_head(self, module: str) -> str | None:
        if module.split(".")[-1] == _HEAD and is_tied(self._base.config):
            return find_embedding(self._base.tensors)
        return None

    def _absent(self, name: str) -> MismatchError:
        return MismatchError(
            f"the adapter {self._folder} changes {name}, which the base {self._base.source} "
            "does not have",
            "it was trained on another base: name the right one as BASE+ADAPTER",
        )

    def _misfit(self, name: str, info: TensorInfo, have: TensorInfo) -> MismatchError:
        return MismatchError(
            f"{name} is {list(info.shape)} in the adapter {self._folder} and {list(have.shape)} in "
            f"the base {self._base.source}",
            "it was trained on another base: name the right one as BASE+ADAPTER",
        )


def _settle_ties(
    base: Checkpoint, lora: LoraConfig, changes: dict[str, _Change], same: Any
) -> dict[str, Any]:
    """Give the head its own tensor where training untied it; returns what the config must say."""
    head = next((n for n in changes if n.split(".")[-2:] == [_HEAD, "weight"]), None)
    embedding = find_embedding(base.tensors)
    if find_head(base.tensors) or embedding is None or not is_tied(base.config):
        return {}
    embedded = changes.get(embedding)
    if head is not None:
        if embedded is not None and same(head, changes[head], embedded):
            del changes[head]
            return {}
        return {"tie_word_embeddings": False}
    if embedded is not None and embedded.own and not lora.ties_weights:
        # The trained copy serves the input only; peft leaves the base's matrix in the head.
        changes[f"{_HEAD}.weight"] = _Change(base_name=embedding)
        return {"tie_word_embeddings": False}
    return {}


def _tie_remarks(base: Checkpoint, changes: Mapping[str, _Change]) -> tuple[str, ...]:
    embedding = find_embedding(base.tensors)
    if embedding is None or find_head(base.tensors) or not is_tied(base.config):
        return ()
    if embedding not in changes or not changes[embedding].loras:
        return ()
    return (
        f"the adapter has LoRA on {embedding}, which the model ties: merged, as peft does it, it "
        "changes embeddings and output head alike, which the running adapter does not",
    )


def _resized(have: TensorInfo, info: TensorInfo) -> bool:
    """Whether a trained tensor differs from the base's by its vocabulary only."""
    return (
        role_of(have).kind in {"embedding", "head"} or role_of(have).module == _HEAD
    ) and have.shape[1:] == info.shape[1:]


def _effective(base: Checkpoint, changes: Mapping[str, _Change]) -> dict[str, TensorInfo]:
    tensors = dict(base.tensors)
    for name, change in changes.items():
        old = base.tensors.get(change.base_name or name)
        if change.replaced is None:
            assert old is not None, name
            tensors[name] = replace(old, name=name)
            continue
        like = old or base.tensors[find_embedding(base.tensors) or name]
        shape = change.replaced.shape
        nbytes = change.replaced.numel * like.torch_dtype.itemsize
        tensors[name] = replace(
            change.replaced, name=name, dtype=like.dtype, shape=shape, nbytes=nbytes
        )
    return tensors


def _vocabulary_change(base: Checkpoint, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    name = find_embedding(base.tensors)
    if name is None or tensors[name].shape == base.tensors[name].shape:
        return {}
    return {"vocab_size": tensors[name].shape[0]}


def _changed_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> Mapping[str, Any]:
    if not changes:
        return config
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return MappingProxyType({**config, **changes})
    inner = {**cast(Mapping[str, Any], nested), **changes}
    outer = {key: value for key, value in changes.items() if key in config}
    return MappingProxyType({**config, **outer, "text_config": inner})


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
            f"{folder / ADAPTER_CONFIG} names no base model", f"name it: BASE+{folder}"
        )
    for place in _places(name, folder):
        if place.resolve() == folder.resolve():
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG} names the adapter itself as its base",
                f"name the base: BASE+{folder}",
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
            f"{error.hint}; or name the base yourself: BASE+{folder}",
        ) from error


def _places(name: str, folder: Path) -> Sequence[Path]:
    path = Path(name).expanduser()
    return (path, folder / path)
