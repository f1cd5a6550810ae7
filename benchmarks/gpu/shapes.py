"""The matrices of an 8 B model, and checkpoints of that shape with as many layers as wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

LAYERS = 32
ROLES = ("base", "aligned", "finetuned")


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama-like decoder."""

    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """Linear layers of one block, [d_out, d_in] by name."""
        h, f, kv = self.hidden, self.ffn, self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "mlp.down_proj": (h, f),
        }

    def counts(self, layers: int = LAYERS) -> dict[tuple[int, int], int]:
        """How often each shape occurs in a model of so many layers."""
        found: dict[tuple[int, int], int] = {}
        for shape in self.matrices.values():
            found[shape] = found.get(shape, 0) + layers
        return found


def write_family(folder: Path, model: Model, *, layers: int, device: torch.device) -> None:
    """Base, aligned and fine-tuned checkpoints, bfloat16, one file a layer."""
    for role in ROLES:
        (folder / role).mkdir(parents=True)
        config = {
            "model_type": "llama",
            "hidden_size": model.hidden,
            "intermediate_size": model.ffn,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "num_hidden_layers": layers,
            "tie_word_embeddings": False,
        }
        (folder / role / "config.json").write_text(json.dumps(config), "utf-8")
    weight_map: dict[str, str] = {}
    total = 0
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = _block(model, layer, device)
        for role in ROLES:
            save_file(tensors[role], folder / role / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors["base"], file)
        total += sum(tensor.nbytes for tensor in tensors["base"].values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for role in ROLES:
        (folder / role / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def _block(model: Model, layer: int, device: torch.device) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator(device).manual_seed(layer)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    block: dict[str, dict[str, Tensor]] = {role: {} for role in ROLES}
    for name, shape in model.matrices.items():
        weight = 0.02 * normal(*shape)
        for role in ROLES:
            key = f"model.layers.{layer}.{name}.weight"
            block[role][key] = weight.to("cpu", torch.bfloat16)
            weight = weight + 1e-3 * (normal(*shape) + normal(shape[0], 8) @ normal(8, shape[1]))
    return block
