"""Adapters made, run and merged by the real peft, for tests of reading and writing them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor


def train_like(model: Any, *, seed: int = 3, size: float = 0.3) -> None:
    """Give every trainable parameter some other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * size
                parameter.add_(noise.to(parameter.dtype))


def load(folder: Path, **options: Any) -> Any:
    """A model as a user loads it, ready to run."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tune(base: Path, out: Path, *, size: float = 0.1, **config: Any) -> Path:
    """A fine-tune of `base` as a LoRA adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft has much to say about tied embeddings
        wrapped = peft.get_peft_model(load(base), peft.LoraConfig(task_type="CAUSAL_LM", **config))
        train_like(wrapped, size=size)
        wrapped.save_pretrained(str(out))
    return out


def with_adapter(base: Path, adapter: Path, **options: Any) -> Any:
    """The running model with the adapter on it, unmerged; every key must be taken up."""
    model = load(base, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
    # peft looks for pattern keys among modules only, and then uses them for parameters, too.
    said = [str(w.message) for w in caught if "_pattern keys" not in str(w.message)]
    missing = [message for message in said if "key" in message.lower()]
    assert not missing, missing
    return wrapped.eval()


def logits(model: Any, *, vocabulary: int = 64) -> Tensor:
    """Logits of a fixed sequence."""
    tokens = torch.arange(12) * 7 % vocabulary
    with torch.no_grad():
        return model(tokens[None]).logits
