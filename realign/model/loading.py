"""A folder or an opened checkpoint as a running model with its tokenizer.

Always from local files (Hub ids are resolved by `realign.checkpoint` before), never with code
from the folder, never from pickles; in evaluation mode and in the dtype on disk unless asked
otherwise. An adapter runs unmerged on its base. The folder's `generation_config.json` is read for
its end-of-sequence ids and for nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.errors import ModelError
from realign.model.chat import chat_template, chat_template_sha256, end_of_turn_id
from realign.model.devices import pick_device
from realign.model.offload import OffloadedWeights
from realign.model.pretrained import attach_adapter, dtype_on_disk, tokenizer_in, weights_in
from realign.model.quiet import quiet_libraries
from realign.model.unit_weights import in_dtype

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. Use it as a context manager, or call `unload`, to free its memory."""

    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    device: torch.device
    name: str
    """As the user named it."""
    stop_ids: tuple[int, ...]
    """Token ids that end a reply, ascending: of generation_config, of config, of the template."""
    chat_template_sha256: str | None
    """Of the template in use; None where there is none (the model can be run, not asked)."""
    dtype: torch.dtype

    @property
    def offloaded(self) -> bool:
        """Whether its weights are read when they are needed."""
        return False

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the input embedding: legal token ids lie below."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the architecture declares, in tokens; None where it declares none."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def attention(self) -> str:
        """The attention implementation in use ("sdpa", "eager", ...)."""
        return str(getattr(self.model.config, "_attn_implementation", None) or "unknown")

    @property
    def pad_id(self) -> int:
        """A legal token id for padding; nothing attends to it."""
        rows = self.vocabulary_rows
        candidates = (self.tokenizer.pad_token_id, *self.stop_ids)
        return next((i for i in candidates if isinstance(i, int) and 0 <= i < rows), 0)

    @property
    def position_bytes(self) -> int:
        """What a pass holds for one position while it waits between two blocks, about."""
        width = getattr(self.model.config.get_text_config(), "hidden_size", None)
        return 4 * self.dtype.itemsize * (width if isinstance(width, int) else 0)

    @contextmanager
    def held_weights(self, dtype: torch.dtype | None = None) -> Generator[Callable[[], None]]:
        """While it is open, weights that were made ready for a block stay until it is called.

        Args:
            dtype: what the model runs in meanwhile; None: its own.
        """
        if dtype is None or dtype == self.dtype:
            yield lambda: None
            return
        with in_dtype(self.model, dtype) as weights, weights.hold() as let_go:
            yield let_go

    def unload(self) -> None:
        """Free the weights. The object can no longer be run."""
        self.model.to("meta")  # pyright: ignore[reportCallIssue, reportArgumentType]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()


def load_model(
    source: str | Path | Checkpoint,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    template_from: str | Path | Checkpoint | None = None,
    merge: bool = False,
    offload: bool = False,
) -> LoadedModel:
    """Load a checkpoint for running.

    Args:
        source: an opened checkpoint, or what `open_checkpoint` opens without the network. An
            adapter is loaded with peft on its base.
        device: see `pick_device`.
        dtype: of the weights; default: the dtype of most weights on disk.
        template_from: a folder or checkpoint whose chat template replaces the model's own.
        merge: an adapter changes the weights of its base, instead of running beside them.
        offload: read weights when they are needed instead of holding them; an adapter is merged.

    Raises:
        ModelError: the folder cannot be run: unknown architecture, code of its own, missing or
            misshapen weights, a corrupt tokenizer; not enough memory.
        CheckpointError: nothing is there, or its headers are damaged (see `open_checkpoint`).
        MissingExtraError: an adapter, and peft is not installed.
        UsageError: the device does not exist.
    """
    place = pick_device(device)
    places = _find(source)
    folder, adapter = places.model, places.adapter
    if offload:
        return _offloaded(source, places, device=place, dtype=dtype)
    with quiet_libraries():
        tokenizer = tokenizer_in(folder, adapter)
        if template_from is not None:
            tokenizer.chat_template = read_chat_template(template_from)
        model = weights_in(folder, dtype or dtype_on_disk(folder))
        if places.vocabulary is not None:
            model.resize_token_embeddings(places.vocabulary, mean_resizing=False)
        if adapter is not None:
            model = attach_adapter(model, adapter, merge=merge)
        try:
            model.to(place)  # pyright: ignore[reportCallIssue, reportArgumentType]
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{places.name} does not fit into the memory of {place}", "use --device cpu"
            ) from error
    folders = [folder] if adapter is None else [adapter, folder]
    return wrap_model(model, tokenizer, name=places.name, folders=folders)


