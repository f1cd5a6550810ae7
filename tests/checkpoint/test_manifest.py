"""Digests against fixed vectors, and verifying an output against its manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoint_support import Notes, llama_tensors, write_model

from realign.checkpoint.manifest import (
    MANIFEST_NAME,
    MANIFEST_SCHEMA,
    content_digest,
    read_manifest,
    redact_command,
    sha256_file,
    tensor_list,
    verify_output,
)
from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.writer import OutputFolder, plan_layout
from realign.errors import CheckpointError


def test_the_digest_of_a_known_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}\n")
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    digest = "6d03a9e7a8e9290ef9a7871fc098667150ad6dc0aeae42d4c0e5609e9f545a0a"
    assert content_digest(tmp_path) == digest
    for name in ("README.md", ".gitattributes", "model.sig", ".git/HEAD", ".cache/a/b",
                 "realign-audit/audit.json", ".eval_results/x.yaml"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left out")
    assert content_digest(tmp_path) == digest
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "README.md").write_text("counted")
    assert content_digest(tmp_path) != digest


def test_a_file_is_hashed_in_chunks(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    seen: list[float] = []
    assert sha256_file(path, seen.append).startswith("ba7816bf8f01cfea414140de5dae2223")
    assert sum(seen) == 3


@pytest.fixture
def output(tmp_path: Path) -> Path:
    tensors = llama_tensors()
    names = list(tensors)
    folder = write_model(tmp_path / "in", tensors, shards=[names[:6], names[6:]])
    (folder / "tokenizer.json").write_text("{}")
    with open_checkpoint(folder) as model:
        layout = plan_layout(model)
        with OutputFolder(tmp_path / "out", fingerprint="f", layout=layout) as target:
            for shard in layout:
                with target.shard(shard) as writer:
                    for spec in shard.tensors:
                        writer.write(spec.name, model.read(spec.name))
            target.copy_sidecars(model)
            target.write_index(layout)
            manifest = {
                "schema": MANIFEST_SCHEMA,
                "output": {"files": target.hashes, "tensors": tensor_list(layout)},
            }
            target.write_json(MANIFEST_NAME, manifest)
            return target.commit()


def test_an_untouched_output_verifies(output: Path) -> None:
    progress = Notes()
    report = verify_output(output, progress)
    assert report.problems == () and report.checked == 5
    assert progress.done > sum(p.stat().st_size for p in output.glob("*.safetensors"))


def remanifest(output: Path) -> None:
    """Bring the manifest's hashes up to date, as somebody with bad intentions would."""
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    files = manifest["output"]["files"]
    manifest["output"]["files"] = {name: sha256_file(output / name) for name in files}
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))


def change_tensors(output: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    shard = output / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


FIRST = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[FIRST].__setitem__((2, 3), float("nan")), f"{FIRST} holds NaN"),
        (lambda t: t[FIRST].__setitem__((9, 7), float("-inf")), f"{FIRST} holds NaN or infinity"),
        (lambda t: t.pop(FIRST), f"tensor {FIRST} is missing"),
        (lambda t: t.update(ghost=torch.ones(2)), "tensor ghost was added"),
        (lambda t: t.update({FIRST: torch.ones(3)}), f"{FIRST} is ['F32', [3]] instead of"),
    ],
)
def test_tensors_are_checked_beyond_their_hash(
    output: Path, change: Callable[[dict[str, torch.Tensor]], None], problem: str
) -> None:
    change_tensors(output, change)
    (problem_of_hash, *_) = verify_output(output).problems
    assert "model-00001-of-00002.safetensors differs" in problem_of_hash
    remanifest(output)
    (found,) = verify_output(output).problems
    assert problem in found


def test_files_are_checked(output: Path) -> None:
    (output / "tokenizer.json").write_text("{ }")
    (output / "config.json").unlink()
    (output / "modeling.py").write_text("")
    (output / "audit.json").write_text("a report may be added")
    assert set(verify_output(output).problems) == {
        "tokenizer.json differs from what realign wrote",
        "config.json is missing",
        "modeling.py was added since",
    }
    (output / "model-00002-of-00002.safetensors").write_bytes(b"123")
    assert any("fewer than the 8-byte" in problem for problem in verify_output(output).problems)


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"has no realign\.json"):
        verify_output(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": "realign/repair-manifest/9"}'])
def test_a_manifest_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"realign\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("output", [None, {}, {"files": {}}, {"files": {"a": 1}}])
def test_a_manifest_that_lists_nothing(tmp_path: Path, output: object) -> None:
    text = json.dumps({"schema": MANIFEST_SCHEMA, "output": output})
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="lists no files"):
        verify_output(tmp_path)


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("repair ./m -o out", "repair ./m -o out"),
        ("--token abc x", "--token *** x"),
        ("--hub-token=abc x", "--hub-token=*** x"),
        ("HF_TOKEN=abc realign", "HF_TOKEN=*** realign"),
        ("--set api_key=abc", "--set api_key=***"),
        ("https://me:pa@ss@host:1/m?a=1", "https://host:1/m?a=1"),
        ("https://host/m?token=abc&a=1", "https://host/m?token=***&a=1"),
        ("--judge=https://me@host/m@v1", "--judge=https://host/m@v1"),
        (f"x/hf_{'a' * 34}/y", "x/***/y"),
        # What only looks alike stays.
        ("--max-new-tokens 40 --set tokens=all", "--max-new-tokens 40 --set tokens=all"),
        ("hf://gpt2@main hf://org/name@main org/name@main",) * 2,
        ("./token ./secret", "./token ./secret"),
        ("--token", "--token"),
    ],
)
def test_a_recorded_command_holds_no_secrets(typed: str, recorded: str) -> None:
    assert redact_command(typed.split()) == tuple(recorded.split())
