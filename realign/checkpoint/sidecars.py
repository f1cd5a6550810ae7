"""The small files that travel with a model's weights: tokenizer, templates, configs, code, card.

They are copied byte for byte into an output, never parsed and never executed. Left behind: weights
in any format, adapter files, traces of training, caches, signatures (they cover other bytes) and
our own manifest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from realign.errors import CheckpointError

MANIFEST_NAME = "realign.json"
TEMPLATE_FOLDER = "additional_chat_templates"

_FOLDERS = (TEMPLATE_FOLDER, "custom_generate")
WEIGHT_SUFFIXES = frozenset(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".gguf", ".ggml",
     ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pb", ".tflite", ".mlmodel", ".nemo",
     ".llamafile")
)  # fmt: skip
"""Of weights in any format."""
_NEVER_SUFFIXES = WEIGHT_SUFFIXES | frozenset(
    (".joblib", ".npy", ".tar", ".gz", ".tgz", ".zip", ".7z", ".sig", ".lock", ".incomplete")
)
_NEVER_NAMES = frozenset(
    (MANIFEST_NAME, "adapter_config.json", "trainer_state.json", "all_results.json",
     "train_results.json", "eval_results.json", "quantize_config.json", "audit.json", "items.jsonl",
     "report.html")
)  # fmt: skip
_TOKENIZER = re.compile(
    r"(special_tokens_map|added_tokens|byte_maps|normalizer|word_shape|word_pronunciation)\.json"
    r"|tokenizer.*\.json|tekken.*|merges\.txt|dict\.txt"
    r"|(.*[-_.])?vocab([-_.].*)?\.(json|txt)|.*\.(model|vocab|tiktoken|spm|bpe|codes|tokenizer)"
    r"|.*\.model\.v\d+.*"
)
_QUIET_FOLDERS = frozenset((".git", ".cache", ".eval_results", "realign-audit"))
# What loaders take up by its name alone, beside weights and tokenizers.
_SETTINGS = re.compile(
    r"(.*_)?config(_.*)?\.json|.*\.index\.json|configuration\.json|params\.json|modules\.json"
    r"|chat_template\..*|.*\.py"
)


def folder_sidecars(folder: Path) -> dict[str, Path]:
    """The files of a model folder that belong to an output, by relative name."""
    files = [path for path in folder.iterdir() if path.is_file() and travels(path.name)]
    for name in _FOLDERS:
        if (folder / name).is_dir():
            files += [
                path for path in (folder / name).rglob("*") if path.is_file() and travels(path.name)
            ]
    return {path.relative_to(folder).as_posix(): path for path in sorted(files)}


def travels(name: str) -> bool:
    """Whether a file of this name (without folders) belongs to an output."""
    return (
        not name.startswith(".")
        and Path(name).suffix.lower() not in _NEVER_SUFFIXES
        and not name.endswith(".index.json")
        and not name.startswith("adapter_model")
        and name not in _NEVER_NAMES
    )


def is_tokenizer(name: str) -> bool:
    """Whether a file of this name (without folders) holds a tokenizer's vocabulary or settings."""
    return _TOKENIZER.fullmatch(name) is not None


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether one of these files holds a tokenizer's vocabulary, or is its code."""
    return any(
        (is_tokenizer(name) and not name.endswith("_config.json"))
        or name.startswith("tokenization_")
        for name in names
    )


def is_quiet(name: str) -> bool:
    """Whether this relative name lies in a folder where no loader looks."""
    return name.split("/")[0] in _QUIET_FOLDERS


def would_be_loaded(name: str) -> bool:
    """Whether some loader takes up a file of this relative name without being told to."""
    *folders, last = name.split("/")
    if is_quiet(name):
        return False
    if folders and folders[0] in _FOLDERS:
        return True
    last = last.lower()  # a file system may not tell one case from the other
    return (
        Path(last).suffix in WEIGHT_SUFFIXES
        or is_tokenizer(last)
        or _SETTINGS.fullmatch(last) is not None
    )


def adapter_sidecars(base: Mapping[str, Path | bytes], folder: Path) -> dict[str, Path | bytes]:
    """The files beside a merged adapter: the base's, under the adapter's own tokenizer and card.

    A tokenizer is taken whole from one side, so that vocabulary and settings never come from two. A
    chat template in the adapter's folder wins; without one the base's stays.
    """
    own = folder_sidecars(folder)
    found = dict(base)
    # The base's card does not describe the fine-tune.
    found.pop("README.md", None)
    if any(is_tokenizer(name) for name in own):
        for name in [name for name in found if is_tokenizer(name)]:
            del found[name]
    if _has_template(own, folder):
        for name in [name for name in found if _is_template(name)]:
            del found[name]
    found.update(
        {
            name: path
            for name, path in own.items()
            if is_tokenizer(name)
            or _is_template(name)
            or name.startswith(("README", "LICENSE", "NOTICE", "USE_POLICY"))
        }
    )
    return dict(sorted(found.items()))


def _is_template(name: str) -> bool:
    return name.startswith(("chat_template.", f"{TEMPLATE_FOLDER}/"))


def _has_template(own: Mapping[str, Path], folder: Path) -> bool:
    if any(_is_template(name) for name in own):
        return True
    path = own.get("tokenizer_config.json")
    if path is None:
        return False
    try:
        settings = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} is not valid JSON: {error}", "restore the file"
        ) from None
    return isinstance(settings, dict) and "chat_template" in settings
