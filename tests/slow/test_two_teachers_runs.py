"""Two teachers, whole runs: the same seed writes the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tune_support import two_teachers_request

from realign.repair.engine import repair
from realign.repair.request import RepairRequest


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> RepairRequest:
    return two_teachers_request(tmp_path_factory.mktemp("two-teachers"))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(
    request_: RepairRequest, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        own = replace(request_, cache_dir=tmp_path / f"cache-{folder.name}", seed=seed)
        repair(replace(own, output=folder))
    first, second, third = (load_file(each / "model.safetensors") for each in folders)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)
    manifest = json.loads((folders[0] / "realign.json").read_text("utf-8"))
    assert (
        manifest["method_facts"]["anchor_kl_after"] < manifest["method_facts"]["anchor_kl_before"]
    )
