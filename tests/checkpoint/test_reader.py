"""Opening folders and reading rows: bytes as stored, in memory of their own."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint_support import LLAMA, llama_tensors, write_model

from realign.checkpoint.matching import match
from realign.checkpoint.names import is_tied
from realign.checkpoint.reader import FolderCheckpoint, open_checkpoint
from realign.errors import CheckpointError

TENSORS = llama_tensors(dtype=torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = list(TENSORS)
    return write_model(tmp_path / "a model", TENSORS, shards=[names[:3], names[3:]])


def test_tensors_are_the_stored_ones(folder: Path) -> None:
    with open_checkpoint(str(folder)) as checkpoint:
        assert checkpoint.kind == "full" and checkpoint.commit is None
        assert checkpoint.config["model_type"] == "llama"
        for name, tensor in TENSORS.items():
            read = checkpoint.read(name)
            assert read.dtype == torch.bfloat16 and torch.equal(read, tensor)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(a=st.integers(0, 10), b=st.integers(0, 10))
def test_rows_are_a_slice_of_the_whole(folder: Path, a: int, b: int) -> None:
    rows = (min(a, b), max(a, b))
    with open_checkpoint(folder) as checkpoint:
        read = checkpoint.read("lm_head.weight", rows)
    assert torch.equal(read, TENSORS["lm_head.weight"][rows[0] : rows[1]])


def test_what_is_read_can_be_changed_without_harm(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        checkpoint.read("lm_head.weight").zero_()
        assert torch.equal(checkpoint.read("lm_head.weight"), TENSORS["lm_head.weight"])


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"s": torch.tensor(3.0), "e": torch.empty(0, 4), "h": torch.empty(2, 0)}
    with open_checkpoint(write_model(tmp_path, tensors)) as checkpoint:
        assert checkpoint.read("s").item() == 3.0
        assert checkpoint.read("e").shape == (0, 4)
        assert checkpoint.read("h", (0, 1)).shape == (1, 0)


def test_a_closed_checkpoint_reads_again(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    checkpoint.read("lm_head.weight")
    checkpoint.close()
    assert torch.equal(checkpoint.read("lm_head.weight"), TENSORS["lm_head.weight"])
    checkpoint.close()


def test_symlinked_files_and_odd_names(tmp_path: Path, folder: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    links = tmp_path / "modèle \u2603 +1"
    links.mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (links / path.name).symlink_to(blobs / str(i))
    through = tmp_path / "link"
    through.symlink_to(links)
    for place in (links, through):
        with open_checkpoint(place) as checkpoint:
            assert torch.equal(checkpoint.read("lm_head.weight"), TENSORS["lm_head.weight"])


def test_hashes_name_every_file_that_matters(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / ".cache").mkdir()
    checkpoint = open_checkpoint(folder)
    hashes = checkpoint.file_hashes()
    assert set(hashes) == {
        "config.json",
        "tokenizer.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    for name, digest in hashes.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\ufeff{}x"])
def test_a_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(folder)


def test_a_model_and_an_adapter_in_one_folder_are_ambiguous(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="a whole model and an adapter"):
        open_checkpoint(tmp_path)


def test_a_tied_head_that_repeats_the_embeddings_is_left_out(tmp_path: Path) -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    tensors = {**TENSORS, "lm_head.weight": TENSORS["model.embed_tokens.weight"].clone()}
    same = FolderCheckpoint(write_model(tmp_path / "same", tensors, config=tied), source="same")
    assert "lm_head.weight" not in same.tensors and "repeats" in same.remarks[0]
    other = FolderCheckpoint(write_model(tmp_path / "other", TENSORS, config=tied), source="other")
    assert "lm_head.weight" in other.tensors and "differs" in other.remarks[0]


def _without_key(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))


def test_gpt2_without_the_key_is_tied(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved_model("gpt2"), tmp_path / "gpt2")
    _without_key(tmp_path / "gpt2")
    with open_checkpoint(tmp_path / "gpt2") as checkpoint:
        assert is_tied(checkpoint.config, checkpoint.tensors)
        pairs = match(checkpoint, {}, scope="matrices").pairs
        (reason,) = [each.reason for each in pairs if each.role.module == "wte"]
        assert "tied to the output head" in reason
        assert checkpoint.sidecars()["config.json"] == tmp_path / "gpt2" / "config.json"


def test_without_the_key_a_head_that_repeats_the_embeddings_is_tied(tmp_path: Path) -> None:
    silent = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    tensors = {**TENSORS, "lm_head.weight": TENSORS["model.embed_tokens.weight"].clone()}
    same = FolderCheckpoint(write_model(tmp_path / "same", tensors, config=silent), source="same")
    assert "lm_head.weight" not in same.tensors and is_tied(same.config, same.tensors)
    written = same.sidecars()["config.json"]
    assert isinstance(written, bytes) and json.loads(written) == {
        **silent,
        "tie_word_embeddings": True,
    }
    other = FolderCheckpoint(write_model(tmp_path / "o", TENSORS, config=silent), source="other")
    assert "lm_head.weight" in other.tensors and not other.remarks
    assert not is_tied(other.config, other.tensors)
