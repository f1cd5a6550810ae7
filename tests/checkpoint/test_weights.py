"""Which files are a model's weights, and what is said where a folder is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoint_support import LLAMA, llama_tensors, write_model

from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.weights import INDEX_FILE, find_weights, read_tensors
from realign.errors import CheckpointError, HeaderError, NotFoundError

TENSORS = llama_tensors()
NAMES = list(TENSORS)


def sharded(folder: Path) -> Path:
    return write_model(folder, TENSORS, shards=[NAMES[:5], NAMES[5:]])


def edit_index(folder: Path, **changes: str | None) -> None:
    path = folder / INDEX_FILE
    index = json.loads(path.read_text())
    for name, file in changes.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    path.write_text(json.dumps(index))


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    weights, tensors, remarks = read_tensors(sharded(tmp_path))
    assert [file.name[:11] for file in weights.files] == ["model-00001", "model-00002"]
    assert set(tensors) == set(NAMES) and remarks == ()


def test_the_single_file_comes_before_the_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_model(tmp_path, {"a": torch.ones(1)})
    _, tensors, remarks = read_tensors(tmp_path)
    assert list(tensors) == ["a"]
    assert remarks[0].startswith(f"RA027: {tmp_path}: ") and "ignored" in remarks[0]


def test_the_config_may_name_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    config = {**LLAMA, "transformers_weights": "other.safetensors"}
    assert find_weights(tmp_path, config).files == (tmp_path / "other.safetensors",)
    with pytest.raises(NotFoundError, match=r"names the weights gone\.safetensors"):
        find_weights(tmp_path, {"transformers_weights": "gone.safetensors"})


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b", "..", ""])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    edit_index(sharded(tmp_path), **{"lm_head.weight": name})
    with pytest.raises(HeaderError, match=r"^RA028: .*no file name inside the folder"):
        read_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        HeaderError, match=r"^RA021: .*names model-00002-of-00002\.safetensors, which is mis"
    ):
        read_tensors(tmp_path)


def test_an_index_with_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), ghost="model-00001-of-00002.safetensors")
    with pytest.raises(HeaderError, match=r"^RA022: .*places 'ghost' in model-00001"):
        read_tensors(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), **{NAMES[0]: "model-00002-of-00002.safetensors"})
    with pytest.raises(HeaderError, match=NAMES[0]):
        read_tensors(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS, shards=[NAMES, NAMES[5:]])
    with pytest.raises(HeaderError, match=r"RA023: .*stands also in model-00001"):
        read_tensors(tmp_path)


def test_tensors_beside_the_index_are_read_and_remarked(tmp_path: Path) -> None:
    edit_index(sharded(tmp_path), **{NAMES[0]: None})
    _, tensors, remarks = read_tensors(tmp_path)
    assert NAMES[0] in tensors
    assert remarks[0].startswith("RA024: ") and "1 tensors are not in the index" in remarks[0]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}',
     '{"weight_map": {"a": "b", "a": "c"}}', "{" + '"a":{' * 50000],
)  # fmt: skip
def test_a_malformed_index(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path) / INDEX_FILE).write_text(text)
    with pytest.raises(HeaderError, match=r"^RA0(20|08): .*index"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("file", "message", "hint"),
    [
        ("model-Q4.gguf", "GGUF", "original checkpoint"),
        ("pytorch_model.bin", "never unpickles", "save_pretrained"),
        ("weird.safetensors", "neither model.safetensors", "rename"),
        ("model-00001-of-00003.safetensors", "1 of 3 shards but no", "index"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(
    tmp_path: Path, file: str, message: str, hint: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(NotFoundError) as caught:
        open_checkpoint(tmp_path)
    assert message in caught.value.message and hint in caught.value.hint


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="is empty"):
        open_checkpoint(tmp_path)
    write_model(tmp_path / "checkpoint-500", TENSORS)
    with pytest.raises(NotFoundError, match="checkpoint-500"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "checkpoint-500" / "config.json").unlink()
    with pytest.raises(NotFoundError, match="holds no model weights"):
        open_checkpoint(tmp_path)
    with pytest.raises(NotFoundError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "checkpoint-500")
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "notes.txt")


def test_a_missing_number_in_the_index(tmp_path: Path) -> None:
    write_model(tmp_path, TENSORS, shards=[NAMES[:4], NAMES[4:8], NAMES[8:]])
    path = tmp_path / INDEX_FILE
    index = json.loads(path.read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if "00002-of" not in v}
    path.write_text(json.dumps(index))
    with pytest.raises(HeaderError, match=r"^RA026: .*does not name number 2\n"):
        read_tensors(tmp_path)


def test_two_exports_mixed(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").rename(
        tmp_path / "model-00002-of-00003.safetensors"
    )
    edit_index(tmp_path, **dict.fromkeys(NAMES[5:], "model-00002-of-00003.safetensors"))
    with pytest.raises(HeaderError, match=r"^RA026: .*mixes weights of 2 files and 3 files\n"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("pattern", ["model-{}-of-2", "x-{:06}-of-000002", "part_{}"])
def test_other_names_of_files_are_read(tmp_path: Path, pattern: str) -> None:
    sharded(tmp_path)
    for i, names in enumerate((NAMES[:5], NAMES[5:]), start=1):
        new = f"{pattern.format(i)}.safetensors"
        (tmp_path / f"model-0000{i}-of-00002.safetensors").rename(tmp_path / new)
        edit_index(tmp_path, **dict.fromkeys(names, new))
    _, tensors, remarks = read_tensors(tmp_path)
    assert set(tensors) == set(NAMES) and remarks == ()


def test_what_else_lies_in_the_folder_is_remarked(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"old": torch.ones(1)}, tmp_path / "model-00003-of-00003.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    save_file({"tok": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    _, tensors, remarks = read_tensors(tmp_path)
    assert set(tensors) == set(NAMES)
    stale, others = remarks
    assert stale.startswith("RA025: ") and "model-00003-of-00003.safetensors" in stale
    assert others.startswith("RA027: ") and "consolidated.safetensors, pytorch_model.bin" in others


def test_a_total_size_that_is_not_the_sum(tmp_path: Path) -> None:
    path = sharded(tmp_path) / INDEX_FILE
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] = 1
    path.write_text(json.dumps(index))
    held = sum(tensor.nbytes for tensor in TENSORS.values())
    _, _, (remark,) = read_tensors(tmp_path)
    assert remark.startswith("RA029: ") and f"1 is not the {held} bytes" in remark


def test_a_remark_about_many_files_is_one_line(tmp_path: Path) -> None:
    for file in sharded(tmp_path).glob("*.safetensors"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" "
                         + content[8 + length :])  # fmt: skip
    _, _, (remark,) = read_tensors(tmp_path)
    assert remark.startswith("RA016: ") and "00001-of-00002.safetensors and 1 more: " in remark


def test_a_damaged_shard_is_named_before_any_tensor_is_read(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00002-of-00002.safetensors"
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(HeaderError, match=r"^RA013: .*model-00002-of-00002"):
        read_tensors(tmp_path)


def test_weights_that_are_links_into_a_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    sharded(blobs)
    snapshot.mkdir()
    for i, file in enumerate(sorted(blobs.iterdir())):
        target = file.rename(blobs / f"{i}")
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / target.name)
    with open_checkpoint(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read(NAMES[0]), TENSORS[NAMES[0]])
        assert len(checkpoint.file_hashes()) == 3


def test_a_broken_link_is_a_missing_file(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "model-00001-of-00002.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    with pytest.raises(HeaderError, match=r"^RA021: .*model-00001"):
        read_tensors(tmp_path)
