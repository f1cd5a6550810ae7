"""`realign repair --patch` and `realign patch` on the tiny family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cli_support import FINETUNED, damaged, digest, family_options, model, realign

METHOD = ["--method", "replace", "--set", "rank=2", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same repair as a patch and as a checkpoint."""
    folder = tmp_path_factory.mktemp("made")
    for name, options in (("patch", ["--patch"]), ("whole", [])):
        found = realign(
            "repair", model(), *family_options(), *METHOD, *options, "-o", folder / name
        )
        assert found.exit_code == 0, found.stderr
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_repair_says_rank_size_and_exactness(made: Path, tmp_path: Path) -> None:
    command = ["repair", model(), *family_options(), *METHOD, "--patch", "-o"]
    shown = realign(*command, tmp_path / "a")
    assert "patch: rank" in shown.stdout and "% of the checkpoint" in shown.stdout
    assert "exact" in shown.stdout
    found: Any = realign(*command, tmp_path / "b", "--json").json["patch"]
    file = tmp_path / "b" / "adapter_model.safetensors"
    assert found["nbytes"] == sum(t.nbytes for t in load_file(file).values())
    total = sum(tensor.nbytes for tensor in weights(model()).values())
    assert found["percent"] == pytest.approx(100 * found["nbytes"] / total)
    assert found["exact"] is True and found["error"] == 0.0
    assert found["rank"]["min"] <= found["rank"]["mean"] <= found["rank"]["max"]
    assert found["edit_rank"] == found["rank"] and found["own_rank"]["max"] == 0
    assert "fine-tune" not in shown.stdout
    assert realign(*command[:-2], "-o", tmp_path / "c", "--json").json["patch"] is None


def test_a_dense_edit_is_refused_or_truncated_with_its_error(tmp_path: Path) -> None:
    command = ["repair", model(), *family_options(), "--method", "wise_ft", "--patch"]
    refused = realign(*command, "-o", tmp_path / "no")
    assert refused.exit_code == 2 and "--max-patch-rank" in refused.words
    found = realign(*command, "--max-patch-rank", "3", "-o", tmp_path / "p", "--json")
    patch: Any = found.json["patch"]
    assert patch["exact"] is False and 0 < patch["error"] < 1 and patch["rank"]["max"] == 3
    shown = realign("patch", "inspect", tmp_path / "p")
    assert "truncated, largest relative error" in shown.stdout
    tuned, aligned = weights(model()), weights(model("aligned"))
    rows: Any = found.json["manifest"]
    for row in rows["tensors"]:
        name = row["tensor"]
        edit = aligned[name].double() - tuned[name].double()  # up to a factor
        s2 = torch.linalg.svdvals(edit).square()
        if row["outcome"] == "edited" and row["key"] == name:
            assert row["patch_error"] == pytest.approx(
                float((s2[3:].sum() / s2.sum()).sqrt()), rel=1e-3
            )
    everything = realign(*command, "--max-patch-rank", "3", "--scope", "all", "-o", tmp_path / "q")
    assert everything.exit_code == 2 and "norms" in everything.words
    without = realign(*command[:-1], "--max-patch-rank", "3", "-o", tmp_path / "r")
    assert without.exit_code == 2 and "--patch" in without.words


