"""Resident memory of preparations on a model of 63 M entries, beside what the plan predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_support import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = """
import json, re, sys
from pathlib import Path
from realign.repair.engine import prepare_statistics
from realign.repair.plan import plan_repair
from realign.repair.request import RepairRequest, open_inputs

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
texts = dict.fromkeys(("safe_data", "harmful_data", "keep_data", "task_data"), folder / "texts")
request = RepairRequest(
    finetuned=folder / "finetuned", aligned=folder / "aligned", base=folder / "base", device="cpu",
    cache_dir=Path(sys.argv[3]), **texts, **options)
with open_inputs(request) as inputs:
    plan = plan_repair(request, inputs)
    prepare_statistics(request, plan, inputs)
# Not getrusage: that inherits the peak of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"measured": peak, "predicted": plan.estimate.peak_memory}))
"""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=512,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    assert sum(each.numel() for each in model.parameters()) > 62 * 10**6
    for role in ("base", "aligned", "finetuned"):
        model.save_pretrained(folder / role)
        word_tokenizer().save_pretrained(folder / role)
        with torch.no_grad():
            for each in model.parameters():
                each += 0.01 * torch.randn_like(each)
    words = [[f"w{(number * by + at) % 30}" for at in range(12)] for number in range(24)
             for by in (1, 2)]  # fmt: skip
    rows = [
        {"prompt": " ".join(prompt), "response": " ".join(reply)}
        for prompt, reply in zip(words[::2], words[1::2], strict=True)
    ]
    (folder / "texts").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no VmHWM on this system")
@pytest.mark.parametrize(
    ("method", "settings", "offload"),
    [
        ("irr", {"keep_fraction": 0.5}, False),
        ("irr", {"keep_fraction": 0.5}, True),
        ("safe_patching", {"steps": 2}, False),
        ("somf", {"loss": "refusal", "epochs": 1}, False),
    ],
)
def test_the_plan_predicts_what_a_preparation_holds(
    family: Path, tmp_path: Path, method: str, settings: dict[str, Any], offload: bool
) -> None:
    options = {"method": method, "settings": settings, "offload": offload}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(family), json.dumps(options), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    ratio = found["predicted"] / found["measured"]
    said = {name: f"{value / 2**20:.0f} MiB" for name, value in found.items()}
    assert 0.75 < ratio < 1.25, said
