"""What a model's small files say about asking it something: its tokenizer, its chat template.

A plan decides by them, long before a model library reads the same files. Only what is sure is
refused here; what remains is found when the tokenizer is loaded. Not here: loading and rendering,
which the room of models does, with the same messages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from realign.checkpoint.sidecars import TEMPLATE_FOLDER
from realign.errors import ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
"""One of them is in every folder with a tokenizer."""
_OWN_FORMATS = ("tekken*.json", "tokenizer.model.v*")
"""Tokenizers that render conversations without a template."""


def tokenizer_folder(folder: Path, adapter: Path | None = None) -> Path:
    """Where the tokenizer of a model is: an adapter's own goes before its base's.

    Args:
        folder: of the model, or of the adapter's base.
        adapter: of the adapter, where there is one.

    Raises:
        ModelError: there is none.
    """
    for where in (folder,) if adapter is None else (adapter, folder):
        if any((where / name).is_file() for name in TOKENIZER_FILES):
            return where
    raise ModelError(
        f"{folder} holds no tokenizer", "copy the tokenizer files of the model it was tuned from"
    )


def require_template(where: Path) -> None:
    """Check that the tokenizer in a folder has a template for a plain conversation.

    Template files go before the entry of tokenizer_config.json, as in transformers.

    Raises:
        ModelError: there is none, or a file that may hold it cannot be read.
    """
    if any(any(where.glob(pattern)) for pattern in _OWN_FORMATS):
        return
    file = where / "tokenizer_config.json"
    try:
        settings: Any = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        named = {each.stem: each for each in (where / TEMPLATE_FOLDER).glob("*.jinja")}
        if (where / "chat_template.jinja").is_file():
            named.setdefault("default", where / "chat_template.jinja")
        found: Any = {name: each.read_text("utf-8") for name, each in named.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"the tokenizer in {where} cannot be loaded: {error}",
            "copy the tokenizer files again from the model it was tuned from",
        ) from None
    if not found and isinstance(settings, dict):
        found = cast(dict[str, Any], settings).get("chat_template")
    if not _has_default(found):
        raise no_template(str(where))


def _has_default(found: Any) -> bool:
    """Whether a template, or the one of several that is called "default", has text."""
    if isinstance(found, list):
        entries = [each for each in cast(list[Any], found) if isinstance(each, dict)]
        found = {each.get("name"): each.get("template") for each in entries}
    if isinstance(found, dict):
        found = cast(dict[Any, Any], found).get("default")
    return isinstance(found, str) and bool(found.strip())


def no_template(where: str) -> ModelError:
    """What to tell of a tokenizer without a chat template."""
    return ModelError(
        f"{where} has no chat template, so it cannot be asked anything",
        "copy chat_template.jinja (or the chat_template entry of tokenizer_config.json) from "
        "the aligned model into the folder",
    )
