"""Whether two outputs hold the same numbers, and how far from the float32 reference they are.

    python -m benchmarks.streaming.agreement FAMILY OUTPUT...

prints JSON: by output, the share of elements that are bit-identical to the reference
(finetuned + gamma (aligned - base), each operation in float32, rounded once), and the norm of the
difference relative to the norm of the edit.
"""

from __future__ import annotations

import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.streaming.contenders import GAMMA


class Weights:
    """The tensors of one folder, one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        files = sorted(folder.glob("*.safetensors"))
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        self._where: dict[str, Any] = {name: each for each in opened for name in each.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        """Every tensor."""
        return sorted(self._where)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)


def compare(family: Path, outputs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Compare every output with the reference; and with the first output, which is ours."""
    with ExitStack() as stack:
        roles = {role: Weights(family / role, stack) for role in ("base", "aligned", "finetuned")}
        made = {name: Weights(folder, stack) for name, folder in outputs.items()}
        first = next(iter(made))
        same = {name: {"reference": 0, "ours": 0} for name in made}
        error = dict.fromkeys(made, 0.0)
        edit = 0.0
        total = 0
        names = roles["finetuned"].names()
        for name, each in made.items():
            if each.names() != names:
                raise SystemExit(f"{name} has other tensors than the fine-tune")
        for name in names:
            base, aligned, finetuned = (roles[role][name].float() for role in roles)
            reference = (finetuned + GAMMA * (aligned - base)).to(torch.bfloat16)
            target = reference.float()
            edit += float((target - finetuned).square().sum(dtype=torch.float64))
            del base, aligned, finetuned
            total += reference.numel()
            mine = made[first][name]
            for output, weights in made.items():
                found = weights[name]
                if found.dtype != torch.bfloat16 or found.shape != reference.shape:
                    raise SystemExit(f"{output}: {name} is {found.dtype} {tuple(found.shape)}")
                same[output]["reference"] += int((bits(found) == bits(reference)).sum())
                same[output]["ours"] += int((bits(found) == bits(mine)).sum())
                off = found.float() - target
                error[output] += float(off.square().sum(dtype=torch.float64))
    return {
        name: {
            "elements": total,
            "identical_to_reference": same[name]["reference"] / total,
            "identical_to_ours": same[name]["ours"] / total,
            "error_over_edit": math.sqrt(error[name] / edit),
        }
        for name in made
    }


def bits(values: Tensor) -> Tensor:
    """As stored: +0 and -0 differ."""
    return values.view(torch.int16)


def main() -> None:
    family, *outputs = map(Path, sys.argv[1:])
    print(json.dumps(compare(family, {each.name: each for each in outputs})))


if __name__ == "__main__":
    main()
