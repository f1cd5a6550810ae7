"""Where a checkpoint says it comes from: proposals for `--aligned` and `--base`, with the evidence.

Read are the card's front matter, the adapter's config and, one step further, the same of the parent
where it is on this machine. Nothing is fetched and nothing is guessed from weights. A proposal is
shown to the user, who decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

MAX_STEPS = 8
"""How far up the ancestors are followed."""

_TUNED = re.compile(r"(?:^|[-_.])(it|instruct|chat|dpo|rlhf|sft|aligned)(?:$|[-_.])", re.IGNORECASE)


@dataclass(frozen=True)
class Parent:
    """One step up: what a folder names as its origin, and how it says so."""

    name: str
    relation: str
    """finetune, adapter, quantized or merge."""
    evidence: str


@dataclass(frozen=True)
class Proposal:
    """What might be given as the aligned and the base model."""

    aligned: str | None
    base: str | None
    evidence: tuple[str, ...]
    """One sentence per step, also where the trail ends."""


def propose(folder: Path) -> Proposal:
    """Follow a fine-tune's stated origin.

    The nearest ancestor that looks tuned for instructions (by its name or a chat template) is
    proposed as aligned, and its own parent as base. Where no ancestor looks so, the nearest one is
    proposed, and the evidence says that nothing else speaks for it.
    """
    evidence: list[str] = []
    here: Path | None = folder
    seen: list[str] = []
    aligned: str | None = None
    for _ in range(MAX_STEPS):
        parents = [] if here is None else list(read_parents(here))
        if not parents:
            break
        evidence += [parent.evidence for parent in parents]
        if len(parents) > 1:
            evidence.append("a merge has several parents: which one is the aligned model is open")
            break
        parent = parents[0]
        if parent.name in seen:
            evidence.append(f"{parent.name} leads back to itself")
            break
        seen.append(parent.name)
        if aligned is not None:
            return Proposal(aligned, parent.name, tuple(evidence))
        assert here is not None
        here = _local(parent.name, here)
        if looks_tuned(parent.name, here):
            aligned = parent.name
    if aligned is None and seen:
        aligned = seen[0]
        evidence.append(f"nothing but its place in the lineage says that {aligned} is aligned")
    return Proposal(aligned, None, tuple(evidence))


def read_parents(folder: Path) -> tuple[Parent, ...]:
    """The origins that a folder names itself, the card's before the adapter config's."""
    adapter = _read_json(folder / "adapter_config.json")
    card = read_front_matter(folder / "README.md")
    named = card.get("base_model")
    names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
    found = [name for name in cast(list[Any], names) if isinstance(name, str) and name]
    source = "its card"
    if not found:
        name = adapter.get("base_model_name_or_path")
        found, source = ([name] if isinstance(name, str) and name else []), "its adapter config"
    relation = card.get("base_model_relation")
    if not isinstance(relation, str):
        relation = "adapter" if adapter else "merge" if len(found) > 1 else "finetune"
    return tuple(
        Parent(name, relation, f"{folder.name}: {source} names {name} ({relation})")
        for name in found
    )


def looks_tuned(name: str, folder: Path | None) -> bool:
    """Whether a model looks tuned for instructions: by its name, or by a chat template."""
    if _TUNED.search(name.rstrip("/").split("/")[-1]):
        return True
    if folder is None:
        return False
    settings = _read_json(folder / "tokenizer_config.json")
    return (folder / "chat_template.jinja").is_file() or "chat_template" in settings


def read_front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML between the first two lines of dashes; empty where there is none or it is broken."""
    try:
        text = card.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if found is None:
        return {}
    import yaml  # most folders have no card

    try:
        value: Any = yaml.safe_load(found[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return cast(Mapping[str, Any], value) if isinstance(value, dict) else {}


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        value: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return cast(Mapping[str, Any], value) if isinstance(value, dict) else {}


def _local(name: str, child: Path) -> Path | None:
    """The parent's folder where it is on this machine: a path, or the newest cached snapshot."""
    for path in (Path(name).expanduser(), child / name):
        if path.is_dir():
            return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    from huggingface_hub import try_to_load_from_cache

    from realign.checkpoint.hub import cache_folder

    cached = try_to_load_from_cache(name, "config.json", cache_dir=cache_folder())
    return Path(cached).parent if isinstance(cached, str) else None
