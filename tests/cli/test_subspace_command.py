"""`realign subspace`: what cannot be measured, and targets that exist."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.cli_support import FINETUNED, damaged, model, realign
from support.refusal_support import refused


def test_what_cannot_be_measured_is_one_remark_or_a_refusal(tmp_path: Path) -> None:
    file = tmp_path / "safety.safetensors"
    options = ["--base", model("base"), "-o", file, "--rank", "4", "--device", "cpu"]
    realign("subspace", model("aligned"), *options, "--picture", "none")
    lost = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    copy = damaged(
        FINETUNED,
        tmp_path,
        tensors=lambda found: {name: each for name, each in found.items() if name not in lost},
    )
    some = realign("subspace", copy, "--measure", file)
    assert some.exit_code == 0, some.stderr
    assert f"another shape: 2 tensors ({lost[0]}, ...)" in some.words
    assert lost[0] not in some.stdout and lost[1] not in some.stderr + some.stdout
    quiet = realign("subspace", copy, "--measure", file, "--quiet")
    assert (quiet.exit_code, quiet.stderr, quiet.stdout) == (0, "", some.stdout)
    named: Any = realign("subspace", copy, "--measure", file, "--json").json
    assert named["unmatched"] == lost
    other = damaged(FINETUNED, tmp_path / "foreign", config=lambda c: c.update(model_type="gpt2"))
    result = realign("subspace", other, "--measure", file)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert "model_type = 'gpt2'" in result.words and str(other) in result.words
    assert result.stdout == ""


def test_a_target_that_exists_is_named_before_its_picture(tmp_path: Path) -> None:
    file, drawing = tmp_path / "safety.safetensors", tmp_path / "safety.png"
    options = ["--base", model("base"), "-o", file]
    drawing.write_bytes(b"mine")
    refused(realign("subspace", model("aligned"), *options), drawing, "--picture none")
    file.write_bytes(b"mine")
    both = realign("subspace", model("aligned"), *options)
    refused(both, f"{file} exists already")
    assert str(drawing) not in both.stderr
    options[-1] = tmp_path / "other.png"
    refused(realign("subspace", model("aligned"), *options), "the subspace file and its picture")
    assert [each.read_bytes() for each in sorted(tmp_path.iterdir())] == [b"mine", b"mine"]
