"""The small files that travel with a model's weights: tokenizer, templates, configs, code, card.

They are copied byte for byte into an output, never parsed and never executed. Left behind: weights
in any format, adapter files, traces of training, caches, signatures (they cover other bytes) and
our own manifest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from realign.errors import CheckpointError

MANIFEST_NAME = "realign.json"
TEMPLATE_FOLDER = "additional_chat_templates"

_FOLDERS = (TEMPLATE_FOLDER, "custom_generate")
_NEVER_SUFFIXES = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
        ".pickle",
        ".joblib",
        ".npy",
        ".npz",
        ".gguf",
        ".ggml",
        ".h5",
        ".msgpack",
        ".onnx",
        ".onnx_data",
        ".ot",
        ".pb",
        ".tflite",
        ".mlmodel",
        ".nemo",
        ".llamafile",
        ".tar",
        ".gz",
        ".tgz",
        ".zip",
        ".7z",
        ".sig",
        ".lock",
        ".incomplete",
    ]
)
_NEVER_NAMES = frozenset(
    (MANIFEST_NAME, "adapter_config.json", "trainer_state.json", "all_results.json",
     "train_results.json", "eval_results.json", "quantize_config.json", "audit.json", "items.jsonl",
     "report.html")
)  # fmt: skip
_VOCABULARY = frozenset(
    ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
     "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
     "sentencepiece.bpe.model")
)  # fmt: skip


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


def has_vocabulary(names: Iterable[str]) -> bool:
    """Whether one of these files holds a tokenizer's vocabulary."""
    return any(
        (name in _VOCABULARY and not name.endswith("_config.json"))
        or name.endswith((".model", ".tiktoken", ".spm", ".vocab"))
        or name.startswith(("tekken", "tokenization_"))
        for name in names
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
    if any(name in _VOCABULARY for name in own):
        for name in [name for name in found if name in _VOCABULARY]:
            del found[name]
    if _has_template(own, folder):
        for name in [name for name in found if _is_template(name)]:
            del found[name]
    found.update(
        {
            name: path
            for name, path in own.items()
            if name in _VOCABULARY
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