def test_applying_a_patch_gives_the_repaired_checkpoint(made: Path, tmp_path: Path) -> None:
    before = digest(model()), digest(made / "patch")
    found = realign("patch", "apply", made / "patch", "--to", model(), "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr
    assert found.stdout.rstrip().endswith(str(tmp_path / "out"))
    assert "survival" in found.stdout
    ours, whole = weights(tmp_path / "out"), weights(made / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert (digest(model()), digest(made / "patch")) == before
    verified = realign("verify", tmp_path / "out")
    assert verified.exit_code == 0, verified.stderr
    manifest = json.loads((tmp_path / "out" / "realign.json").read_text())
    assert manifest["kind"] == "checkpoint" and manifest["method"]["name"] == "replace"
    assert {"finetuned", "patch"} == set(manifest["inputs"])
    edited = [row for row in manifest["tensors"] if row["outcome"] == "edited"]
    assert edited and all(row["survival"] is not None for row in edited)
    sidecars = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in model().iterdir() if path.suffix != ".md"} <= sidecars


def test_the_strength_is_a_dial(made: Path, tmp_path: Path) -> None:
    half = realign(
        "repair", model(), *family_options(), *METHOD, "-t", "0.5", "-o", tmp_path / "half"
    )
    assert half.exit_code == 0
    scaled = realign("patch", "scale", made / "patch", "-t", "0.5", "-o", tmp_path / "scaled")
    assert scaled.exit_code == 0, scaled.stderr
    patches = [(tmp_path / "scaled", []), (made / "patch", ["--strength", "0.5"])]
    for i, (patch, options) in enumerate(patches):
        out = tmp_path / f"out{i}"
        found = realign("patch", "apply", patch, "--to", model(), *options, "-o", out)
        assert found.exit_code == 0, found.stderr
        for name, tensor in weights(tmp_path / "half").items():
            assert torch.equal(weights(out)[name], tensor), name
    again = realign("patch", "scale", tmp_path / "scaled", "-t", "1", "-o", tmp_path / "again")
    assert again.exit_code == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (made / "patch" / name).read_bytes()
    assert realign("verify", tmp_path / "scaled").exit_code == 0
    seen: Any = realign("patch", "inspect", tmp_path / "scaled", "--json").json
    full: Any = realign("patch", "inspect", made / "patch", "--json").json
    assert seen["strength"] == 0.5 and full["strength"] == 1.0
    for one, two in zip(seen["modules"], full["modules"], strict=True):
        assert one["norm"] == pytest.approx(two["norm"] / 2)
    for bad in ("0", "nan", "1.5", "-1"):
        found = realign("patch", "scale", made / "patch", "-t", bad, "-o", tmp_path / "bad")
        assert found.exit_code == 2, bad
        assert not (tmp_path / "bad").exists()


def test_another_model_is_refused_unless_forced(made: Path, tmp_path: Path) -> None:
    command = ["patch", "apply", made / "patch", "--to", model("aligned"), "-o", tmp_path / "out"]
    refused = realign(*command)
    assert refused.exit_code == 2 and "was made for" in refused.words and "--force" in refused.words
    assert not (tmp_path / "out").exists()
    forced = realign(*command, "--force")
    assert forced.exit_code == 0 and "was made for other weights" in forced.words


def test_a_renamed_or_recased_model_is_still_the_one(made: Path, tmp_path: Path) -> None:
    def touch(config: dict[str, object]) -> None:
        config["_comment"] = "changed"

    moved = damaged(FINETUNED, tmp_path, config=touch)
    found = realign("patch", "apply", made / "patch", "--to", moved, "-o", tmp_path / "out")
    assert found.exit_code == 0, found.stderr


def test_twice_is_refused(made: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert realign("patch", "apply", made / "patch", "--to", model(), "-o", once).exit_code == 0
    refused = realign("patch", "apply", made / "patch", "--to", once, "-o", twice)
    assert refused.exit_code == 2 and "has been applied" in refused.words
    repaired = realign("repair", once, *family_options(), *METHOD, "-o", twice)
    assert repaired.exit_code == 2 and "repaired with replace already" in repaired.words
    assert not twice.exists()


def test_inspect_says_where_it_comes_from_and_belongs(made: Path, tmp_path: Path) -> None:
    found: Any = realign("patch", "inspect", made / "patch", "--json").json
    assert found["model_has_recorded_hash"] == "yes"
    assert found["origin"]["method"] == "replace" and found["exact"] is True
    tensors = load_file(made / "patch" / "adapter_model.safetensors")
    written = json.loads((made / "patch" / "realign.json").read_text("utf-8"))["patch"]["nbytes"]
    assert found["nbytes"] == sum(tensor.nbytes for tensor in tensors.values()) == written
    for each in found["modules"]:
        stem = f"base_model.model.{each['module']}.lora_"
        product = tensors[f"{stem}B.weight"].double() @ tensors[f"{stem}A.weight"].double()
        assert each["norm"] == pytest.approx(float(product.norm()))
        assert each["shape"] == list(product.shape)
    shown = realign("patch", "inspect", made / "patch")
    assert "yes: the weights have the recorded hashes" in shown.stdout
    copy = tmp_path / "copy"
    shutil.copytree(made / "patch", copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    for name, expected in ((str(model("aligned")), "no"), (str(tmp_path / "gone"), "not here")):
        config["base_model_name_or_path"] = name
        (copy / "adapter_config.json").write_text(json.dumps(config))
        again: Any = realign("patch", "inspect", copy, "--json").json
        assert again["model_has_recorded_hash"] == expected
        assert again["percent_of_model"] is not None
    (copy / "realign.json").unlink()
    foreign: Any = realign("patch", "inspect", copy, "--json").json
    assert foreign["model_has_recorded_hash"] == "not recorded" and foreign["origin"] == {}


def test_an_adapter_of_somebody_else_can_be_merged(made: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(made / "patch", foreign)
    (foreign / "realign.json").unlink()
    found = realign("patch", "apply", foreign, "--to", model(), "-o", tmp_path / "out")
    assert found.exit_code == 0 and "is not checked" in found.words
    whole = weights(made / "whole")
    assert all(torch.equal(weights(tmp_path / "out")[name], whole[name]) for name in whole)


def test_what_is_no_patch_is_refused(made: Path, tmp_path: Path) -> None:
    for command in (["inspect"], ["scale", "-t", "1", "-o", tmp_path / "o"]):
        found = realign("patch", command[0], model(), *command[1:])
        assert found.exit_code == 2 and "is no patch" in found.words
    inside = realign(
        "patch", "apply", made / "patch", "--to", model(), "-o", made / "patch" / "inner"
    )
    assert inside.exit_code == 2 and "lies inside the input" in inside.words
    broken = tmp_path / "broken"
    shutil.copytree(made / "patch", broken)
    file = broken / "adapter_model.safetensors"
    tensors = load_file(file)
    some = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, some: tensors[some] * float("nan")}, file)
    found = realign("patch", "apply", broken, "--to", model(), "-o", tmp_path / "o")
    assert found.exit_code == 2 and "of the patch checkpoint" in found.words
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".o*"))
