"""An adapter works wherever a checkpoint does; as a folder, as MODEL+ADAPTER, as a Hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_support import tune
from support.cli_support import family_options, model, realign
from support.hub_server import Hub, Repository, serve

METHOD = ["--method", "replace", "--set", "rank=2", "--device", "cpu"]
COMMIT = "c" * 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune as an adapter, its repair as an adapter and as a checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    adapter = tune(
        model("aligned"), folder / "lora", r=4, size=0.02, target_modules=["q_proj", "down_proj"]
    )
    for name, options in (("new", ["--patch"]), ("whole", [])):
        found = realign(
            "repair", adapter, *family_options(), *METHOD, *options, "-o", folder / name
        )
        assert found.exit_code == 0, found.stderr
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, two: Path) -> None:
    ours, theirs = weights(one), weights(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-6), name


def test_repair_takes_a_folder_and_a_pair(made: Path, tmp_path: Path) -> None:
    pair = f"{model('aligned')}+{made / 'lora'}"
    found = realign("repair", pair, *family_options(), *METHOD, "-o", tmp_path / "pair")
    assert found.exit_code == 0, found.stderr
    same(tmp_path / "pair", made / "whole")
    shown = realign("repair", made / "lora", *family_options(), *METHOD, "--patch", "--dry-run")
    assert shown.exit_code == 0 and "(adapter, merged)" in shown.stdout


def test_a_repaired_adapter_is_verified_applied_and_scaled(made: Path, tmp_path: Path) -> None:
    aligned = model("aligned")
    assert realign("verify", made / "new").exit_code == 0
    found = realign("patch", "apply", made / "new", "--to", aligned, "-o", tmp_path / "applied")
    assert found.exit_code == 0, found.stderr
    same(tmp_path / "applied", made / "whole")
    both = realign(
        "patch", "apply", made / "new", "--to", aligned, "-t", "0.5", "-o", tmp_path / "no"
    )
    assert both.exit_code == 2 and "realign patch scale" in both.words
    half = realign("patch", "scale", made / "new", "-t", "0.5", "-o", tmp_path / "half")
    assert half.exit_code == 0, half.stderr
    found = realign("patch", "apply", tmp_path / "half", "--to", aligned, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    whole = [*family_options(), *METHOD, "-t", "0.5", "-o", tmp_path / "whole"]
    assert realign("repair", made / "lora", *whole).exit_code == 0
    same(tmp_path / "out", tmp_path / "whole")
    other = realign("patch", "apply", made / "new", "--to", model("base"), "-o", tmp_path / "no")
    assert other.exit_code == 2 and "was made for" in other.words
    seen: Any = realign("patch", "inspect", made / "new", "--json").json
    assert seen["repaired_adapter"] is True and seen["model_has_recorded_hash"] == "yes"


def test_the_ranks_of_a_repaired_adapter_are_those_in_its_file(tmp_path: Path) -> None:
    target = [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    adapter = tune(model("aligned"), tmp_path / "lora", r=3, size=0.02, target_modules=target)
    command = ["repair", adapter, *family_options(), *METHOD, "--patch", "-o"]
    written: Any = realign(*command, tmp_path / "new", "--json").json["patch"]
    factors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    stems = [name.removesuffix(".lora_A.weight") for name in factors if "lora_A" in name]
    ranks = {
        stem.removeprefix("base_model.model."): len(factors[f"{stem}.lora_A.weight"])
        for stem in stems
    }
    seen: Any = realign("patch", "inspect", tmp_path / "new", "--json").json
    assert {each["module"]: each["rank"] for each in seen["modules"]} == ranks
    own = [3 for _ in ranks]  # tensors that the fine-tune left alone get no edit
    edit = [total - ours for total, ours in zip(ranks.values(), own, strict=True)]
    for found in (written, seen):
        for key, values in (("rank", [*ranks.values()]), ("own_rank", own), ("edit_rank", edit)):
            assert found[key]["min"] == min(values) and found[key]["max"] == max(values)
            assert found[key]["mean"] == pytest.approx(sum(values) / len(values))
    (rank,) = set(ranks.values())
    says = f"rank {rank} (3 of the fine-tune, {rank - 3} of the repair)"
    assert says in " ".join(realign(*command, tmp_path / "again").stdout.split())
    shown = realign("patch", "inspect", tmp_path / "new").stdout
    assert says in shown and "repair's" in shown


def test_diff_and_subspace_read_adapters(made: Path, tmp_path: Path) -> None:
    compared: Any = realign("diff", model("aligned"), made / "lora", "--json")
    assert compared.exit_code in (0, 1), compared.stderr
    assert "q_proj" in compared.stdout
    file = tmp_path / "S.safetensors"
    written = realign(
        "subspace", model("aligned"), "--base", model("base"), "--rank", "2", "-o", file,
        "--picture", "none",
    )  # fmt: skip
    assert written.exit_code == 0, written.stderr
    measured = [realign("subspace", made / each, "--measure", file) for each in ("new", "whole")]
    assert [each.exit_code for each in measured] == [0, 0], measured[0].stderr


def test_an_adapter_from_the_hub(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in (made / "lora").iterdir() if path.is_file()}
    config = json.loads(files["adapter_config.json"])
    config["base_model_name_or_path"] = "org/aligned"
    files["adapter_config.json"] = json.dumps(config).encode()
    base = {path.name: path.read_bytes() for path in model("aligned").iterdir() if path.is_file()}
    content = Hub(
        {
            "org/lora": Repository({COMMIT: files}, {"main": COMMIT}),
            "org/aligned": Repository({COMMIT: base}, {"main": COMMIT}),
        }
    )
    with serve(content) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        seen: Any = realign("patch", "inspect", "org/lora", "--json").json
        assert seen["commit"] == COMMIT and seen["model"] == "org/aligned"
        out = tmp_path / "out"
        found = realign("repair", "org/lora", *family_options(), *METHOD, "-o", out)
        assert found.exit_code == 0, found.stderr
        same(out, made / "whole")
        patch = tmp_path / "patch"
        options = family_options(aligned="org/aligned")
        found = realign("repair", "org/lora", *options, *METHOD, "--patch", "-o", patch)
        assert found.exit_code == 0, found.stderr
        named = json.loads((patch / "adapter_config.json").read_text())
        assert (named["base_model_name_or_path"], named["revision"]) == ("org/aligned", COMMIT)
        # The base is in the cache by now, under the commit that the patch names.
        again: Any = realign("patch", "inspect", patch, "--json", "--offline").json
        assert again["model_has_recorded_hash"] == "yes"
