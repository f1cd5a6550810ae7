"""Activation sums taken apart from the product: plain hooks, one sequence at a time, no padding.

What lssf measured in batches, with padding on the left, must be what a model that reads every
conversation alone shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from architectures.trio import Trio, auto_class
from torch import Tensor
from transformers import AutoTokenizer

from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.slots import slots_of
from realign.model.modules import ModuleFinder
from realign.model.moments_file import StoredMoments


def compare_moments(
    trio: Trio, model_type: str, cache: Path, moments: StoredMoments
) -> tuple[float, int]:
    """The largest relative difference of sum v v^T, and how many matrices were compared."""
    model: Any = auto_class(model_type).from_pretrained(trio.aligned, dtype="auto").eval()
    finder = ModuleFinder(model)
    modules = dict(model.named_modules())
    with open_checkpoint(trio.aligned, offline=True) as opened:
        slots = {s.key: s for name in opened.tensors for s in slots_of(opened, name)}
    wanted: dict[str, list[str]] = {}
    for key in moments:
        home = finder.find(slots[key].tensor.removesuffix(".weight"))
        # Experts have a reference of their own (tests/model).
        if home is not None and home.parameter == "weight":
            wanted.setdefault(home.path, []).append(key)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in wanted}
    keep: list[bool] = []

    def watch(path: str) -> Any:
        def see(module: Any, args: Any, output: Any) -> None:
            if not args or not isinstance(output, Tensor):
                return
            x, y = args[0].flatten(0, -2), output.flatten(0, -2)
            if len(x) == len(keep):
                mask = torch.tensor(keep)
                bias = getattr(module, "bias", None)
                z = y.double() - (0 if bias is None else bias.double())
                seen[path].append((x[mask].double(), z[mask]))

        return see

    handles = [modules[path].register_forward_hook(watch(path)) for path in wanted]
    text: Any = AutoTokenizer.from_pretrained(trio.aligned)
    (replies,) = cache.glob("anchors-*.json")
    with torch.no_grad():
        for reply in json.loads(replies.read_text("utf-8")):
            if not reply["refused"] or not reply["token_ids"]:
                continue
            rendered = f"user: {reply['prompt']}<|end|>assistant:"
            prompt = text(rendered, add_special_tokens=False)["input_ids"]
            keep[:] = [True] * (len(prompt) + len(reply["token_ids"]))
            model.base_model(
                input_ids=torch.tensor([prompt + list(reply["token_ids"])]), use_cache=False
            )
    for handle in handles:
        handle.remove()
    worst, compared = 0.0, 0
    for path, keys in wanted.items():
        if not seen[path]:
            continue
        for key in keys:
            known = moments[key]
            vectors = torch.cat([pair[known.kind == "output"] for pair in seen[path]])
            if known.kind == "output" and slots[key].rows is not None:
                vectors = vectors[:, slice(*slots[key].rows)]
            if len(vectors) != known.n:
                return float("inf"), compared
            s2 = vectors.T @ vectors
            worst = max(worst, float((known.s2 - s2).norm() / s2.norm().clamp_min(1e-300)))
            compared += 1
    return worst, compared
