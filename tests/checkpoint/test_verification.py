"""Verifying an output against its manifest: every kind of damage is found and named, once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoint_support import Notes, llama_tensors, write_model

from realign.checkpoint.journal import JOURNAL_NAME
from realign.checkpoint.manifest import MANIFEST_NAME, MANIFEST_SCHEMA, sha256_file, tensor_list
from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.scan import all_finite
from realign.checkpoint.verification import verify_output
from realign.checkpoint.writer import OutputFolder, plan_layout
from realign.errors import CheckpointError, NotFoundError

FIRST = "model.embed_tokens.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    tensors = llama_tensors()
    # Stored masks hold infinity, and more than one chunk shows that chunks are put together.
    tensors["model.layers.0.self_attn.masked_bias"] = torch.tensor(float("-inf"))
    tensors["lm_head.weight"] = torch.ones(1_500_000, 1)
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


def problems(output: Path) -> list[str]:
    return [str(problem) for problem in verify_output(output).problems]


def test_an_untouched_output_is_intact_and_read_once(output: Path) -> None:
    progress = Notes()
    report = verify_output(output, progress)
    assert report.problems == () and report.intact
    assert (report.checked, report.tensors, report.kind) == (5, 13, "checkpoint")
    listed = [path for path in output.iterdir() if path.name != MANIFEST_NAME]
    assert progress.done == report.nbytes == sum(path.stat().st_size for path in listed)
    assert report.to_json()["schema"] == "realign/verify/1"


def remanifest(output: Path) -> None:
    """Bring the manifest's hashes up to date, as somebody with bad intentions would."""
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    files = manifest["output"]["files"]
    manifest["output"]["files"] = {name: sha256_file(output / name) for name in files}
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))


def change_tensors(output: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(output / SHARDS[0])
    change(tensors)
    save_file(tensors, output / SHARDS[0])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t[FIRST].__setitem__((2, 3), float("nan")), "holds NaN"),
        (lambda t: t[FIRST].__setitem__((9, 7), float("-inf")), "holds NaN or infinity"),
        (lambda t: t.update({FIRST: torch.ones(3)}), "is F32 [3] instead of F32 [10, 8]"),
    ],
)
def test_tensors_are_checked_beyond_their_hash(
    output: Path, change: Callable[[dict[str, torch.Tensor]], None], problem: str
) -> None:
    change_tensors(output, change)
    of_the_hash, of_the_tensor = problems(output)
    assert of_the_hash == f"{SHARDS[0]} differs from what realign wrote" or problem in of_the_hash
    remanifest(output)
    (found,) = problems(output)
    assert found.startswith(FIRST) and problem in found
    assert found in (of_the_hash, of_the_tensor)


def test_the_last_number_of_a_tensor_of_several_chunks_is_looked_at(output: Path) -> None:
    tensors = load_file(output / SHARDS[1])
    tensors["lm_head.weight"][-1] = float("inf")
    save_file(tensors, output / SHARDS[1])
    remanifest(output)
    assert problems(output) == [f"lm_head.weight in {SHARDS[1]} holds NaN or infinity"]


def test_tensors_and_index_must_agree(output: Path) -> None:
    change_tensors(output, lambda t: t.update(ghost=t.pop(FIRST)))
    remanifest(output)
    assert problems(output) == [
        f"ghost in {SHARDS[0]} is a tensor the manifest does not list",
        f"{FIRST} is missing: the manifest lists this tensor",
        f"model.safetensors.index.json leads nowhere for ghost, which is in {SHARDS[0]}",
        f"model.safetensors.index.json names the tensor {FIRST}, which no file holds",
    ]


def test_an_index_that_leads_elsewhere(output: Path) -> None:
    path = output / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][FIRST] = SHARDS[1]
    path.write_text(json.dumps(index))
    remanifest(output)
    assert problems(output) == [
        f"{path.name} leads to {SHARDS[1]} for {FIRST}, which is in {SHARDS[0]}"
    ]
    path.write_text("{")
    remanifest(output)
    (found,) = problems(output)
    assert "is not valid JSON" in found


def test_files_are_checked(output: Path) -> None:
    (output / "tokenizer.json").write_text("{ }")
    (output / "config.json").unlink()
    (output / "modeling.py").write_text("")
    (output / "audit.json").write_text("a report may be added")
    assert set(problems(output)) == {
        "tokenizer.json differs from what realign wrote",
        "config.json is missing",
        "modeling.py was added since",
    }
    (output / SHARDS[1]).write_bytes(b"123")
    assert any("fewer than the 8-byte" in problem for problem in problems(output))


