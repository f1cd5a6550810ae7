"""`realign verify`: exit codes, one line per problem, and what it says of foreign folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_support import family_options, model, realign

from realign.checkpoint.manifest import MANIFEST_NAME, sha256_file


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for name, more in (("out", []), ("patch", ["--patch"])):
        result = realign(
            "repair", model(), *family_options(), "--method", "replace", "--set", "rank=2",
            "-o", folder / name, *more,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
    return folder


def test_intact_outputs(outputs: Path) -> None:
    for name, kind, weights in (
        ("out", "checkpoint", "model.safetensors"),
        ("patch", "patch", "adapter_model.safetensors"),
    ):
        result = realign("verify", outputs / name)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"intact: {outputs / name} ({kind}, ")
        document = realign("verify", outputs / name, "--json").json
        assert document["intact"] is True and document["problems"] == []
        assert document["tensors"] == len(load_file(outputs / name / weights))


@pytest.mark.parametrize("name", ["out", "patch"])
def test_a_lost_tensor_is_found_also_where_the_hash_was_brought_up_to_date(
    outputs: Path, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / name
    shutil.copytree(outputs / name, folder)
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    lost = sorted(tensors)[1]
    del tensors[lost]
    save_file(tensors, weights, metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["output"]["files"][weights.name] = sha256_file(weights)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    result = realign("verify", folder)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{lost} is missing: the manifest lists this tensor")


@pytest.mark.parametrize("name", ["out", "patch"])
def test_every_problem_is_one_line_and_exit_1(outputs: Path, tmp_path: Path, name: str) -> None:
    folder = outputs / name
    weights = next(folder.glob("*.safetensors"))
    good = weights.read_bytes()
    tensors = load_file(weights)
    first = next(iter(tensors))
    tensors[first].view(-1)[0] = torch.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"")
    try:
        result = realign("verify", folder)
        document = realign("verify", folder, "--json")
    finally:
        weights.write_bytes(good)
        (folder / "pytorch_model.bin").unlink()
    assert result.exit_code == document.exit_code == 1
    *lines, last = result.stdout.splitlines()
    assert last == f"not intact: {folder} (3 problems)"
    assert [line.split()[0] for line in lines] == [weights.name, first, "pytorch_model.bin"]
    assert all(": " in line for line in lines), "each says what to do"
    found = cast(list[dict[str, str]], document.json["problems"])
    assert [problem["where"] for problem in found] == [weights.name, first, "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("folder", "says"), [("nowhere", "does not exist"), ("model", "has no realign.json")]
)
def test_what_cannot_be_verified_exits_2(tmp_path: Path, folder: str, says: str) -> None:
    result = realign("verify", tmp_path / folder if folder == "nowhere" else model())
    assert result.exit_code == 2 and says in result.words and not result.stdout
    assert "Traceback" not in result.stderr
