"""The output folder: whole or absent, resumed by content, exclusive, and gentle to its inputs."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.checkpoint_support import Notes, llama_tensors, load_folder, write_model
from torch import Tensor

from realign.checkpoint.headers import DTYPES, read_header
from realign.checkpoint.reader import Checkpoint, open_checkpoint
from realign.checkpoint.writer import (
    OutputFolder,
    ShardLayout,
    ShardWriter,
    TensorSpec,
    plan_layout,
)
from realign.errors import OutputError, UsageError

TENSORS = llama_tensors(dtype=torch.bfloat16)
NAMES = list(TENSORS)


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    shards = [NAMES[:4], NAMES[4:8], NAMES[8:]]
    return open_checkpoint(write_model(tmp_path / "in" / "model", TENSORS, shards=shards))


def fill(output: OutputFolder, layout: ShardLayout, source: Checkpoint, *, rows: int = 3) -> None:
    with output.shard(layout) as writer:
        for spec in layout.tensors:
            for at in range(0, spec.shape[0], rows):
                part = (at, min(at + rows, spec.shape[0]))
                writer.write(spec.name, source.read(spec.name, part))
        writer.facts["tensors"] = len(layout.tensors)


def copy_of(model: Checkpoint, target: Path, *, fingerprint: str = "f") -> Path:
    layout = plan_layout(model)
    with OutputFolder(target, fingerprint=fingerprint, layout=layout) as output:
        for each in layout:
            if not output.is_done(each):
                fill(output, each, model)
        output.copy_sidecars(model)
        output.write_index(layout)
        return output.commit()


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


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


def test_targets_that_are_refused(model: Checkpoint, tmp_path: Path) -> None:
    inputs = [model.folder]
    inside = model.folder / "out"
    taken = tmp_path / "taken"
    taken.mkdir()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    through = tmp_path / "through"
    through.symlink_to(model.folder)
    file = tmp_path / "file"
    file.write_text("")
    before = sorted(model.folder.iterdir())
    for target, message in (
        (taken, "exists already"),
        (dangling, "exists already"),
        (file, "exists already"),
        (inside, "lies inside the input"),
        (through / "out", "lies inside the input"),
        (model.folder, "is the input"),
        (through, "is the input"),
        (file / "out", "cannot be written"),
    ):
        with (
            pytest.raises(OutputError, match=message),
            OutputFolder(target, fingerprint="f", inputs=inputs),
        ):
            pass
    assert sorted(model.folder.iterdir()) == before
    assert leftovers(tmp_path) == {"in", "taken", "dangling", "through", "file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with (
            pytest.raises(OutputError, match="cannot be written"),
            OutputFolder(tmp_path / "out", fingerprint="f"),
        ):
            pass
    finally:
        tmp_path.chmod(0o755)


def test_an_error_leaves_nothing(model: Checkpoint, tmp_path: Path) -> None:
    layout = plan_layout(model)
    place = tmp_path / "new" / "place"
    with (
        pytest.raises(ZeroDivisionError),
        OutputFolder(place / "out", fingerprint="f", layout=layout) as output,
    ):
        fill(output, layout[0], model)
        raise ZeroDivisionError
    assert not place.parent.exists()
    with OutputFolder(place / "out", fingerprint="f", layout=layout) as output:
        fill(output, layout[0], model)  # left without commit
    assert not place.parent.exists()


def test_two_runs_on_one_target(model: Checkpoint, tmp_path: Path) -> None:
    layout = plan_layout(model)
    target = tmp_path / "out"
    with OutputFolder(target, fingerprint="f", layout=layout) as first:
        fill(first, layout[0], model)
        with (
            pytest.raises(OutputError, match="another run is writing"),
            OutputFolder(target, fingerprint="f", layout=layout),
        ):
            pass
        assert first.is_done(layout[0])
        for each in layout[1:]:
            fill(first, each, model)
        first.write_index(layout)
        first.commit()
    assert set(load_folder(target)) == set(TENSORS)


def test_a_target_that_appears_meanwhile_keeps_the_work(model: Checkpoint, tmp_path: Path) -> None:
    layout = plan_layout(model)
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="exists already"),
        OutputFolder(target, fingerprint="f", layout=layout) as output,
    ):
        for each in layout:
            fill(output, each, model)
        target.mkdir()
        output.commit()
    target.rmdir()
    notes = Notes()
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        assert all(output.is_done(each) for each in layout)
        output.write_index(layout)
        output.commit()
    assert "3 weight files" in notes.notes[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def interrupt(model: Checkpoint, target: Path, notes: Notes) -> None:
    layout = plan_layout(model)
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        fill(output, layout[0], model)
        fill(output, layout[1], model)
        with output.shard(layout[2]) as writer:
            name = layout[2].tensors[0].name
            writer.write(name, model.read(name))
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_keeps_finished_files_and_a_rerun_goes_on(model: Checkpoint, tmp_path: Path) -> None:
    target, notes = tmp_path / "out", Notes()
    with pytest.raises(KeyboardInterrupt):
        interrupt(model, target, notes)
    assert not target.exists() and ".out.realign-partial" in notes.notes[-1]
    partial = tmp_path / ".out.realign-partial"
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    layout, notes = plan_layout(model), Notes()
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        assert [output.is_done(each) for each in layout] == [True, True, False]
        assert output.finished(layout[0]) == {"tensors": 4}
        assert output.finished(layout[2]) is None
        fill(output, layout[2], model)
        output.copy_sidecars(model)
        output.write_index(layout)
        output.commit()
    assert "resuming" in notes.notes[0]
    kept = layout[0].filename
    assert (target / kept).stat().st_mtime_ns == times[kept]
    assert tree(target) == tree(copy_of(model, tmp_path / "straight"))
    assert leftovers(tmp_path) == {"in", "out", "straight"}


def test_an_early_ctrl_c_has_nothing_to_keep(model: Checkpoint, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        OutputFolder(tmp_path / "out", fingerprint="f", layout=plan_layout(model)),
    ):
        signal.raise_signal(signal.SIGINT)
    assert leftovers(tmp_path) == {"in"}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "journal", "journal gone"])
def test_damaged_leftovers_are_written_again(
    model: Checkpoint, tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt(model, target, Notes())
    partial = tmp_path / ".out.realign-partial"
    victim = partial / plan_layout(model)[1].filename
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(bytes(content))
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif damage == "gone":
        victim.unlink()
    elif damage == "journal":
        (partial / "journal.json").write_text('{"schema":')
    else:
        (partial / "journal.json").unlink()
    (partial / "tokenizer.json").write_text("stale")
    assert tree(copy_of(model, target)) == tree(copy_of(model, tmp_path / "straight"))


def test_another_fingerprint_starts_afresh(model: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt(model, target, Notes())
    layout, notes = plan_layout(model), Notes()
    with OutputFolder(target, fingerprint="other", layout=layout, progress=notes) as output:
        assert not any(output.is_done(each) for each in layout)
        assert leftovers(output.partial) == {"journal.json"}
    assert "discarding" in notes.notes[0]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.writer import OutputFolder, plan_layout
model = open_checkpoint(sys.argv[1])
layout = plan_layout(model)
with OutputFolder(sys.argv[2], fingerprint="f", layout=layout) as output:
    for each in layout[:2]:
        with output.shard(each) as writer:
            for spec in each.tensors:
                writer.write(spec.name, model.read(spec.name))
                if each is layout[1]:
                    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_resumed(model: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(model.folder), str(target), root], check=False
    )
    assert done.returncode == -signal.SIGKILL and not target.exists()
    layout, notes = plan_layout(model), Notes()
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        assert [output.is_done(each) for each in layout] == [True, False, False]
    assert "1 weight files" in notes.notes[0]


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def big(tmp_path: Path) -> tuple[Checkpoint, tuple[ShardLayout, ...]]:
    tensors: dict[str, Tensor] = {"a": torch.ones(400, 1000), "b": torch.ones(400, 1000)}
    model = open_checkpoint(write_model(tmp_path / "in", tensors, shards=[["a"], ["b"]]))
    return model, plan_layout(model)


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    model, layout = big(tmp_path)
    with (
        file_size_limit(1_000_000),
        pytest.raises(OutputError) as caught,
        OutputFolder(tmp_path / "out", fingerprint="f", layout=layout) as output,
    ):
        fill(output, layout[0], model, rows=100)
    assert "disk is full" in caught.value.message
    assert str(layout[0].file_size) in caught.value.message
    assert leftovers(tmp_path) == {"in"}
    model.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up(tmp_path: Path, small_disk: Path) -> None:
    model, layout = big(tmp_path)
    ballast = small_disk / "ballast"
    with (
        pytest.raises(OutputError) as caught,
        OutputFolder(small_disk / "new" / "out", fingerprint="f", layout=layout) as output,
    ):
        fill(output, layout[0], model, rows=100)
        ballast.write_bytes(bytes(5_500_000))  # another program is faster
        fill(output, layout[1], model, rows=100)
    assert "disk is full" in caught.value.message and "1600" in caught.value.message
    assert leftovers(small_disk) == {"ballast"}
    with (
        pytest.raises(OutputError) as caught,
        OutputFolder(small_disk / "out", fingerprint="f", layout=layout),
    ):
        raise AssertionError("it should have been seen beforehand")
    assert "bytes free" in caught.value.message and "the output needs" in caught.value.message
    assert leftovers(small_disk) == {"ballast"}
    model.close()


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
