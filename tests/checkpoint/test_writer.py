"""What an output folder holds: the same files, types and bytes as its source."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.checkpoint_support import load_folder
from support.writer_support import TENSORS, copy_of, leftovers, sharded_model

from realign.checkpoint.headers import DTYPES, read_header
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.writer import (
    OutputFolder,
    ShardLayout,
    ShardWriter,
    TensorSpec,
    plan_layout,
)
from realign.errors import UsageError


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return sharded_model(tmp_path / "in" / "model")


def test_a_copy_has_the_same_files_and_loads_the_same(model: Checkpoint, tmp_path: Path) -> None:
    target = copy_of(model, tmp_path / "out" / "deeper" / "copy")
    assert leftovers(target.parent) == {"copy"}
    assert {p.name for p in target.iterdir()} == {p.name for p in model.folder.iterdir()}
    mine, theirs = load_folder(target), load_folder(model.folder)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    source = json.loads((model.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == source["weight_map"]
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in TENSORS.values()),
        "total_size": sum(t.nbytes for t in TENSORS.values()),
    }
    header = read_header(target / "model-00001-of-00003.safetensors")
    assert header.metadata == {"format": "pt"}
    assert all(info.offset % 8 == 0 for info in list(header.tensors.values())[:1])


def test_what_transformers_saved_it_loads_again(saved_model: object, tmp_path: Path) -> None:
    folder = saved_model("phi3")  # type: ignore[operator]
    with open_checkpoint(folder) as checkpoint:
        target = copy_of(checkpoint, tmp_path / "copy")
    assert not (target / "model.safetensors.index.json").exists()
    one, two = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folder, target))
    assert all(torch.equal(two.state_dict()[n], t) for n, t in one.state_dict().items())


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    specs=st.lists(
        st.tuples(
            st.sampled_from(sorted(set(DTYPES))), st.lists(st.integers(0, 5), max_size=3).map(tuple)
        ),
        max_size=5,
    ),
    step=st.integers(1, 4),
)
def test_any_layout_is_read_back_by_the_reference_library(
    tmp_path: Path, specs: list[tuple[str, tuple[int, ...]]], step: int
) -> None:
    tensors = [torch.randint(0, 2, shape).to(DTYPES[dtype]) for dtype, shape in specs]
    layout = ShardLayout(
        "x.safetensors",
        tuple(TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(specs)),
    )
    path = tmp_path / "x.safetensors"
    path.unlink(missing_ok=True)
    writer = ShardWriter(path, layout)
    for spec, tensor in zip(layout.tensors, tensors, strict=True):
        if not spec.shape:
            writer.write(spec.name, tensor)
            continue
        for at in range(0, spec.shape[0], step):
            writer.write(spec.name, tensor[at : at + step])
    digest, size = writer.finish()
    assert size == layout.file_size == path.stat().st_size
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_file(path)
    for i, tensor in enumerate(tensors):
        assert found[f"t{i}"].dtype == tensor.dtype and found[f"t{i}"].shape == tensor.shape
        assert found[f"t{i}"].tolist() == tensor.tolist()
    read_header(path)


def test_the_layout_may_change_the_float_type(model: Checkpoint) -> None:
    wide = plan_layout(model, dtype="F32")
    assert {spec.dtype for shard in wide for spec in shard.tensors} == {"F32"}
    assert [shard.filename for shard in wide] == [shard.filename for shard in plan_layout(model)]
    with pytest.raises(UsageError):
        plan_layout(model, dtype="I8")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_merged_adapter_has_the_layout_of_its_base(saved_model: object, tmp_path: Path) -> None:
    import peft

    base = saved_model("llama-tied")  # type: ignore[operator]
    wrapped = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    wrapped.save_pretrained(tmp_path / "adapter")
    with open_checkpoint(tmp_path / "adapter") as checkpoint:
        (shard,) = plan_layout(checkpoint)
        assert shard.filename == "model.safetensors"
        assert {spec.name for spec in shard.tensors} == set(checkpoint.tensors)
        target = copy_of(checkpoint, tmp_path / "merged")
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(
        loaded.lm_head.weight, load_file(target / "model.safetensors")["lm_head.weight"]
    )


def test_small_files_travel_byte_for_byte(model: Checkpoint, tmp_path: Path) -> None:
    folder = model.folder
    keep = {
        "tokenizer.json": b"{}\r\n",
        "chat_template.jinja": "\ufeff{{ 'é' }}".encode(),
        "additional_chat_templates/tool.jinja": b"x",
        "generation_config.json": b"{ }",
        "modeling_x.py": b"print('never run')",
        "README.md": b"---\nbase_model: x/y\n---\n",
        "LICENSE": b"text",
        "tokenizer.model": bytes(range(256)),
    }
    leave = [
        "pytorch_model.bin",
        "model.gguf",
        "realign.json",
        ".gitattributes",
        "model.sig",
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "trainer_state.json",
        ".git/config",
        ".cache/x.json",
        "original/params.json",
        "checkpoint-5/config.json",
    ]
    for name in (*keep, *leave):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(keep.get(name, b"{}"))
    target = copy_of(model, tmp_path / "copy")
    for name, content in keep.items():
        assert (target / name).read_bytes() == content
    assert not [name for name in leave if (target / name).exists()]


def test_modes_follow_the_umask(model: Checkpoint, tmp_path: Path) -> None:
    for mask in (0o022, 0o077):
        old = os.umask(mask)
        try:
            target = copy_of(model, tmp_path / f"copy-{mask}")
        finally:
            os.umask(old)
        assert target.stat().st_mode & 0o777 == 0o777 & ~mask
        for path in target.iterdir():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


def test_json_is_the_same_for_the_same_content(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", fingerprint="f") as output:
        output.write_json("a.json", {"b": 1, "a": {"d": "ü", "c": [1.5]}})
        output.write_json("b.json", {"a": {"c": [1.5], "d": "ü"}, "b": 1})
        assert output.hashes["a.json"] == output.hashes["b.json"]
        with pytest.raises(ValueError, match="not JSON compliant"):
            output.write_json("c.json", {"x": float("nan")})
        text = (output.partial / "a.json").read_text("utf-8")
    assert "ü" in text and text.endswith("}\n")


def test_mistakes_of_ours_are_caught(model: Checkpoint, tmp_path: Path) -> None:
    layout = plan_layout(model)[0]
    first, second = layout.tensors[0], layout.tensors[1]
    writer = ShardWriter(tmp_path / "x", layout)
    with pytest.raises(AssertionError, match="where"):
        writer.write(second.name, model.read(second.name))
    with pytest.raises(AssertionError):
        writer.write(first.name, model.read(first.name).float())
    with pytest.raises(AssertionError):
        writer.write(first.name, model.read(first.name)[:, :1])
    writer.write(first.name, model.read(first.name))
    with pytest.raises(AssertionError, match="was not written"):
        writer.finish()
    writer.close()
    with (
        OutputFolder(tmp_path / "out", fingerprint="f", layout=plan_layout(model)) as output,
        pytest.raises(AssertionError, match="not written"),
    ):
        output.commit()
