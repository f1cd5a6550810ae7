"""Memory of a calibration: a 1 B-shaped model in bfloat16, held in memory and read block by block.

    python -m benchmarks.calibration -o docs/data/bench-calibration.json

Weights are noise, so the anchors bring their refusals along. Each run is a process of its own that
collects what lssf asks for; its highest resident memory is compared with what the plan predicts and
with two bounds: the model + 2 GB in memory, three decoder layers + 2 GB with --offload.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.streaming.family import SHAPES, Shape, tensors

ALLOWANCE = 2 * 10**9
WORDS = tuple(f"w{i}" for i in range(56))
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}</s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build(folder: Path, shape: Shape, *, anchors: int, length: int) -> None:
    """Write base, aligned and fine-tuned models that differ in one file, and anchors."""
    roles = ("aligned", "base", "finetuned")
    for role in roles:
        (folder / role).mkdir(parents=True)
        _sidecars(folder / role, shape)
    noise = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in tensors(shape):
        found = re.search(r"layers\.(\d+)\.", name)
        groups.setdefault(f"layer-{found[1]}" if found else name, {})[name] = size
    index: dict[str, str] = {}
    for number, (group, sizes) in enumerate(groups.items()):
        file = f"model-{number:05d}.safetensors"
        for at, role in enumerate(roles):
            if at and group != "layer-0":
                os.link(folder / "aligned" / file, folder / role / file)
                continue
            made = {name: _tensor(noise, size, 7 * at + number) for name, size in sizes.items()}
            save_file(made, folder / role / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(sizes, file))
    for role in roles:
        (folder / role / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": shape.nbytes}, "weight_map": index})
        )
    draw = torch.Generator().manual_seed(1)

    def text() -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=draw))

    rows = [{"id": f"a{i}", "prompt": text(), "response": text()} for i in range(anchors)]
    (folder / "anchors.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _tensor(noise: torch.Tensor, size: tuple[int, ...], step: int) -> torch.Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    count = size[0] * size[1]
    rolled = torch.roll(noise, 4099 * step)
    return rolled.repeat(-(-count // len(rolled)))[:count].view(size).contiguous()


def _sidecars(folder: Path, shape: Shape) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    specials = ("<unk>", "<s>", "</s>", "<user>", "<assistant>")
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: i for i, token in enumerate((*specials, *WORDS))},
            "unk_token": "<unk>",
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    for name, content in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
    ):
        (folder / name).write_text(json.dumps(content))


def calibrate(folder: Path, *, offload: bool) -> dict[str, Any]:
    """Collect the moments of one model in this process, and say what it held."""
    from realign.repair.plan import plan_repair
    from realign.repair.request import RepairRequest, open_inputs
    from realign.repair.workbench import ModelWorkbench

    request = RepairRequest(
        finetuned=folder / "finetuned",
        aligned=folder / "aligned",
        base=folder / "base",
        method="lssf",
        anchors=folder / "anchors.jsonl",
        device="cpu",
        offload=offload,
        cache_dir=folder / f"cache-{offload}",
    )
    with open_inputs(request) as inputs:
        plan = plan_repair(request, inputs)
        start = time.perf_counter()
        bench = ModelWorkbench(request, plan, inputs)
        found = bench.moments(role="aligned", standardize="neuron", tokens="response")
        seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = re.search(r"VmHWM:\s+(\d+)", status)
    assert peak is not None
    return {
        "measured": int(peak[1]) * 1024,
        "predicted": plan.estimate.peak_memory,
        "seconds": round(seconds, 1),
        "matrices": len(found.by_key),
        "tokens": next(iter(found.by_key.values())).n,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, run both ways, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument("--anchors", type=int, default=16)
    parser.add_argument("--length", type=int, default=12, help="words of prompts and answers")
    parser.add_argument("--folder", type=Path, help="where the models stand for the run")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--child", choices=("memory", "offload"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(calibrate(options.folder, offload=options.child == "offload")))
        return 0
    shape = SHAPES[options.shape]
    layer = 2 * sum(
        size[0] * (size[1] if len(size) > 1 else 1)
        for name, size in tensors(shape)
        if ".layers.0." in name
    )
    bounds = {"memory": shape.nbytes + ALLOWANCE, "offload": 3 * layer + ALLOWANCE}
    record: dict[str, Any] = {
        "shape": options.shape,
        "model": shape.nbytes,
        "layer": layer,
        "anchors": options.anchors,
        "runs": {},
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        build(Path(name), shape, anchors=options.anchors, length=options.length)
        for way in ("offload", "memory"):
            command = [sys.executable, "-m", "benchmarks.calibration", "--child", way]
            done = subprocess.run(
                [*command, "--folder", name], check=True, stdout=subprocess.PIPE, text=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            record["runs"][way] = {**found, "bound": bounds[way]}
            print(f"{way}: {json.dumps(record['runs'][way])}", file=sys.stderr)
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    return int(any(run["measured"] > run["bound"] for run in record["runs"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
