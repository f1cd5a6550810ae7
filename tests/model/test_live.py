"""A stored tensor is found in memory, number by number, whatever the class has made of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from realign.checkpoint.reader import open_checkpoint
from realign.model.live import LiveTensors

SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2))


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**SIZES))


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=3))


@pytest.mark.parametrize("make", [gpt2, phi3, mixtral])
def test_every_stored_tensor_is_a_view(make: type, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    model = type(make()).from_pretrained(tmp_path)
    live = LiveTensors(model)
    with open_checkpoint(tmp_path) as checkpoint:
        for name, info in checkpoint.tensors.items():
            view = live.find(name, info.shape)
            assert view is not None, name
            assert torch.equal(view, checkpoint.read(name)), name
            view += 1.0  # it is the weight itself, not a copy
            again = live.find(name, info.shape)
            assert again is not None and torch.equal(again, view)
            assert again.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()


def test_what_the_model_lacks_is_none(tmp_path: Path) -> None:
    live = LiveTensors(phi3())
    assert live.find("model.layers.9.mlp.down_proj.weight", (16, 24)) is None
    assert live.find("model.layers.0.mlp.down_proj.weight", (24, 16)) is None
