"""Resident memory while repairing: a small multiple of one matrix, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from realign.repair.flow import admission_cost
from realign.repair.plan import plan_repair
from realign.repair.request import RepairRequest, open_inputs
from realign.repair.stream import cut_tensor

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


def _family(folder: Path, *, layers: int, vocabulary: int) -> Path:
    generator = torch.Generator().manual_seed(1)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH}
    tensors = {"model.embed_tokens.weight": torch.zeros(vocabulary, WIDTH, dtype=torch.bfloat16)}
    for layer in range(layers):
        for name in ("up_proj", "gate_proj"):
            weight = torch.randn(ROWS, WIDTH, generator=generator)
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = weight.to(torch.bfloat16)
    for role in ("base", "aligned", "finetuned"):
        (folder / role).mkdir(parents=True)
        moved = {name: tensor + 0.1 * len(role) for name, tensor in tensors.items()}
        moved = {name: tensor.to(torch.bfloat16) for name, tensor in moved.items()}
        save_file(moved, folder / role / "model.safetensors", metadata={"format": "pt"})
        (folder / role / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _family(tmp_path_factory.mktemp("large"), layers=LAYERS, vocabulary=VOCABULARY)


def _measure(folder: Path, method: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), method],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM on this system")
@pytest.mark.parametrize("method", ["wise_ft", "replace"])
def test_memory_is_bounded_by_chunks_and_one_matrix(family: Path, method: str) -> None:
    found = _measure(family, method)
    model = (family / "base" / "model.safetensors").stat().st_size
    assert model > 145 * 2**20
    grown = found["after"] - found["before"]
    assert grown < 130 * 2**20, f"{grown / 2**20:.0f} MiB for a model of {model / 2**20:.0f} MiB"
    assert found["after"] < 400 * 2**20
    assert 0.75 * found["after"] < found["estimate"] < 1.25 * found["after"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM on this system")
@pytest.mark.parametrize("method", ["resta", "replace"])
def test_memory_is_flat_in_the_number_of_layers(tmp_path: Path, method: str) -> None:
    peaks = [
        _measure(_family(tmp_path / str(layers), layers=layers, vocabulary=1000), method)["after"]
        for layers in (4, 32)
    ]
    more = 28 * 2 * ROWS * WIDTH * 2  # bytes by which each checkpoint is larger
    assert peaks[1] - peaks[0] < 0.5 * more, peaks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM on this system")
def test_large_experts_of_a_stack_do_not_count(tmp_path: Path) -> None:
    """Three experts of 48 MiB each: what Llama 4 has of 160 MiB."""
    config = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for place, role in enumerate(("base", "aligned", "finetuned")):
        (tmp_path / role).mkdir()
        stack = torch.full((3, 6144, 4096), 0.5 + place, dtype=torch.bfloat16)
        save_file({name: stack}, tmp_path / role / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / role / "config.json").write_text(json.dumps(config))
        del stack
    found = _measure(tmp_path, "wise_ft")
    grown = found["after"] - found["before"]
    assert grown < 90 * 2**20, f"{grown / 2**20:.0f} MiB"


def test_copies_do_not_pile_up_behind_a_matrix(family: Path) -> None:
    request = RepairRequest(
        finetuned=family / "finetuned",
        aligned=family / "aligned",
        base=family / "base",
        method="delta_svd",
    )
    with open_inputs(request) as inputs:
        plan = plan_repair(request, inputs)
        cuts = [cut for pair in plan.matching.pairs for cut in cut_tensor(pair, plan, inputs)]
    matrix = max(cut.cost for cut in cuts if cut.slots)
    copies = [cut for cut in cuts if not cut.edit]
    budget = 64 * matrix  # as if many were under way; a copy is small beside that
    assert sum(cut.cost for cut in copies[:40]) < budget, "all of them would fit"
    counted = [admission_cost(cut, budget) for cut in copies]
    assert all(budget // 17 < cost <= budget // 16 for cost in counted)
    assert all(admission_cost(cut, budget) == cut.cost for cut in cuts if cut.slots)
