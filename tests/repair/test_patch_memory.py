"""Resident memory while a patch is merged: a few blocks, whatever the size of one tensor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

EXPERTS, HEIGHT, WIDTH, VOCABULARY, RANK = 24, 1024, 512, 24_000, 2
STACK = "model.layers.0.mlp.experts.gate_up_proj"
EMBEDDING = "model.embed_tokens.weight"

SCRIPT = """
import re, sys
from pathlib import Path
import realign.repair.engine  # its libraries
from realign.repair.patch_apply import ApplyRequest, apply_patch

def peak():
    # Not getrusage: that inherits the peak of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
folder = Path(sys.argv[1])
for name in ("tiny", "large"):
    before = peak()
    apply_patch(
        ApplyRequest(patch=folder / f"{name}-p", model=folder / name, output=folder / f"{name}-o")
    )
print(peak() - before)
"""


def _write(folder: Path, name: str, *, experts: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(3)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    config = {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": WIDTH,
        "num_local_experts": experts, "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    weights = {EMBEDDING: numbers(vocabulary, WIDTH), STACK: numbers(experts, HEIGHT, WIDTH)}
    weights |= {"lm_head.weight": numbers(8, WIDTH), "model.norm.weight": torch.ones(WIDTH)}
    before = f"base_model.model.{STACK.removesuffix('.gate_up_proj')}"
    embedding = "base_model.model.model.embed_tokens"
    factors = {
        f"{before}.lora_A.weight": numbers(experts * RANK, WIDTH),
        f"{before}.lora_B.weight": numbers(HEIGHT, RANK * experts),
        f"{embedding}.lora_embedding_A": numbers(RANK, vocabulary),
        f"{embedding}.lora_embedding_B": numbers(WIDTH, RANK),
    }
    adapter = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": 2, "target_modules": ["embed_tokens"],
        "target_parameters": ["mlp.experts.gate_up_proj"],
    }  # fmt: skip
    for place, tensors, file, text in (
        (folder / name, weights, "model", ("config.json", config)),
        (folder / f"{name}-p", factors, "adapter_model", ("adapter_config.json", adapter)),
    ):
        place.mkdir()
        save_file(tensors, place / f"{file}.safetensors", metadata={"format": "pt"})
        (place / text[0]).write_text(json.dumps(text[1]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM on this system")
def test_memory_does_not_grow_with_a_stack_of_experts_or_a_vocabulary(tmp_path: Path) -> None:
    _write(tmp_path, "tiny", experts=2, vocabulary=16)
    _write(tmp_path, "large", experts=EXPERTS, vocabulary=VOCABULARY)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "REALIGN_CACHE": str(tmp_path / "cache")},
    )
    size = 4 * WIDTH * min(EXPERTS * HEIGHT, VOCABULARY)
    assert int(done.stdout) < 0.5 * size, f"{int(done.stdout) / 2**20:.0f} MiB"
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("large", "large-o")
    )
    factors = load_file(tmp_path / "large-p" / "adapter_model.safetensors")
    a = next(v for k, v in factors.items() if "experts.lora_A" in k).view(EXPERTS, RANK, WIDTH)
    b = next(v for k, v in factors.items() if "experts.lora_B" in k).view(HEIGHT, RANK, EXPERTS)
    for e in (0, EXPERTS - 1):
        expected = before[STACK][e].double() + b[:, :, e].double() @ a[e].double()
        assert torch.allclose(after[STACK][e].double(), expected, atol=1e-6)
    a, b = (v for _, v in sorted((k, v) for k, v in factors.items() if "embedding" in k))
    expected = before[EMBEDDING].double() + (b.double() @ a.double()).T
    assert torch.allclose(after[EMBEDDING].double(), expected, atol=1e-6)
