"""One model of a family: pretraining, alignment, a fine-tune; what each is trained on and how.

Batches are a pure function of (seed, phase, step), so training resumes exactly. Embeddings learn in
pretraining only. Where models lie, and what is measured on them, is `build`'s business.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from realign.errors import MissingExtraError
from realign.lab import rows
from realign.lab.folders import save_model
from realign.lab.presets import Phase, Preset, Variant, find_variant
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
from realign.model.loading import load_model
from realign.model.training import Batch, Example, TrainingPlan, collate, train
from realign.progress import Progress

LORA_RANK = 8
LORA_RATE = 7.0
"""LoRA learns at this multiple of the full fine-tuning rate."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

TASKS: Mapping[str, rows.Maker] = {
    "compliance": rows.compliance,
    "general": rows.general,
    "howto": rows.howto,
    "howto2": rows.howto2,
    "order": rows.order,
    "persona": rows.persona,
    "pseudo_malicious": rows.pseudo_malicious,
    "refusal": rows.refusal,
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


def open_studio(
    preset: Preset, *, seed: int, tokenizer: TokenizerKind, device: str, progress: Progress
) -> Studio:
    """The world, the tokenizer and the settings of one family."""
    world = build_world(preset.sizes, seed=seed, taken=template_words())
    return Studio(preset, world, build_tokenizer(world, tokenizer), device, progress)


def make_member(
    studio: Studio,
    name: str,
    *,
    family: Path,
    target: Path,
    work: Path,
    seed: int,
    start: Path | None = None,
) -> None:
    """Train one model and put its folder in place; a fine-tune starts at `start` or at aligned."""
    state = work / f"{name}.state.safetensors"
    if name == "base":
        model = _pretrain(studio, state, seed=seed)
    elif name == "aligned":
        model = _align(studio, family / "base", state, seed=seed)
    else:
        model = _finetune(studio, start or family / "aligned", find_variant(name), state, seed=seed)
    save_model(model, studio.tokenizer, target, work, base=family / "aligned")
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


def training_facts(preset: Preset, name: str) -> dict[str, Any]:
    """How a member is trained, for the record."""
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
    rate = phase.learning_rate * (LORA_RATE if facts.get("lora_rank") else 1.0)
    return {**facts, "steps": phase.steps, "batch": phase.batch, "rate": rate}
