"""What transformers and peft make of local folders: a tokenizer, weights, an adapter on them.

Each of their many errors becomes one that names the folder and the next step. Which folders these
are, and what is put together from them, is in `loading`.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
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

from realign.checkpoint.chat_files import tokenizer_folder
from realign.errors import MissingExtraError, ModelError
from realign.model.quiet import ignore_deprecations

log = logging.getLogger(__name__)

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

# safetensors spellings of the dtypes a model can be run in.
_FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def tokenizer_in(folder: Path, adapter: Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of the adapter on it where that brings one.

    Raises:
        ModelError: there is none, or it is corrupt.
    """
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


def dtype_on_disk(folder: Path) -> torch.dtype | None:
    """The float dtype that most numbers in the folder are stored in; None where none can be run.

    Raises:
        ModelError: a weight file cannot be read.
    """
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


def weights_in(folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model, on the CPU; None leaves the dtype to its config.

    Raises:
        ModelError: an unknown architecture, missing or misshapen weights.
    """
    config = _config_in(folder)
    try:
        loaded: Any = _auto_class(config).from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            # A clean one, so that the folder's own is never obeyed.
            generation_config=GenerationConfig(),
            output_loading_info=True,
            **_LOCAL,
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


def skeleton_in(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, in evaluation mode: every tensor is on the meta device.

    Raises:
        ModelError: an unknown architecture.
    """
    config = _config_in(folder)
    try:
        with torch.device("meta"):
            made: Any = _auto_class(config).from_config(config, dtype=dtype)
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be built: {_first_line(error)}") from error
    made.generation_config = GenerationConfig()
    model: PreTrainedModel = made.eval()
    return model


def _config_in(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # an untrusted JSON file can break its reader anywhere
        raise ModelError(
            f"{folder / 'config.json'} cannot be used: {_first_line(error)}",
            "realign runs architectures that the installed transformers knows, without code from "
            "the folder; a newer transformers may know this one",
        ) from error


def _auto_class(config: Any) -> Any:
    """The library's class for text in, text out: that of causal models, where it knows the config.

    Vision-language models answer plain text through their own class.
    """
    causal: Any = AutoModelForCausalLM
    vision: Any = AutoModelForImageTextToText
    if type(config) in causal._model_mapping:
        return causal
    return vision if type(config) in vision._model_mapping else causal


def attach_adapter(
    model: PreTrainedModel, adapter: Path, *, merge: bool = False
) -> PreTrainedModel:
    """The model with an adapter's layers in it, or with its own weights changed by them.

    Args:
        model: the base.
        adapter: its folder.
        merge: change the weights, so that every matrix is a parameter again.

    Raises:
        ModelError: it does not fit, lacks weights, or changes no weights.
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_deprecations()
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
    inner: PreTrainedModel = wrapped.merge_and_unload() if merge else wrapped.get_base_model()
    inner.requires_grad_(False)
    return inner


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
