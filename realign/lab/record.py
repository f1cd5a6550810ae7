"""`family.json`: what a family was made from and what was measured on it.

Nothing in it depends on the clock or on where the family lies, so the same seed gives the same
record. It is rewritten whole, atomically, after each model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from realign._version import __version__
from realign.audit.canonical import sha256_json
from realign.audit.suites import Suite
from realign.errors import NotFoundError, OutputError
from realign.lab.presets import Preset
from realign.lab.tokenizer import TokenizerKind

FAMILY_FILE = "family.json"
FAMILY_SCHEMA = "realign/lab-family/1"


@dataclass
class FamilyRecord:
    """The record of one family, as it grows."""

    preset: str
    seed: int
    tokenizer: TokenizerKind
    fingerprint: str
    """SHA-256 over recipe, world, suites and library versions: what may be resumed together."""
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    suites: dict[str, Any] = field(default_factory=dict[str, Any])
    models: dict[str, Any] = field(default_factory=dict[str, Any])
    """By name: kind, training, files with SHA-256, measured rates."""

    def write(self, folder: Path) -> None:
        """Write `family.json` into the family's folder."""
        write_json(folder / FAMILY_FILE, {"schema": FAMILY_SCHEMA, **asdict(self)})


def new_record(
    preset: Preset, *, seed: int, tokenizer: TokenizerKind, suites: Mapping[str, Suite]
) -> FamilyRecord:
    """The record of a family of which nothing is built yet."""
    recipe = asdict(preset)
    versions = {
        "realign": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    hashes = {name: suite.suite_hash for name, suite in suites.items()}
    fingerprint = sha256_json(
        {"recipe": recipe, "seed": seed, "tokenizer": tokenizer, "suites": hashes}
        | {"versions": versions}
    )
    option = "" if tokenizer == "words" else f" --tokenizer {tokenizer}"
    return FamilyRecord(
        preset=preset.name,
        seed=seed,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        recipe=recipe,
        versions=versions,
        command=f"realign lab build OUT --preset {preset.name} --seed {seed}{option}",
    )


def read_record(folder: Path) -> FamilyRecord:
    """The record of an existing family.

    Raises:
        NotFoundError: the folder holds no family.
        OutputError: `family.json` cannot be read as one.
    """
    file = folder / FAMILY_FILE
    if not file.is_file():
        raise NotFoundError(
            f"{folder}: no laboratory family here ({FAMILY_FILE} is missing)",
            "make one with: realign lab build OUT --preset tiny --seed 0",
        )
    try:
        data = cast("dict[str, Any]", json.loads(file.read_text(encoding="utf-8")))
        if data.pop("schema") != FAMILY_SCHEMA:
            raise ValueError("another schema")
        return FamilyRecord(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{file}: not a family record ({error})", "build the family anew") from (
            error
        )


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its path inside it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_json(file: Path, value: object) -> None:
    """Write JSON for people (indented), atomically."""
    write_text(file, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically: a partial sibling, flushed to disk, then renamed."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
