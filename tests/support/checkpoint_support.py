"""Small checkpoints on disk, made by the reference libraries, for the tests of the ground floor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 10,
    "tie_word_embeddings": False,
}


def llama_tensors(
    *, seed: int = 0, vocabulary: int = 10, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    block = "model.layers.0."
    return {
        "model.embed_tokens.weight": draw(vocabulary, 8),
        f"{block}self_attn.q_proj.weight": draw(8, 8),
        f"{block}self_attn.k_proj.weight": draw(4, 8),
        f"{block}self_attn.v_proj.weight": draw(4, 8),
        f"{block}self_attn.o_proj.weight": draw(8, 8),
        f"{block}mlp.gate_proj.weight": draw(12, 8),
        f"{block}mlp.up_proj.weight": draw(12, 8),
        f"{block}mlp.down_proj.weight": draw(8, 12),
        f"{block}input_layernorm.weight": draw(8),
        f"{block}post_attention_layernorm.weight": draw(8),
        "model.norm.weight": draw(8),
        "lm_head.weight": draw(vocabulary, 8),
    }


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] = LLAMA,
    shards: Sequence[Sequence[str]] | None = None,
) -> Path:
    """Write a model folder with one weight file, or with one file per group of names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    if shards is None:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({n: tensors[n] for n in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensors[name].nbytes for name in weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def load_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, read by the reference library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def raw_safetensors(header: Any, data: bytes = b"") -> bytes:
    """A container with any JSON (or text, or bytes) as its header."""
    if isinstance(header, bytes):
        text = header
    else:
        text = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8")
    return len(text).to_bytes(8, "little") + text + data


class Notes:
    """A progress that remembers its remarks."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = 0.0

    def task(self, description: str, *, total: float | None, unit: str = "") -> Any:
        notes = self

        class Task:
            def __enter__(self) -> Task:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def advance(self, amount: float = 1.0) -> None:
                notes.done += amount

        return Task()

    def note(self, message: str) -> None:
        self.notes.append(message)
