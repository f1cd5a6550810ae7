"""A model's folder: written beside its place, flushed to disk, renamed; whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerFast

from realign.lab.record import write_text
from realign.model.quiet import quiet_libraries


def save_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    target: Path,
    work: Path,
    *,
    base: Path | None = None,
) -> None:
    """Write a model folder beside its place, flush it, and rename it.

    Args:
        model: a model, or an adapter on one.
        tokenizer: saved beside a model.
        target: the folder.
        work: where it is written first; on the same disk.
        base: what an adapter is to be put on; it is named relative to `target`, so that a family
            can be moved.
    """
    partial = work / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.to("cpu")
    with quiet_libraries():
        if hasattr(model, "peft_config"):
            assert base is not None, "an adapter has a base"
            _save_adapter(model, partial, os.path.relpath(base, target))
        else:
            model.generation_config = GenerationConfig(
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    for path in partial.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    partial.replace(target)


def _save_adapter(model: Any, folder: Path, base: str) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a card full of blanks
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # peft keeps the modules in a set, whose order changes from one process to the next.
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
