"""The same tiny families in several on-disk layouts: fused and split, stacked and one by one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from support.repair_support import Trio, drift, read_folder
from torch import Tensor

Respell = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

CONFIGS: Mapping[str, Callable[[], transformers.PretrainedConfig]] = {
    "phi3": lambda: transformers.Phi3Config(**SMALL, intermediate_size=48),
    "mixtral": lambda: transformers.MixtralConfig(
        **SMALL, intermediate_size=20, num_local_experts=3, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, **ROUTED, intermediate_size=48, shared_expert_intermediate_size=24
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, **ROUTED, intermediate_size=48),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **SMALL, intermediate_size=20, num_local_experts=3, num_experts_per_tok=2
    ),
}


def make_family(folder: Path, arch: str, *, dtype: torch.dtype = torch.float32) -> Trio:
    """A family as transformers saves it, which is the layout of the Hub."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[arch]())
    base = {name: value.detach().clone() for name, value in model.state_dict().items()}
    aligned = drift(base, seed=11, size=0.02)
    states = {"base": base, "aligned": aligned, "finetuned": drift(aligned, seed=17, size=0.02)}
    for role, state in states.items():
        model.load_state_dict(state)
        model.to(dtype).save_pretrained(folder / role)
        model.to(torch.float32)
    return Trio(folder / "base", folder / "aligned", folder / "unaligned", folder / "finetuned")


def respelled(trio: Trio, folder: Path, respell: Respell) -> Trio:
    """The same family with other tensors on disk, and the same config."""
    found: dict[str, Path] = {}
    for role in ("base", "aligned", "finetuned"):
        source: Path = getattr(trio, role)
        found[role] = folder / role
        found[role].mkdir(parents=True)
        shutil.copy(source / "config.json", found[role])
        tensors = {n: t.contiguous() for n, t in respell(read_folder(source)).items()}
        save_file(tensors, found[role] / "model.safetensors", metadata={"format": "pt"})
    return replace(trio, **found)


LLAMA_AS_PHI3: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fuse_llama(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Llama as Phi-3 stores it."""
    found: dict[str, Tensor] = {}
    whole = {part: (name, parts) for name, parts in LLAMA_AS_PHI3.items() for part in parts}
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        target, parts = whole.get(module, ("", ()))
        if not parts:
            found[name] = tensor
        elif module == parts[0]:
            rows = [tensors[name.replace(module, part)] for part in parts]
            found[name.replace(module, target)] = torch.cat(rows).contiguous()
    return found


def split_llama(fused: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `fuse_llama` made, taken apart again into the shapes of `like`."""
    found: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        module = name.split(".")[-2]
        names = [name.replace(module, part) for part in LLAMA_AS_PHI3.get(module, (module,))]
        rows = [like[each].shape[0] for each in names]
        found.update(zip(names, tensor.split(rows), strict=True))
    return found


def copied(source: Path, target: Path, **files: Mapping[str, Tensor]) -> Path:
    """A model with other weight files."""
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    for name, tensors in files.items():
        save_file(dict(tensors), target / f"{name}.safetensors", {"format": "pt"})
    return target


def as_phi3(source: Path, target: Path) -> Path:
    """A Llama without biases as the Phi-3 that computes the same."""
    copied(source, target, model=fuse_llama(read_folder(source)))
    config = json.loads((target / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"model_type": "phi3"}), "utf-8")
    return target


def in_shards(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> Path:
    """The model with these tensors in three files and an index."""
    names = sorted(tensors)
    files = {f"model-0000{i + 1}-of-00003": {n: tensors[n] for n in names[i::3]} for i in range(3)}
    copied(source, target, **files)
    index = {name: f"{file}.safetensors" for file, held in files.items() for name in held}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (target / "model.safetensors.index.json").write_text(text, "utf-8")
    return target


def split_phi3(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor per projection (4 query heads and 2 key heads of width 8)."""
    blocks = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    sizes = {"qkv_proj": [32, 16, 16], "gate_up_proj": [48, 48]}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = name.split(".")[-2]
        if module not in blocks:
            found[name] = tensor
            continue
        for part, rows in zip(blocks[module], tensor.split(sizes[module]), strict=True):
            found[name.replace(module, part)] = rows
    return found


def stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As transformers 5 holds experts in memory: one tensor for all of them, gate over up."""
    one = re.compile(r"^(.*)\.experts\.(\d+)\.(\w+)\.weight$")
    parts = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = one.match(name)
        if match is None:
            found[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
            continue
        block, expert, module = match.groups()
        block = block.replace(".block_sparse_moe", ".mlp")
        of_block = experts.setdefault(block, {})
        of_block.setdefault(parts.get(module, module), {})[int(expert)] = tensor
    for block, modules in experts.items():
        stacks = {m: torch.stack([es[e] for e in sorted(es)]) for m, es in modules.items()}
        gate_up = torch.cat([stacks["gate_proj"], stacks["up_proj"]], dim=1)
        found[f"{block}.experts.gate_up_proj"] = gate_up
        found[f"{block}.experts.down_proj"] = stacks["down_proj"]
    return found


def stack_experts_transposed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacks of [experts, d_in, d_out], as some checkpoints of the Qwen family are stored."""
    found = stack_experts(tensors)
    return {n: t.transpose(1, 2) if t.dim() == 3 else t for n, t in found.items()}


def granite_in_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Granite's expert stacks by the names that transformers 5 gives them in memory."""
    names = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }

    def other(name: str) -> str:
        for old, new in names.items():
            name = name.replace(f"block_sparse_moe.{old}", f"block_sparse_moe.{new}")
        return name

    return {other(name): tensor for name, tensor in tensors.items()}


def under(prefix: str) -> Respell:
    """Names as a wrapper of the model writes them, or without "model." where there is none."""

    def respell(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if prefix:
            return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}

    return respell


def nested(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of a language model inside transformers' vision-language classes."""
    return {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in tensors.items()
    }