@dataclass(frozen=True)
class OffloadedModel(LoadedModel):
    """A model whose weights are read when they are needed."""

    weights: OffloadedWeights = field(repr=False)

    @property
    def offloaded(self) -> bool:
        """See `LoadedModel.offloaded`."""
        return True

    @contextmanager
    def held_weights(self, dtype: torch.dtype | None = None) -> Generator[Callable[[], None]]:
        """See `LoadedModel.held_weights`."""
        with self.weights.hold(dtype) as let_go:
            yield let_go

    def unload(self) -> None:
        """Free what is in place. The object can no longer be run."""
        self.weights.close()
        super().unload()


def _offloaded(
    source: str | Path | Checkpoint,
    places: _Places,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> OffloadedModel:
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, offline=True)
    if places.vocabulary is not None:
        raise ModelError(
            f"{places.name} changes the vocabulary of its base: it cannot be read block by block",
            "leave --offload out",
        )
    own = dtype or dtype_on_disk(places.model)
    if own is None:
        raise ModelError(f"{places.name} holds no weights of a float type")
    with quiet_libraries():
        tokenizer = tokenizer_in(places.model, places.adapter)
        weights = OffloadedWeights(checkpoint, places.model, dtype=own, device=device)
    folders = [places.model] if places.adapter is None else [places.adapter, places.model]
    return OffloadedModel(
        model=weights.model,
        tokenizer=tokenizer,
        device=device,
        name=places.name,
        stop_ids=_stop_ids(weights.model, tokenizer, folders),
        chat_template_sha256=chat_template_sha256(tokenizer),
        dtype=own,
        weights=weights,
    )


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str = "in memory",
    folders: list[Path] | None = None,
) -> LoadedModel:
    """A model that is already in memory as a `LoadedModel`, switched to evaluation mode.

    Args:
        model: on its device.
        tokenizer: with its chat template.
        name: for messages.
        folders: whose generation_config.json contributes stop ids.
    """
    model.eval()
    weight: Any = next(model.parameters())
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        device=weight.device,
        name=name,
        stop_ids=_stop_ids(model, tokenizer, folders or []),
        chat_template_sha256=chat_template_sha256(tokenizer),
        dtype=weight.dtype,
    )


def load_tokenizer(source: str | Path | Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer alone; for an adapter its own where it has one, else its base's.

    Raises:
        ModelError: no tokenizer, or a corrupt one.
        CheckpointError: as `load_model`.
    """
    places = _find(source)
    with quiet_libraries():
        return tokenizer_in(places.model, places.adapter)


def read_chat_template(source: str | Path | Checkpoint) -> str:
    """The chat template of a checkpoint, without loading its weights.

    Raises:
        ModelError: it has none, or its tokenizer cannot be loaded.
        CheckpointError: as `load_model`.
    """
    return chat_template(load_tokenizer(source))


@dataclass(frozen=True)
class _Places:
    """Where the parts of a checkpoint are."""

    name: str  # as the user typed it
    model: Path
    adapter: Path | None = None
    vocabulary: int | None = None  # embedding rows the adapter brings, where it changes them


def _find(source: str | Path | Checkpoint) -> _Places:
    if isinstance(source, Checkpoint):
        checkpoint = source
    else:
        with open_checkpoint(source, offline=True) as checkpoint:
            pass  # its headers have been checked; transformers reads the files itself
    if not isinstance(checkpoint, AdapterCheckpoint):
        return _Places(checkpoint.source, checkpoint.folder)
    base = checkpoint.base
    if base.kind == "adapter":
        raise ModelError(
            f"{checkpoint.source} is an adapter on an adapter",
            "merge the inner one into its base first",
        )
    rows = checkpoint.config.get("vocab_size")
    changed = isinstance(rows, int) and rows != base.config.get("vocab_size")
    return _Places(
        checkpoint.source, base.folder, checkpoint.adapter_folder, rows if changed else None
    )


def _stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folders: list[Path]
) -> tuple[int, ...]:
    declared: list[Any] = [_generation_eos(folder) for folder in folders]
    declared.append(getattr(model.config, "eos_token_id", None))
    declared.append(getattr(model.config.get_text_config(), "eos_token_id", None))
    declared.append(end_of_turn_id(tokenizer))
    stops = {
        token
        for value in declared
        for token in (value if isinstance(value, list | tuple) else [value])
        if isinstance(token, int) and not isinstance(token, bool) and token >= 0
    }
    if not stops and isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    return tuple(sorted(stops))


def _generation_eos(folder: Path) -> Any:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        log.warning("%s is ignored: %s", file, error)
        return None
    return content.get("eos_token_id") if isinstance(content, dict) else None
