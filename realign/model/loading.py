"""A folder or an opened checkpoint as a running model with its tokenizer.

Always from local files (Hub ids are resolved by `realign.checkpoint` before), never with code
from the folder, never from pickles; in evaluation mode and in the dtype on disk unless asked
otherwise. An adapter runs unmerged on its base. The folder's `generation_config.json` is read for
its end-of-sequence ids and for nothing else.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from realign.checkpoint.adapter import AdapterCheckpoint
from realign.checkpoint.chat_files import tokenizer_folder
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.errors import MissingExtraError, ModelError, UsageError
from realign.model.chat import chat_template, chat_template_sha256, end_of_turn_id
from realign.model.quiet import quiet_libraries

log = logging.getLogger(__name__)

# safetensors spellings of the dtypes a model can be run in.
_FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


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

    def unload(self) -> None:
        """Free the weights. The object can no longer be run."""
        self.model.to("meta")  # pyright: ignore[reportCallIssue, reportArgumentType]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()


def pick_device(spec: str | torch.device = "auto") -> torch.device:
    """The device named by "auto", "cpu", "cuda", "cuda:1" or "mps".

    "auto" is the first CUDA device, else mps, else the CPU.

    Raises:
        UsageError: an unknown spelling, or a device this machine does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if spec == "auto":
        return torch.device("cuda:0" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(spec)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device {spec!r}", "use auto, cpu, cuda, cuda:N or mps"
        ) from error
    if device.type == "cpu" or (device.type == "mps" and mps):
        return device
    if device.type == "cuda" and cuda and (device.index or 0) < torch.cuda.device_count():
        return torch.device("cuda", device.index or 0)
    raise UsageError(f"device {str(spec)!r} is not available on this machine", "use auto, or cpu")


def load_model(
    source: str | Path | Checkpoint,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    template_from: str | Path | Checkpoint | None = None,
) -> LoadedModel:
    """Load a checkpoint for running.

    Args:
        source: an opened checkpoint, or what `open_checkpoint` opens without the network. An
            adapter is loaded with peft on its base, unmerged.
        device: see `pick_device`.
        dtype: of the weights; default: the dtype of most weights on disk.
        template_from: a folder or checkpoint whose chat template replaces the model's own.

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
    with quiet_libraries():
        tokenizer = _load_tokenizer(adapter, folder)
        if template_from is not None:
            tokenizer.chat_template = read_chat_template(template_from)
        model = _load_weights(folder, dtype or _dtype_on_disk(folder))
        if places.vocabulary is not None:
            model.resize_token_embeddings(places.vocabulary, mean_resizing=False)
        if adapter is not None:
            model = _attach_adapter(model, adapter)
        try:
            model.to(place)  # pyright: ignore[reportCallIssue, reportArgumentType]
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{places.name} does not fit into the memory of {place}", "use --device cpu"
            ) from error
    folders = [folder] if adapter is None else [adapter, folder]
    return wrap_model(model, tokenizer, name=places.name, folders=folders)


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
        return _load_tokenizer(places.adapter, places.model)


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


def _load_tokenizer(adapter: Path | None, folder: Path) -> PreTrainedTokenizerBase:
    where = tokenizer_folder(folder, adapter)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            where, local_files_only=True, trust_remote_code=False
        )
    # The tokenizers library raises bare Exception on a corrupt file, and a hostile one can break
    # transformers anywhere.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {where} cannot be loaded: {_first_line(error)}",
            "copy the tokenizer files again from the model it was tuned from",
        ) from error
    return tokenizer


def _dtype_on_disk(folder: Path) -> torch.dtype | None:
    """The float dtype that most numbers in the folder are stored in; None where none can be run."""
    sizes: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:  # pyright: ignore[reportUnknownVariableType]
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    view: Any = tensors.get_slice(key)
                    count = 1
                    for size in view.get_shape():
                        count *= size
                    sizes[view.get_dtype()] += count
        # safetensors' own error type is not a ValueError; loading will name the file's fault
        except Exception as error:
            raise ModelError(
                f"{file} cannot be read: {_first_line(error)}", "download or copy it again"
            ) from error
    floats = [(count, name) for name, count in sizes.items() if name in _FLOAT_DTYPES]
    return _FLOAT_DTYPES[max(floats)[1]] if floats else None


def _load_weights(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **local)
    except Exception as error:  # an untrusted JSON file can break its reader anywhere
        raise ModelError(
            f"{folder / 'config.json'} cannot be used: {_first_line(error)}",
            "realign runs architectures that the installed transformers knows, without code from "
            "the folder; a newer transformers may know this one",
        ) from error
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            # A clean one, so that the folder's own is never obeyed.
            generation_config=GenerationConfig(),
            output_loading_info=True,
            **local,
        )
    except Exception as error:  # safetensors, torch and transformers each raise their own
        raise ModelError(
            f"the model in {folder} cannot be loaded: {_first_line(error)}",
            "check that config.json and the weight files belong together and are complete",
        ) from error
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{folder} lacks weights that its architecture needs: {_some(missing)}",
            "the model would run with random numbers there; copy the missing weight files",
        )
    if info["unexpected_keys"]:
        log.warning("%s: weights not used: %s", folder, _some(sorted(info["unexpected_keys"])))
    model.requires_grad_(False)
    return model


def _auto_class(config: Any) -> Any:
    """The library's class for text in, text out: that of causal models, where it knows the config.

    Vision-language models answer plain text through their own class.
    """
    causal: Any = AutoModelForCausalLM
    vision: Any = AutoModelForImageTextToText
    if type(config) in causal._model_mapping:
        return causal
    return vision if type(config) in vision._model_mapping else causal


def _attach_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        except Exception as error:
            raise ModelError(
                f"the adapter in {adapter} cannot be attached to its base: {_first_line(error)}",
                "check that it was trained on this base and that its files are complete",
            ) from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):  # peft goes on with fresh weights
            raise ModelError(
                f"{adapter} lacks adapter weights: {_first_line(warning.message)}",
                "copy adapter_model.safetensors again",
            )
        log.warning("%s: %s", adapter, warning.message)
    if wrapped.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"{adapter} is a {wrapped.active_peft_config.peft_type.value} adapter",
            "realign runs adapters that change weights, such as LoRA",
        )
    # The layers were put into the model in place: its own class and module names stay.
    inner: PreTrainedModel = wrapped.get_base_model()
    inner.requires_grad_(False)
    return inner


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


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
