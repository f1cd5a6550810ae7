"""Routed experts: every expert sees its own tokens, told from what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.model_support import loaded
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from realign.model.moments import MomentRequest, TokenSequence, collect_moments

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "head_dim": 12,
}


def sequences() -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(3)
    made: list[TokenSequence] = []
    for length in (5, 9, 14):
        ids = tuple(torch.randint(3, 48, (length,), generator=generator).tolist())
        made.append(TokenSequence(ids, tuple(index >= 2 for index in range(length))))
    return made


def routed(model: Any, block: str, router: str) -> list[tuple[Tensor, Tensor]]:
    """(input of the sparse block, chosen experts) at kept positions, one sequence at a time."""
    seen: list[tuple[Tensor, Tensor]] = []
    keep: list[bool] = []
    modules = dict(model.named_modules())

    def see(module: Any, args: Any, kwargs: Any) -> None:
        x = (args[0] if args else kwargs["hidden_states"]).reshape(-1, 24)
        chosen = modules[router](x)[-1]
        mask = torch.tensor(keep)
        seen.append((x[mask].double(), chosen.reshape(len(x), -1)[mask]))

    handle = modules[block].register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        for sequence in sequences():
            keep[:] = sequence.keep
            model(input_ids=torch.tensor([sequence.ids]))
    handle.remove()
    return seen


def assert_moments(found: Any, v: Tensor) -> None:
    assert found.n == len(v) > 0
    torch.testing.assert_close(found.s1, v.sum(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.s2, v.T @ v, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("mixtral")
    config = MixtralConfig(**SIZES, num_experts_per_tok=2)
    MixtralForCausalLM(config).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["input", "output"])
def test_single_experts_on_disk_are_measured_where_memory_stacks_them(
    mixtral: tuple[Any, dict[str, Tensor]], kind: Any
) -> None:
    model, disk = mixtral
    stem = "model.layers.1.block_sparse_moe.experts"
    names = [f"{stem}.{e}.{part}" for e in range(3) for part in ("w1", "w2", "w3")]
    requests = {name: MomentRequest(kind, name) for name in names}
    found = collect_moments(loaded(model), sequences(), requests=requests)
    assert not found.missing
    seen = routed(model, "model.layers.1.mlp", "model.layers.1.mlp.gate")
    for expert in range(3):
        x = torch.cat([x[(chosen == expert).any(1)] for x, chosen in seen])
        w1, w2, w3 = (
            disk[f"{stem}.{expert}.{part}.weight"].double() for part in ("w1", "w2", "w3")
        )
        inner = silu(linear(x, w1)) * linear(x, w3)
        for part, v, weight in (("w1", x, w1), ("w3", x, w3), ("w2", inner, w2)):
            assert_moments(
                found[f"{stem}.{expert}.{part}"], v if kind == "input" else linear(v, weight)
            )
        if kind == "input":
            assert found[f"{stem}.{expert}.w1"] is found[f"{stem}.{expert}.w3"]


def test_transposed_stacks_with_biases_are_measured() -> None:
    torch.manual_seed(1)
    model = GptOssForCausalLM(GptOssConfig(**SIZES, num_experts_per_tok=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stem = "model.layers.0.mlp.experts"
    requests = {
        f"{part}{e}": MomentRequest("output", f"{stem}.{part}_proj", transposed=True, expert=e)
        for part in ("gate_up", "down")
        for e in range(3)
    }
    found = collect_moments(loaded(model), sequences(), requests=requests)
    assert not found.missing
    seen = routed(model, "model.layers.0.mlp", "model.layers.0.mlp.router")
    stack: Any = model.model.layers[0].mlp.experts
    for expert in range(3):
        x = torch.cat([x[(chosen == expert).any(1)] for x, chosen in seen])
        if not len(x):
            assert found[f"gate_up{expert}"].n == 0
            continue
        z = x @ stack.gate_up_proj[expert].double()
        both = z + stack.gate_up_proj_bias[expert].double()
        gate, up = (
            both[:, ::2].clamp(max=stack.limit),
            both[:, 1::2].clamp(-stack.limit, stack.limit),
        )
        inner = (up + 1) * gate * torch.sigmoid(gate * stack.alpha)
        assert_moments(found[f"gate_up{expert}"], z)
        assert_moments(found[f"down{expert}"], inner @ stack.down_proj[expert].double())


def test_experts_without_routing_are_said() -> None:
    torch.manual_seed(2)
    config = Llama4TextConfig(
        **SIZES, intermediate_size_mlp=16, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    model = Llama4ForCausalLM(config).eval()
    name = "model.layers.0.feed_forward.experts.gate_up_proj"
    found = collect_moments(
        loaded(model), sequences(), requests={"e": MomentRequest("input", name, expert=0)}
    )
    assert "experts" in found.missing["e"]
