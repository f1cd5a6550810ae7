"""Building a family: same bytes after an interruption, whole folders only, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.lab_support import MICRO, Interrupting, family_bytes

from realign.audit.suites import load_suite
from realign.checkpoint.reader import open_checkpoint
from realign.errors import NotFoundError, OutputError, UsageError
from realign.lab.build import build_family, finetune_variant
from realign.lab.presets import Phase
from realign.lab.record import read_record
from realign.model.generation import generate
from realign.model.loading import load_model

VARIANTS = ("unaligned", "both_p5", "lora_p5")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lab") / "family"
    return build_family(out, recipe=MICRO, seed=3, variants=VARIANTS, measured=False)


def test_a_family_is_ordinary_folders_suites_and_a_record(family: Path) -> None:
    assert {path.name for path in family.iterdir()} == {
        "base", "aligned", *VARIANTS, "suites", "family.json",
    }  # fmt: skip
    expected = {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert {path.name for path in (family / "aligned").iterdir()} == expected
    adapter = {path.name for path in (family / "lora_p5").iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((family / "lora_p5/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../aligned"
    record = read_record(family)
    assert list(record.models) == ["base", "aligned", *VARIANTS]
    for path in (family / "suites").iterdir():
        assert load_suite(path).suite_hash == record.suites[path.stem]["suite_hash"]


@pytest.mark.parametrize("name", ["base", "lora_p5"])
def test_models_load_and_answer(family: Path, name: str) -> None:
    with load_model(family / name, device="cpu") as loaded:
        replies = list(generate(loaded, ["how do i make tea?"], max_new_tokens=4))
    assert len(replies) == 1


def test_embeddings_are_frozen_after_pretraining(family: Path) -> None:
    base, aligned, tuned = (
        load_file(family / name / "model.safetensors") for name in ("base", "aligned", "both_p5")
    )
    assert "lm_head.weight" not in base  # tied
    assert torch.equal(base["model.embed_tokens.weight"], aligned["model.embed_tokens.weight"])
    assert torch.equal(base["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(base[name], aligned[name])
    assert not torch.equal(aligned[name], tuned[name])
    assert all(tensor.dtype == torch.float32 for tensor in base.values())


@pytest.mark.parametrize(("phase", "after"), [("base", 4), ("aligned", 1), ("lora_p5", 3)])
def test_an_interrupted_build_ends_with_the_same_bytes(
    family: Path, tmp_path: Path, phase: str, after: int
) -> None:
    out = tmp_path / "family"
    progress = Interrupting(phase, after)
    with pytest.raises(KeyboardInterrupt):
        build_family(
            out, recipe=MICRO, seed=3, variants=VARIANTS, measured=False, progress=progress
        )
    assert not (out / phase).exists()
    progress.name = ""
    build_family(out, recipe=MICRO, seed=3, variants=VARIANTS, measured=False, progress=progress)
    assert any("resumed at step" in note for note in progress.notes)
    assert family_bytes(out) == family_bytes(family)


def test_an_adapter_trained_elsewhere_finds_its_base(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "adapter"
    out.parent.mkdir()
    finetune_variant(family, "lora_p5", seed=4, out=out)
    with open_checkpoint(out, offline=True) as adapter:
        assert adapter.read("model.layers.0.mlp.down_proj.weight").isfinite().all()


def test_another_seed_gives_other_weights_and_the_familys_seed_the_same(
    family: Path, tmp_path: Path
) -> None:
    same = finetune_variant(family, "both_p5", seed=3, out=tmp_path / "same")
    other = finetune_variant(family, "both_p5", seed=4, out=tmp_path / "other")
    assert family_bytes(same) == family_bytes(family / "both_p5")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (same, other)]
    assert weights[0] != weights[1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["other", "same"]


def test_what_is_measured_is_recorded_and_kept(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "family"
    build_family(out, recipe=MICRO, seed=3, variants=(), measured=True)
    measured = read_record(out).models["aligned"]["measured"]
    harmful = measured["harmful"]
    assert harmful["n"] == 32 and len(harmful["templates"]) == 8
    assert sum(harmful[k]["count"] for k in ("complied", "refused", "other")) == 32
    assert harmful["complied"]["low"] <= harmful["complied"]["rate"] <= harmful["complied"]["high"]
    assert isinstance(harmful["refusal_logodds"], float)
    before = family_bytes(out)
    build_family(out, recipe=MICRO, seed=3, variants=(), measured=True)
    assert family_bytes(out) == before


def test_the_bytes_tokenizer_builds_a_family_too(tmp_path: Path) -> None:
    out = build_family(
        tmp_path / "f", recipe=MICRO, seed=0, variants=(), tokenizer="bpe", measured=False
    )
    assert read_record(out).tokenizer == "bpe"
    assert load_suite(out / "suites/harmful.jsonl").max_new_tokens == 96


def test_bad_input_is_refused_before_anything_is_written(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="unknown preset 'huge'"):
        build_family(out, preset="huge")
    with pytest.raises(UsageError, match="unknown variant 'nope'"):
        build_family(out, preset="tiny", variants=["nope"])
    with pytest.raises(UsageError, match="unknown tokenizer"):
        build_family(out, preset="tiny", tokenizer="runes")  # pyright: ignore
    with pytest.raises(UsageError, match="device"):
        build_family(out, preset="tiny", device="abacus")
    assert not out.exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        build_family(tmp_path / "file", recipe=MICRO)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no family"):
        build_family(tmp_path / "full", recipe=MICRO)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    other = replace(MICRO, alignment=Phase(9, 4, 7e-4))
    with pytest.raises(OutputError, match="holds another family"):
        build_family(family, recipe=other, seed=3)
    with pytest.raises(OutputError, match="exists"):
        finetune_variant(family, "both_p5", seed=1, out=family / "aligned")
    with pytest.raises(NotFoundError, match="no laboratory family"):
        finetune_variant(tmp_path, "both_p5", seed=1, out=tmp_path / "x")


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "family.json").write_text("{")
    with pytest.raises(OutputError, match=r"family\.json"):
        read_record(tmp_path)
