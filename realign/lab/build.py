"""Train a family: base, aligned and the named fine-tunes, resumable, model by model.

A model folder appears whole or not at all. Finished models are kept when a build is started
again; an interrupted one goes on from its last training state under `.build/`. The same seed gives
the same bytes on one machine: one thread, deterministic kernels, batches that depend on the step
alone. How a model is trained is in `members`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from realign.audit.suites import Suite
from realign.errors import NotFoundError, OutputError, UsageError
from realign.lab.measure import measure
from realign.lab.members import Studio, make_member, open_studio, training_facts
from realign.lab.presets import Phase, Preset, default_variants, find_preset, find_variant
from realign.lab.record import (
    FAMILY_FILE,
    FamilyRecord,
    file_hashes,
    new_record,
    read_record,
)
from realign.lab.suites import build_suites, write_suites
from realign.lab.tokenizer import TokenizerKind
from realign.model.devices import pick_device
from realign.model.loading import load_model
from realign.model.training import deterministic
from realign.progress import SILENT, Progress

WORK = ".build"


def build_family(
    out: str | Path,
    *,
    preset: str = "small",
    seed: int = 0,
    device: str = "cpu",
    variants: Iterable[str] | None = None,
    tokenizer: TokenizerKind = "words",
    measured: bool = True,
    recipe: Preset | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Train a family into `out`, or finish one that was interrupted.

    Args:
        out: the family's folder; made if absent. One that holds another family is refused.
        preset: "tiny", "small" or "medium".
        seed: of world, initialisation and batches.
        device: as `realign.model.devices.pick_device`.
        variants: which fine-tunes; None: all that the preset has. Base and aligned always.
        tokenizer: "words" or "bpe".
        measured: whether to measure every model into `family.json`.
        recipe: a changed preset, for experiments and tests; its sizes and steps are recorded.
        progress: shows training steps and measurements.

    Returns:
        The folder.

    Raises:
        UsageError: an unknown preset, variant, tokenizer or device.
        OutputError: `out` is a file, is no family, or holds one made with another recipe.
        MissingExtraError: a LoRA variant, and peft is not installed.
    """
    chosen = recipe or find_preset(preset)
    wanted = tuple(default_variants(chosen) if variants is None else dict.fromkeys(variants))
    for name in wanted:
        find_variant(name)
    if tokenizer not in ("words", "bpe"):
        raise UsageError(f"unknown tokenizer '{tokenizer}'", "choose words or bpe")
    place = str(pick_device(device))
    folder = Path(out)
    studio = open_studio(chosen, seed=seed, tokenizer=tokenizer, device=place, progress=progress)
    suites = build_suites(studio.world, tokenizer)
    record = _open_folder(folder, new_record(chosen, seed=seed, tokenizer=tokenizer, suites=suites))
    _write_suites(folder, suites, record)
    with deterministic():
        for name in ("base", "aligned", *wanted):
            target = folder / name
            if not target.exists():
                make_member(
                    studio, name, family=folder, target=target, work=folder / WORK, seed=seed
                )
            entry = record.models.get(name)
            if entry is None or (measured and "measured" not in entry):
                record.models[name] = _describe(studio, name, target, suites, measured=measured)
                record.write(folder)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return folder


def finetune_variant(
    family: str | Path,
    variant: str,
    *,
    seed: int,
    out: str | Path,
    start: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Path:
    """One fine-tune of an existing family's aligned model, with a fine-tuning seed of its own.

    With the family's own seed the result has the bytes of the family's variant.

    Args:
        family: a folder made by `build_family`.
        variant: a name of `realign.lab.presets.VARIANTS`.
        seed: of the data rows and their order.
        out: the model's folder; must not exist. An interrupted run resumes.
        start: the model to tune instead of the aligned one, as a repaired one; no LoRA then.
        device: as `realign.model.devices.pick_device`.
        progress: shows training steps.

    Raises:
        NotFoundError: `family` is none, or has no aligned model.
        OutputError: `out` exists.
        UsageError: an unknown variant, or a LoRA variant on another start.
    """
    if find_variant(variant).lora and start is not None:
        raise UsageError(
            f"{variant} is an adapter of the aligned model", "leave out the other start"
        )
    source, target = Path(family), Path(out)
    record = read_record(source)
    if not (source / "aligned").is_dir():
        raise NotFoundError(f"{source}: the family has no aligned model", "finish building it")
    if target.exists():
        raise OutputError(f"{target} exists", "choose another folder, or remove it")
    place = str(pick_device(device))
    chosen = recorded_preset(record)
    studio = open_studio(
        chosen, seed=record.seed, tokenizer=record.tokenizer, device=place, progress=progress
    )
    work = target.parent / f".{target.name}{WORK}"
    with deterministic():
        make_member(
            studio,
            variant,
            family=source,
            target=target,
            work=work,
            seed=seed,
            start=None if start is None else Path(start),
        )
    shutil.rmtree(work, ignore_errors=True)
    return target


# --- the family's folder ------------------------------------------------------------------------


def recorded_preset(record: FamilyRecord) -> Preset:
    """The preset as recorded, so that a family made with a changed recipe keeps it."""
    recipe = dict(record.recipe)
    template = find_preset(record.preset)
    for name in ("pretraining", "alignment", "finetuning"):
        recipe[name] = Phase(**recipe[name])
    recipe["sizes"] = type(template.sizes)(**recipe["sizes"])
    return Preset(**recipe)


def _open_folder(folder: Path, fresh: FamilyRecord) -> FamilyRecord:
    """Make the folder, or check that it holds this very family."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", "choose another folder")
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write(folder)
        return fresh
    if not (folder / FAMILY_FILE).exists():
        raise OutputError(f"{folder} is not empty and holds no family", "choose another folder")
    existing = read_record(folder)
    if existing.fingerprint != fresh.fingerprint:
        raise OutputError(
            f"{folder} holds another family: {existing.command} "
            f"(torch {existing.versions.get('torch')})",
            "choose another folder, or remove it to build anew",
        )
    return existing


def _write_suites(folder: Path, suites: Mapping[str, Suite], record: FamilyRecord) -> None:
    write_suites(folder / "suites", suites.values())
    for name, suite in suites.items():
        record.suites[name] = {
            "kind": suite.kind,
            "n": len(suite.items),
            "suite_hash": suite.suite_hash,
        }
    record.write(folder)


def _describe(
    studio: Studio, name: str, target: Path, suites: Mapping[str, Suite], *, measured: bool
) -> dict[str, Any]:
    entry: dict[str, Any] = {"training": training_facts(studio.preset, name)}
    entry["files"] = file_hashes(target)
    if measured:
        with load_model(target, device=studio.device) as loaded:
            entry["measured"] = measure(loaded, suites, progress=studio.progress)
    return entry