def test_one_flipped_bit_anywhere_is_found(output: Path) -> None:
    path = output / SHARDS[0]
    good = path.read_bytes()
    for at in (0, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert any(problem.startswith(path.name) for problem in problems(output)), at
    path.write_bytes(good)
    assert problems(output) == []


def test_a_manifest_of_an_earlier_version_lists_no_tensors(output: Path) -> None:
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    del manifest["output"]["tensors"]
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert problems(output) == []


def test_a_listed_path_outside_of_the_folder_is_never_opened(output: Path) -> None:
    (output.parent / "secret").write_text("x")
    manifest = json.loads((output / MANIFEST_NAME).read_text())
    manifest["output"]["files"]["../secret"] = sha256_file(output.parent / "secret")
    (output / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert problems(output) == ["../secret is missing"]


def test_what_cannot_be_verified_says_what_it_is(output: Path) -> None:
    folder = output.parent
    with pytest.raises(CheckpointError, match=r"has no realign\.json.*\n.*realign diff"):
        verify_output(folder / "in")
    with pytest.raises(NotFoundError, match="does not exist"):
        verify_output(folder / "nowhere")
    with pytest.raises(NotFoundError, match="is a file"):
        verify_output(folder / "in" / "config.json")
    partial = folder / ".half.realign-partial"
    partial.mkdir()
    (partial / JOURNAL_NAME).write_text("{}")
    with pytest.raises(NotFoundError, match="has not finished"):
        verify_output(folder / "half")
    with pytest.raises(CheckpointError, match="unfinished repair"):
        verify_output(partial)


@pytest.mark.parametrize("listed", [None, {}, {"files": {}}, {"files": {"a": 1}}])
def test_a_manifest_that_lists_nothing(tmp_path: Path, listed: object) -> None:
    text = json.dumps({"schema": MANIFEST_SCHEMA, "output": listed})
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match="lists no files"):
        verify_output(tmp_path)


@settings(deadline=None)
@given(
    st.lists(st.floats(width=16), max_size=40),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_all_finite_is_what_torch_says(values: list[float], dtype: torch.dtype) -> None:
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    assert all_finite(tensor) is bool(torch.isfinite(tensor).all())


@pytest.mark.parametrize("at", [0, 24_575, 24_576, 99_999])
def test_no_number_is_passed_over(at: int) -> None:
    values = torch.ones(100_000, dtype=torch.bfloat16)
    assert all_finite(values)
    values[at] = float("nan")
    assert not all_finite(values)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_lost_shard_is_one_problem_that_counts_its_tensors(output: Path, damage: str) -> None:
    shard = output / SHARDS[1]
    count = len(load_file(shard))
    assert count > 1
    if damage == "gone":
        shard.unlink()
        (found,) = problems(output)
        assert found == f"{shard.name} is missing; it held {count} tensors"
    else:
        shard.write_bytes(shard.read_bytes()[:100])
        found, differs = problems(output)
        assert found.startswith(f"{shard.name} cannot be read: ")
        assert found.endswith(f"; it held {count} tensors")
        assert differs == f"{shard.name} differs from what realign wrote"


def test_a_shard_and_the_index_that_are_lost(output: Path) -> None:
    count = len(load_file(output / SHARDS[1]))
    (output / SHARDS[1]).unlink()
    (output / "model.safetensors.index.json").unlink()
    assert problems(output) == [
        f"{SHARDS[1]} is missing; it held {count} tensors",
        "model.safetensors.index.json is missing",
    ]


def test_a_tensor_missing_from_a_shard_that_is_there_is_named_beside_a_lost_shard(
    output: Path,
) -> None:
    count = len(load_file(output / SHARDS[1]))
    change_tensors(output, lambda t: t.update(ghost=t.pop(FIRST)))
    remanifest(output)
    (output / SHARDS[1]).unlink()
    assert problems(output) == [
        f"{SHARDS[1]} is missing; it held {count} tensors",
        f"ghost in {SHARDS[0]} is a tensor the manifest does not list",
        f"{FIRST} is missing: the manifest lists this tensor",
        f"model.safetensors.index.json leads nowhere for ghost, which is in {SHARDS[0]}",
        f"model.safetensors.index.json names the tensor {FIRST}, which no file holds",
    ]
