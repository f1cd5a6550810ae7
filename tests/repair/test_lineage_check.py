"""Swapped models are noticed by distance, by what names what, and by chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.repair_support import Trio

from realign.repair.lineage_check import distances
from realign.repair.plan import plan
from realign.repair.request import RepairRequest, open_inputs


def _doubts(trio: Trio, **changes: Path) -> tuple[str, ...]:
    given = {"finetuned": trio.finetuned, "aligned": trio.aligned, "base": trio.base, **changes}
    return plan(RepairRequest(**given, method="replace")).doubts


@pytest.fixture
def own(trio_of, tmp_path: Path) -> Trio:
    """A trio whose small files a test may change."""
    trio = trio_of("llama")
    for name in ("base", "aligned", "finetuned"):
        shutil.copytree(getattr(trio, name), tmp_path / name)
    return Trio(tmp_path / "base", tmp_path / "aligned", trio.unaligned, tmp_path / "finetuned")


def test_models_in_their_places_raise_no_doubt(trio_of) -> None:
    assert _doubts(trio_of("llama")) == ()


def test_swapped_models_are_told_by_distance(trio_of) -> None:
    trio = trio_of("llama")
    (doubt,) = _doubts(trio, aligned=trio.base, base=trio.aligned)
    assert "nearer to the base model than to the aligned one" in doubt
    assert doubt.endswith("are --aligned and --base swapped?")


def test_the_distances_are_those_of_the_whole_matrices_when_all_rows_are_read(trio_of) -> None:
    import torch
    from support.repair_support import read_folder

    trio = trio_of("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    request = RepairRequest(finetuned=trio.finetuned, aligned=trio.aligned, base=trio.base)
    with open_inputs(request) as inputs:
        others = inputs.others
        found = distances(inputs.finetuned, others["aligned"], others["base"], [name])
    f, a, b = (
        read_folder(folder)[name].double() for folder in (trio.finetuned, trio.aligned, trio.base)
    )
    for distance, other in zip(found, (a, b), strict=True):
        expected = torch.linalg.norm(f - other) / torch.linalg.norm(f)
        assert distance == pytest.approx(float(expected), rel=1e-12)


def _card(folder: Path, parent: object) -> None:
    (folder / "README.md").write_text(f"---\nbase_model: {parent}\n---\n")


def _config(folder: Path, parent: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_name_or_path": str(parent)}))


@pytest.mark.parametrize("say", [_card, _config])
def test_a_fine_tune_that_names_the_base(own: Trio, say) -> None:
    say(own.finetuned, own.base)
    (doubt,) = _doubts(own)
    assert f"names {own.base} as its parent" in doubt


@pytest.mark.parametrize("say", [_card, _config])
def test_a_base_that_names_the_aligned_model(own: Trio, say) -> None:
    say(own.base, "org/aligned")
    (doubt,) = _doubts(own)
    assert "the model given as base names org/aligned" in doubt


def test_a_family_that_names_its_parents_as_it_should(own: Trio) -> None:
    _card(own.finetuned, own.aligned)
    _config(own.finetuned, "org/aligned")
    _card(own.aligned, "org/base")
    _config(own.base, "org/base")
    assert _doubts(own) == ()


def test_a_chat_template_in_the_base_alone(own: Trio) -> None:
    (own.base / "chat_template.jinja").write_text("{{ messages }}")
    (doubt,) = _doubts(own)
    assert "only the model given as base has a chat template" in doubt
    (own.aligned / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert _doubts(own) == ()


def test_a_longer_vocabulary_is_no_hindrance(own: Trio) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = own.finetuned / "model.safetensors"
    tensors = load_file(file)
    name = "model.embed_tokens.weight"
    tensors[name] = torch.cat([tensors[name], torch.zeros(3, 32)])
    save_file(tensors, file, metadata={"format": "pt"})
    request = RepairRequest(finetuned=own.finetuned, aligned=own.aligned, base=own.base)
    with open_inputs(request) as inputs:
        others = inputs.others
        near, far = distances(inputs.finetuned, others["aligned"], others["base"], [name])
    assert 0 < near < far


def test_a_missing_tokenizer_is_noted(own: Trio) -> None:
    request = RepairRequest(
        finetuned=own.finetuned, aligned=own.aligned, base=own.base, method="replace"
    )
    assert any("holds no tokenizer" in note for note in plan(request).notes)
    (own.finetuned / "tokenizer.json").write_text("{}")
    assert not any("holds no tokenizer" in note for note in plan(request).notes)
