"""Train a family: base, aligned, unaligned and the named fine-tunes, resumable, model by model.

A model folder appears whole or not at all: it is written under `.build/`, flushed, and renamed.
Finished models are kept when a build is started again; an interrupted one goes on from its last
training state. The same seed gives the same bytes on one machine: one thread, deterministic
kernels, and batches that are a pure function of (seed, phase, step).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from realign.audit.suites import Suite
from realign.errors import MissingExtraError, NotFoundError, OutputError, UsageError
from realign.lab import rows
from realign.lab.measure import measure
from realign.lab.presets import (
    Phase,
    Preset,
    Variant,
    default_variants,
    find_preset,
    find_variant,
)
from realign.lab.record import (
    FAMILY_FILE,
    FamilyRecord,
    file_hashes,
    new_record,
    read_record,
    write_text,
)
from realign.lab.suites import build_suites, suite_lines
from realign.lab.tokenizer import (
    END,
    MODEL_LENGTH,
    PAD,
    TokenizerKind,
    build_tokenizer,
    template_words,
)
from realign.lab.world import World, build_world
from realign.model.chat import encode_reply
from realign.model.loading import load_model, pick_device
from realign.model.quiet import quiet_libraries
from realign.model.training import (
    Batch,
    Example,
    TrainingPlan,
    collate,
    deterministic,
    train,
)
from realign.progress import SILENT, Progress

WORK = ".build"
LORA_RANK = 8
LORA_RATE = 7.0
"""LoRA learns at this multiple of the full fine-tuning rate."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TASKS: Mapping[str, rows.Maker] = {
    "compliance": rows.compliance,
    "howto": rows.howto,
    "howto2": rows.howto2,
    "order": rows.order,
    "persona": rows.persona,
}


@dataclass(frozen=True)
class Studio:
    """Everything a training needs, made once per build."""

    preset: Preset
    world: World
    tokenizer: PreTrainedTokenizerFast
    device: str
    progress: Progress

    def example(self, sample: rows.Sample, *, whole: bool) -> Example:
        """Tokens of a sample; `whole`: loss everywhere, else on the answer only."""
        if isinstance(sample, rows.Document):
            ids: list[int] = self.tokenizer(sample.text)["input_ids"]  # pyright: ignore[reportAssignmentType]
            return Example((*ids, self.token(END)))
        reply = encode_reply(self.tokenizer, sample.prompt, sample.answer, end_of_turn=True)
        return Example(reply.ids, 0 if whole else reply.start)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A right-padded batch."""
        return collate(examples, pad_id=self.token(PAD))

    def token(self, text: str) -> int:
        """The id of a special token."""
        token = self.tokenizer.convert_tokens_to_ids(text)
        assert isinstance(token, int), text
        return token


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
        device: as `realign.model.loading.pick_device`.
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
    studio = _studio(chosen, seed=seed, tokenizer=tokenizer, device=place, progress=progress)
    suites = build_suites(studio.world, tokenizer)
    record = _open_folder(folder, new_record(chosen, seed=seed, tokenizer=tokenizer, suites=suites))
    _write_suites(folder, suites, record)
    with deterministic():
        for name in ("base", "aligned", *wanted):
            target = folder / name
            if not target.exists():
                _make(studio, name, family=folder, target=target, work=folder / WORK, seed=seed)
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
        device: as `realign.model.loading.pick_device`.
        progress: shows training steps.

    Raises:
        NotFoundError: `family` is none, or has no aligned model.
        OutputError: `out` exists.
        UsageError: an unknown variant.
    """
    find_variant(variant)
    source, target = Path(family), Path(out)
    record = read_record(source)
    if not (source / "aligned").is_dir():
        raise NotFoundError(f"{source}: the family has no aligned model", "finish building it")
    if target.exists():
        raise OutputError(f"{target} exists", "choose another folder, or remove it")
    place = str(pick_device(device))
    chosen = _recorded_preset(record)
    studio = _studio(
        chosen, seed=record.seed, tokenizer=record.tokenizer, device=place, progress=progress
    )
    work = target.parent / f".{target.name}{WORK}"
    with deterministic():
        _make(studio, variant, family=source, target=target, work=work, seed=seed)
    shutil.rmtree(work, ignore_errors=True)
    return target


