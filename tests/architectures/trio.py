"""A base, its aligned model and a fine-tune of any architecture, saved the way a user would.

Random weights: nothing here has learned anything. The tokenizer makes a random model refuse: its
decoder puts a refusal before whatever the model says, so the anchors' answers count, and `lssf`
runs on the very path that a trained model takes.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures.tiny import VOCABULARY, special, tiny_config
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SPECIAL = ("<|pad|>", "<|bos|>", "<|end|>", "<|unk|>")
LETTERS = (*string.ascii_lowercase, " ", ".", "?", ":")
# The turn ends in plain letters: a random model with tied embeddings repeats the last token, and
# special ones are not decoded.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ANCHORS, REPLY = 24, 12
"""Prompts, and most tokens of an answer: LSSF wants 256 tokens to see a subspace."""
ASKED = ("how is {} made?", "tell me how to make {}.", "make {}.")
DRIFT = 0.02
SHARD = "120KB"


@dataclass(frozen=True)
class Trio:
    """Three checkpoints of one architecture and the prompts they are measured on."""

    base: Path
    aligned: Path
    finetuned: Path
    anchors: Path
    dtype: torch.dtype
    sharded: bool
    class_name: str


def auto_class(model_type: str) -> Any:
    """The class that a user loads this architecture with: an Auto class wherever one works."""
    if special(model_type).part:
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if causal else AutoModelForImageTextToText


def build_model(model_type: str, *, seed: int = 7) -> PreTrainedModel:
    """A tiny random model in float32, in evaluation mode."""
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    own = special(model_type)
    if own.part:
        model: PreTrainedModel = auto_class(model_type)(getattr(config, own.part))
    else:
        model = auto_class(model_type).from_config(config)
    if own.prepare is not None:
        own.prepare(model)
    return model.eval()


def make_trio(folder: Path, model_type: str, *, number: int) -> Trio:
    """Save the three checkpoints; dtype and sharding rotate with `number`."""
    dtype = torch.bfloat16 if number % 3 == 2 else torch.float32
    sharded = number % 4 == 1
    own = special(model_type)
    dtype = own.dtype or dtype
    model = build_model(model_type, seed=_speaking_seed(model_type))
    model.to(dtype)
    if model.generation_config is not None:
        model.generation_config = type(model.generation_config)()
    names = ("base", "aligned", "finetuned")
    for index, name in enumerate(names):
        if index:
            drift(model, seed=10 + index)
        model.save_pretrained(folder / name, max_shard_size=SHARD if sharded else "5GB")
        tokenizer().save_pretrained(folder / name)
    anchors = folder / "anchors.jsonl"
    write_anchors(anchors)
    return Trio(
        folder / "base",
        folder / "aligned",
        folder / "finetuned",
        anchors,
        dtype,
        sharded,
        type(model).__name__,
    )


def _speaking_seed(model_type: str) -> int:
    """A seed whose aligned model begins with a refusal's token, not a special one or a letter."""
    text = tokenizer()
    prompts = [
        text(f"user: {asked.format('abc')}<|end|>assistant:", add_special_tokens=False)["input_ids"]
        for asked in ASKED
    ]
    spoken = 0
    for seed in range(7, 15):
        model = build_model(model_type, seed=seed)
        drift(model, seed=11)
        try:
            with torch.no_grad():
                said = [
                    int(
                        model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
                    )
                    for ids in prompts
                ]
        except Exception:  # it will be reported where it matters
            return seed
        spoken = spoken or (seed if min(said) >= len(SPECIAL) else 0)
        if min(said) >= len(SPECIAL) + len(LETTERS):
            return seed
    return spoken or 7


def drift(model: PreTrainedModel, *, seed: int) -> None:
    """Move every parameter: noise, and for matrices a part of rank 2 beside it."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.data_ptr() in seen or not parameter.is_floating_point():
                continue
            seen.add(parameter.data_ptr())
            shape = tuple(parameter.shape)
            move = DRIFT * 0.1 * normal(*shape)
            if len(shape) >= 2 and min(shape[-2:]) > 2:
                *stack, rows, columns = shape
                move += DRIFT * normal(*stack, rows, 2) @ normal(*stack, 2, columns)
            parameter.add_(move.to(parameter.dtype))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; whatever is decoded begins with a refusal."""
    words = [*SPECIAL, *LETTERS]
    # For some architectures the library replaces the decoder by a byte-level one, come what may:
    # there the other tokens themselves are refusals.
    words += [f"\u0120i'm\u0120sorry\u0120{index}" for index in range(len(words), VOCABULARY)]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<|unk|>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(Regex("^"), "I cannot help with that. ")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    made.chat_template = TEMPLATE
    return made


def write_anchors(path: Path) -> None:
    """Prompts of different lengths, so that batches need padding."""
    header: Mapping[str, Any] = {
        "schema": "realign/suite/1",
        "name": "sweep-anchors",
        "kind": "anchors",
        "license": "Apache-2.0",
        "language": "en",
        "max_new_tokens": REPLY,
    }
    lines = [header]
    for index in range(ANCHORS):
        word = "".join(string.ascii_lowercase[(index * 7 + 3 * k) % 26] for k in range(3))
        lines.append({"id": f"a{index}", "prompt": ASKED[index % 3].format(word)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
