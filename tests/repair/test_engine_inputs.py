"""What is known of the inputs afterwards, and inputs that change while they are being read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.changes_support import During, last_shard, other_header, other_numbers, replaced
from support.repair_support import Trio, folder_bytes

from realign.checkpoint import hashing
from realign.checkpoint.manifest import read_manifest, sha256_file
from realign.errors import InputChangedError
from realign.repair.engine import repair
from realign.repair.request import RepairRequest


@pytest.fixture
def trio(trio_of, tmp_path: Path) -> Trio:
    """A family of one's own, with names that need care."""
    found: Trio = trio_of("llama", torch.bfloat16, "20KB")
    roles = ("base", "aligned", "unaligned", "finetuned")
    return Trio(
        **{
            role: Path(shutil.copytree(getattr(found, role), tmp_path / f"the {role} modèle"))
            for role in roles
        }
    )


def _request(trio: Trio, output: Path, **options: object) -> RepairRequest:
    usual = {"aligned": trio.aligned, "base": trio.base, "method": "resta", "output": output}
    return RepairRequest(**{"finetuned": trio.finetuned, **usual, **options})


@pytest.mark.parametrize("role", ["finetuned", "aligned", "base"])
@pytest.mark.parametrize("change", [other_numbers, other_header, replaced, Path.unlink])
def test_an_input_that_changes_is_named_and_nothing_is_written(
    trio: Trio, tmp_path: Path, role: str, change: Callable[[Path], None]
) -> None:
    file = last_shard(getattr(trio, role))
    with pytest.raises(InputChangedError) as caught:
        repair(_request(trio, tmp_path / "out"), progress=During(lambda: change(file)))
    assert str(file) in caught.value.message and caught.value.exit_code == 2
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_patch_does_not_mix_two_states_either(trio: Trio, tmp_path: Path) -> None:
    file = last_shard(trio.base)
    request = _request(trio, tmp_path / "out", method="replace", patch=True)
    with pytest.raises(InputChangedError, match="changed while"):
        repair(request, progress=During(lambda: other_numbers(file)))
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_a_small_file_that_changes_counts_as_well(trio: Trio, tmp_path: Path) -> None:
    config = trio.finetuned / "config.json"
    change = lambda: config.write_text(config.read_text() + "\n")  # noqa: E731
    with pytest.raises(InputChangedError, match=r"config\.json"):
        repair(_request(trio, tmp_path / "out"), progress=During(change))


@pytest.mark.parametrize("method", ["resta", "replace"])
def test_the_manifest_lists_the_hash_of_every_input_file(
    trio: Trio, tmp_path: Path, method: str
) -> None:
    repair(_request(trio, tmp_path / "out", method=method))
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    for role in ("finetuned", "aligned", "base"):
        folder: Path = getattr(trio, role)
        listed = manifest["inputs"][role]["files"]
        assert {file.name for file in folder.glob("*.safetensors")} <= set(listed)
        assert listed == {name: sha256_file(folder / name) for name in listed}


def test_an_input_that_changed_before_a_resumed_run_starts_afresh(
    trio: Trio, tmp_path: Path
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    class _Late(During):
        def advance(self, amount: float = 1.0) -> None:
            self.seen = getattr(self, "seen", 0.0) + amount
            if self.seen > 25_000:
                stop()

    with pytest.raises(KeyboardInterrupt):
        repair(_request(trio, tmp_path / "out"), progress=_Late(stop))
    assert (tmp_path / ".out.realign-partial" / "journal.json").is_file()
    other_numbers(sorted(trio.aligned.glob("*.safetensors"))[0])
    repair(_request(trio, tmp_path / "out"))
    repair(_request(trio, tmp_path / "whole"))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_hashes_of_files_at_rest_are_kept_and_give_the_same_output(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_STORED_FROM", 1)
    monkeypatch.setattr(hashing, "_REST_NS", 20_000_000)
    time.sleep(0.05)
    repair(_request(trio, tmp_path / "first", cache_dir=tmp_path / "cache"))
    kept = {path.name for path in (tmp_path / "cache" / "hashes").iterdir()}
    weights = [f for r in ("finetuned", "aligned", "base") for f in getattr(trio, r).glob("*.s*")]
    assert len(kept) >= len(weights)
    repair(_request(trio, tmp_path / "second", cache_dir=tmp_path / "cache"))
    assert folder_bytes(tmp_path / "second") == folder_bytes(tmp_path / "first")
    assert {path.name for path in (tmp_path / "cache" / "hashes").iterdir()} == kept


@pytest.mark.parametrize("method", ["replace", "delta_svd"])
def test_the_number_of_matrices_in_flight_changes_nothing(
    trio: Trio, tmp_path: Path, method: str
) -> None:
    outputs: list[dict[str, bytes]] = []
    for count in (1, 2, 5):
        target = tmp_path / f"out{count}"
        repair(_request(trio, target, method=method), in_flight=count)
        outputs.append(folder_bytes(target))
    assert outputs[0] == outputs[1] == outputs[2]