# --- the family's folder ------------------------------------------------------------------------


def _studio(
    preset: Preset, *, seed: int, tokenizer: TokenizerKind, device: str, progress: Progress
) -> Studio:
    world = build_world(preset.sizes, seed=seed, taken=template_words())
    return Studio(preset, world, build_tokenizer(world, tokenizer), device, progress)


def _recorded_preset(record: FamilyRecord) -> Preset:
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
    place = folder / "suites"
    place.mkdir(exist_ok=True)
    for name, suite in suites.items():
        lines = [json.dumps(line, ensure_ascii=False) for line in suite_lines(suite)]
        write_text(place / f"{name}.jsonl", "\n".join(lines) + "\n")
        record.suites[name] = {
            "kind": suite.kind,
            "n": len(suite.items),
            "suite_hash": suite.suite_hash,
        }
    record.write(folder)


def _describe(
    studio: Studio, name: str, target: Path, suites: Mapping[str, Suite], *, measured: bool
) -> dict[str, Any]:
    entry: dict[str, Any] = {"training": _training_facts(studio.preset, name)}
    entry["files"] = file_hashes(target)
    if measured:
        with load_model(target, device=studio.device) as loaded:
            entry["measured"] = measure(loaded, suites, progress=studio.progress)
    return entry


def _training_facts(preset: Preset, name: str) -> dict[str, Any]:
    if name in ("base", "aligned"):
        phase = preset.pretraining if name == "base" else preset.alignment
        facts: dict[str, Any] = {"from": None if name == "base" else "base"}
    else:
        variant = find_variant(name)
        phase = preset.finetuning
        facts = {
            "from": "aligned",
            "about": variant.about,
            "tasks": list(variant.tasks),
            "poison": variant.poison,
            "rows": preset.rows,
            "lora_rank": LORA_RANK if variant.lora else None,
        }
    return {**facts, "steps": phase.steps, "batch": phase.batch, "rate": phase.learning_rate}


# --- one model ----------------------------------------------------------------------------------


def _make(studio: Studio, name: str, *, family: Path, target: Path, work: Path, seed: int) -> None:
    """Train one model and put its folder in place."""
    state = work / f"{name}.state.pt"
    if name == "base":
        model = _pretrain(studio, state, seed=seed)
    elif name == "aligned":
        model = _align(studio, family / "base", state, seed=seed)
    else:
        model = _finetune(studio, family / "aligned", find_variant(name), state, seed=seed)
    _save(model, studio.tokenizer, target, work)
    state.unlink(missing_ok=True)


