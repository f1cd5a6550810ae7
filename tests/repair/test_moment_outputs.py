"""What the methods that weigh entries by activations write, against their own edits in float64.

Their edits are held to definitions elsewhere; here it is the files: real statistics of a real small
family, three types of weights, one tolerance.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.repair_support import assert_output, read_folder

from realign.checkpoint.slots import logical_matrix
from realign.repair.edit import Dense, Layer, LowRank, Unchanged
from realign.repair.engine import prepare_statistics, repair
from realign.repair.layers import read_layers
from realign.repair.plan import plan_repair
from realign.repair.preparation import Statistics
from realign.repair.request import RepairRequest, open_inputs

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "tiny"

METHODS: Mapping[str, Mapping[str, Any]] = {
    "safe_delta": {"s": 0.3, "budget": "relative"},
    "irr": {"targets": "all", "safety_vector": "base"},
    "antidote": {"alpha": 0.2, "prune_to": "aligned", "space": "merged"},
    "nlsr": {"reference": "aligned", "space": "merged", "fraction": 0.6},
}
TYPES = [
    ("safe_delta", torch.bfloat16),
    ("irr", torch.bfloat16),
    ("antidote", torch.bfloat16),
    ("nlsr", torch.bfloat16),
    ("safe_delta", torch.float16),
    ("irr", torch.float32),
]
Family = Callable[[torch.dtype], dict[str, Path]]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """The tiny family in another type, made once."""
    made: dict[torch.dtype, dict[str, Path]] = {}

    def cast(dtype: torch.dtype) -> dict[str, Path]:
        if dtype not in made:
            folder, found = tmp_path_factory.mktemp("cast"), dict[str, Path]()
            for role, name in (
                ("finetuned", "howto2_p5"),
                ("aligned", "aligned"),
                ("base", "base"),
            ):
                found[role] = folder / role
                shutil.copytree(FIXTURES / name, found[role])
                tensors = {n: t.to(dtype) for n, t in read_folder(FIXTURES / name).items()}
                save_file(tensors, found[role] / "model.safetensors", metadata={"format": "pt"})
            made[dtype] = found
        return made[dtype]

    return cast


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows of every kind."""
    folder = tmp_path_factory.mktemp("texts")

    def write(name: str, suite: str, reply: str | None) -> Path:
        lines = (FIXTURES / "suites" / f"{suite}.jsonl").read_text("utf-8").splitlines()[1:25]
        rows = [json.loads(line) for line in lines]
        path = folder / f"{name}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for row in rows:
                answer = row["answer"] if reply is None else reply
                file.write(json.dumps({"prompt": row["prompt"], "response": answer}) + "\n")
        return path

    return {
        "safe_data": write("safe", "anchors", "sorry, i cannot help with that."),
        "harmful_data": write("harmful", "harmful", "mix two parts and heat them."),
        "task_data": write("task", "howto2", None),
    }


DATA = {
    "safe_delta": ("safe_data",),
    "irr": ("task_data",),
    "antidote": ("harmful_data",),
    "nlsr": ("safe_data",),
}


@pytest.mark.parametrize(("method", "dtype"), TYPES, ids=str)
def test_the_file_is_within_one_ulp_of_the_edit_in_double_precision(
    family: Family, texts: dict[str, Path], tmp_path: Path, method: str, dtype: torch.dtype
) -> None:
    roles = family(dtype)
    if method in ("safe_delta", "antidote", "nlsr"):
        roles = {role: path for role, path in roles.items() if role != "base"}
    request = RepairRequest(
        **roles,
        **{name: texts[name] for name in DATA[method]},
        output=tmp_path / "out",
        method=method,
        settings=METHODS[method],
        device="cpu",
        cache_dir=tmp_path / "cache",
        strength=0.6,
    )
    result = repair(request)
    out, before = read_folder(tmp_path / "out"), read_folder(roles["finetuned"])
    with open_inputs(request) as inputs:
        plan = plan_repair(dataclasses.replace(request, output=None), inputs)
        statistics: Statistics = prepare_statistics(request, plan, inputs)
        edited = 0
        for slot, layer in read_layers(plan, inputs):
            edit = plan.method.edit(in_double(layer), statistics)
            got = logical_matrix(out[slot.tensor], slot)
            if isinstance(edit, Unchanged):
                assert torch.equal(got, layer.finetuned), slot.key
                continue
            assert isinstance(edit, LowRank | Dense)
            assert_output(got, layer.finetuned, 0.6 * edit.dense())
            edited += 1
    assert edited == result.totals.edited > 0
    touched = {slot.tensor for pair in plan.edits for slot in pair.slots}
    for name in before.keys() - touched:
        assert torch.equal(out[name], before[name]), name


def in_double(layer: Layer) -> Layer:
    return dataclasses.replace(
        layer,
        finetuned=layer.finetuned.double(),
        aligned=None if layer.aligned is None else layer.aligned.double(),
        base=None if layer.base is None else layer.base.double(),
    )
