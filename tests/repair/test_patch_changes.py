"""Models and patches that change while a patch is merged or scaled; which files were read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.changes_support import (
    During,
    last_shard,
    longer,
    other_header,
    other_numbers,
    replaced,
)
from support.repair_support import Trio, folder_bytes, read_folder

from realign.checkpoint.manifest import read_manifest, sha256_file
from realign.errors import InputChangedError, MismatchError
from realign.progress import SILENT, Progress
from realign.repair import patch_apply, patch_merge
from realign.repair.engine import repair
from realign.repair.patch_apply import ApplyRequest, apply_patch
from realign.repair.patch_file import open_patch
from realign.repair.patch_scale import scale_patch
from realign.repair.request import RepairRequest

Change = Callable[[Path], object]
CHANGES = [other_numbers, other_header, replaced, Path.unlink]


@pytest.fixture(scope="module")
def made(trio_of: Callable[..., Trio], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune of several files and its patch."""
    trio = trio_of("llama", torch.bfloat16, "20KB")
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(trio.finetuned, folder / "model")
    request = {"base": trio.base, "aligned": trio.aligned, "finetuned": folder / "model"}
    for name, options in (("patch", {"patch": True}), ("whole", {})):
        repair(
            RepairRequest(
                **request, method="delta_svd", settings={"rank": 2}, output=folder / name, **options
            )
        )
    return folder


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of one's own, with names that need care."""
    for name in ("model", "patch"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def _apply(
    folder: Path, *, progress: Progress = SILENT, name: str = "out", **options: bool
) -> Path:
    request = ApplyRequest(
        patch=folder / "patch", model=folder / "model", output=folder / name, **options
    )
    return apply_patch(request, progress=progress).output


def _scale(folder: Path, *, progress: Progress = SILENT) -> Path:
    patch = open_patch(folder / "patch")
    return scale_patch(patch, folder / "out", strength=0.5, progress=progress)


def _left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if "out" in path.name]


@pytest.fixture(params=[True, False], ids=["hashed first", "hashed as it is read"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models are hashed before the merge; large ones while they are merged."""
    if not request.param:
        monkeypatch.setattr(patch_apply, "HASHED_FIRST_BYTES", -1)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_is_named_and_nothing_is_written(own: Path, change: Change) -> None:
    file = last_shard(own / "model")
    with pytest.raises(InputChangedError) as caught:
        _apply(own, progress=During(lambda: change(file)))
    assert str(file) in caught.value.message and caught.value.exit_code == 2
    assert not _left(own)


@pytest.mark.parametrize("work", [_apply, _scale])
@pytest.mark.parametrize("change", CHANGES)
def test_a_patch_that_changes_is_named_and_nothing_is_written(
    own: Path, change: Change, work: Callable[..., Path]
) -> None:
    file = own / "patch" / "adapter_model.safetensors"
    with pytest.raises(InputChangedError) as caught:
        work(own, progress=During(lambda: change(file)))
    assert str(file) in caught.value.message
    assert not _left(own)


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("model/config.json", _apply),
        ("patch/adapter_config.json", _apply),
        ("patch/realign.json", _apply),
        ("patch/adapter_config.json", _scale),
        ("patch/realign.json", _scale),
    ],
)
def test_small_files_count_as_well(own: Path, name: str, work: Callable[..., Path]) -> None:
    with pytest.raises(InputChangedError) as caught:
        work(own, progress=During(lambda: longer(own / name)))
    assert name in caught.value.message
    assert not _left(own)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_patch_that_is_another_since_it_was_opened_is_not_scaled(own: Path, name: str) -> None:
    patch = open_patch(own / "patch")
    file = own / "patch" / name
    if name.endswith("json"):
        file.write_text(file.read_text().replace('"lora_alpha": ', '"lora_alpha": 7'))
    else:
        other_header(file)
    with pytest.raises(InputChangedError, match=name):
        scale_patch(patch, own / "out", strength=0.5)
    assert not _left(own)


@pytest.mark.usefixtures("order")
def test_the_record_lists_the_hashes_of_what_was_read(own: Path) -> None:
    _apply(own)
    manifest = read_manifest(own / "out")
    assert manifest is not None
    listed = manifest["inputs"]["finetuned"]["files"]
    assert {file.name for file in (own / "model").glob("*.safetensors")} <= set(listed)
    assert listed == {name: sha256_file(own / "model" / name) for name in listed}
    patch = sha256_file(own / "patch" / "adapter_model.safetensors")
    assert manifest["inputs"]["patch"]["files"] == {"adapter_model.safetensors": patch}
    assert manifest["patch"]["sha256"] == patch


@pytest.mark.usefixtures("order")
def test_another_model_never_becomes_an_output(own: Path) -> None:
    other_numbers(last_shard(own / "model"))
    with pytest.raises(MismatchError, match="made for"):
        _apply(own)
    assert not _left(own)
    manifest = read_manifest(_apply(own, force=True))
    assert manifest is not None and any("other weights" in note for note in manifest["notes"])


def test_an_interrupted_run_goes_on_only_with_the_same_files(own: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    expected = folder_bytes(_apply(own, name="whole"))
    for change in (None, replaced):
        with pytest.raises(KeyboardInterrupt):
            _apply(own, progress=During(stop, after=12))
        assert list((own / ".out.realign-partial").glob("*.safetensors"))
        if change is not None:
            change(last_shard(own / "model"))
        notes = _Notes()
        assert folder_bytes(_apply(own, progress=notes)) == expected
        assert any("resuming" in note for note in notes.said) == (change is None)
        shutil.rmtree(own / "out")


class _Notes(During):
    def __init__(self) -> None:
        super().__init__(lambda: None)
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_the_size_of_blocks_changes_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(patch_merge, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(patch_merge, "STREAM_BYTES", rows * 64)
    request = ApplyRequest(patch=made / "patch", model=made / "model", output=tmp_path / "out")
    apply_patch(request)
    found, whole = read_folder(tmp_path / "out"), read_folder(made / "whole")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