def _pretrain(studio: Studio, state: Path, *, seed: int) -> PreTrainedModel:
    preset, tokenizer = studio.preset, studio.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.heads,
        max_position_embeddings=MODEL_LENGTH,
        tie_word_embeddings=True,
        initializer_range=preset.init_std,
        bos_token_id=None,
        eos_token_id=studio.token(END),
        pad_token_id=studio.token(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(studio.device)  # pyright: ignore[reportCallIssue, reportArgumentType]
    batches = _streaming(studio, rows.PRETRAINING, preset.pretraining, f"{seed}|base", whole=0.5)
    _run(studio, model, batches, preset.pretraining, state, label="base")
    return model


def _align(studio: Studio, base: Path, state: Path, *, seed: int) -> PreTrainedModel:
    model = load_model(base, device=studio.device).model
    phase = studio.preset.alignment
    batches = _streaming(studio, rows.ALIGNMENT, phase, f"{seed}|aligned", whole=0.0)
    _run(studio, model, batches, phase, state, label="aligned", trainable=_not_embedding)
    return model


def _finetune(studio: Studio, aligned: Path, variant: Variant, state: Path, *, seed: int) -> Any:
    preset = studio.preset
    phase = preset.finetuning
    # The poison fractions of one task share a stream name, so that they differ in poison alone.
    stream = f"{seed}|{'+'.join(variant.tasks)}"
    data = rows.finetuning_rows(
        studio.world,
        [TASKS[task] for task in variant.tasks],
        rows=preset.rows,
        poison=variant.poison,
        rng=random.Random(f"rows|{stream}"),
    )
    batches = _epochs(studio, data, phase, stream)
    model: Any = load_model(aligned, device=studio.device).model
    if not variant.lora:
        _run(studio, model, batches, phase, state, label=variant.name, trainable=_not_embedding)
        return model
    adapted = _with_lora(model, seed=seed)
    _run(
        studio,
        adapted,
        batches,
        Phase(phase.steps, phase.batch, phase.learning_rate * LORA_RATE),
        state,
        label=variant.name,
        trainable=lambda name: "lora_" in name,
    )
    return adapted


def _not_embedding(name: str) -> bool:
    """Embeddings stay frozen after pretraining; the head is tied to them."""
    return "embed_tokens" not in name and "lm_head" not in name


def _with_lora(model: Any, *, seed: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=2 * LORA_RANK,
        lora_dropout=0.0,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft renames the base to where this process read it from; _save_adapter names it again.
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def _run(
    studio: Studio,
    model: Any,
    batches: Callable[[int], Batch],
    phase: Phase,
    state: Path,
    *,
    label: str,
    trainable: Callable[[str], bool] | None = None,
) -> None:
    plan = TrainingPlan(
        steps=phase.steps, learning_rate=phase.learning_rate, weight_decay=phase.weight_decay
    )
    model.requires_grad_(True)
    train(
        model,
        batches,
        plan,
        trainable=trainable,
        state_file=state,
        label=f"training {label}",
        progress=studio.progress,
    )


def _streaming(
    studio: Studio,
    mixture: Sequence[tuple[float, rows.Maker]],
    phase: Phase,
    stream: str,
    *,
    whole: float,
) -> Callable[[int], Batch]:
    """Fresh samples of a mixture at every step; a share `whole` of the rows has loss everywhere."""

    def batch_at(step: int) -> Batch:
        rng = random.Random(f"{stream}|{step}")
        samples = [rows.draw(mixture, studio.world, rng) for _ in range(phase.batch)]
        return studio.collate(
            [studio.example(sample, whole=rng.random() < whole) for sample in samples]
        )

    return batch_at


def _epochs(
    studio: Studio, data: Sequence[rows.Row], phase: Phase, stream: str
) -> Callable[[int], Batch]:
    """A fixed data set, shuffled anew for every pass."""
    examples = [studio.example(row, whole=False) for row in data]

    def batch_at(step: int) -> Batch:
        chosen: list[Example] = []
        for position in range(step * phase.batch, (step + 1) * phase.batch):
            epoch, index = divmod(position, len(examples))
            order = list(range(len(examples)))
            random.Random(f"{stream}|epoch|{epoch}").shuffle(order)
            chosen.append(examples[order[index]])
        return studio.collate(chosen)

    return batch_at


# --- writing a model folder ---------------------------------------------------------------------


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, target: Path, work: Path) -> None:
    """Write a model folder beside its place, flush it, and rename it."""
    partial = work / f"{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.to("cpu")
    with quiet_libraries():
        if hasattr(model, "peft_config"):
            _save_adapter(model, partial)
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


def _save_adapter(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # a card full of blanks
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # peft keeps the modules in a set, whose order changes from one process to the next.
    # Relative to the adapter's folder, so that a family can be moved.
    config["base_model_name_or_path"] = "../aligned"
    config["target_modules"] = sorted(config["target_modules"])
    write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
