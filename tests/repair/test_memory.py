"""Resident memory while repairing: a small multiple of one matrix, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

LAYERS, WIDTH, ROWS, VOCABULARY = 12, 1024, 512, 64_000

SCRIPT = """
import json, re, sys
from pathlib import Path
from realign.repair.engine import repair
from realign.repair.plan import plan
from realign.repair.request import RepairRequest

roles = dict(finetuned=sys.argv[1] + "/finetuned", aligned=sys.argv[1] + "/aligned",
             base=sys.argv[1] + "/base", device="cpu")
def peak():
    # Not getrusage: that inherits the peak of the process that started this one.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
import torch
from realign.subspace.spectrum import decompose
decompose(torch.eye(8)).left(2)
before = peak()
request = RepairRequest(method=sys.argv[2], output=sys.argv[1] + "/" + sys.argv[2], **roles)
estimate = plan(request).estimate.peak_memory
repair(request)
print(json.dumps({"before": before, "after": peak(), "estimate": estimate}))
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    generator = torch.Generator().manual_seed(1)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH}
    tensors = {"model.embed_tokens.weight": torch.zeros(VOCABULARY, WIDTH, dtype=torch.bfloat16)}
    for layer in range(LAYERS):
        for name in ("up_proj", "gate_proj"):
            weight = torch.randn(ROWS, WIDTH, generator=generator)
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = weight.to(torch.bfloat16)
    for role in ("base", "aligned", "finetuned"):
        (folder / role).mkdir()
        moved = {name: tensor + 0.1 * len(role) for name, tensor in tensors.items()}
        moved = {name: tensor.to(torch.bfloat16) for name, tensor in moved.items()}
        save_file(moved, folder / role / "model.safetensors", metadata={"format": "pt"})
        (folder / role / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM on this system")
@pytest.mark.parametrize("method", ["wise_ft", "replace"])
def test_memory_is_bounded_by_chunks_and_one_matrix(family: Path, method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(family), method],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    model = (family / "base" / "model.safetensors").stat().st_size
    assert model > 145 * 2**20
    grown = found["after"] - found["before"]
    assert grown < 130 * 2**20, f"{grown / 2**20:.0f} MiB for a model of {model / 2**20:.0f} MiB"
    assert found["after"] < 400 * 2**20
    assert 0.75 * found["after"] < found["estimate"] < 1.25 * found["after"]
