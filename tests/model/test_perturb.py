"""A running model moved through weight space: exact ends, exact return, nothing else touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.model_support import llama, qwen2, word_tokenizer
from torch import Tensor

from realign.errors import MismatchError
from realign.model.loading import LoadedModel, load_model, wrap_model
from realign.model.perturb import Point, Read, StoredWeights, moved, parameters
from realign.subspace.directions import perturbed, random_direction

FAMILY = Path(__file__).parents[2] / "fixtures" / "tiny"


def _noise(name: str, read: Read) -> Tensor:
    return random_direction(name, read("subject", name), seed=0)


def _running(model: Any) -> LoadedModel:
    return wrap_model(model, word_tokenizer())


def _copy(loaded: LoadedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in parameters(loaded).items()}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8))
        for name, tensor in one.items()
    )


def test_after_a_sweep_the_weights_are_those_of_the_file(tmp_path: Path) -> None:
    stored = StoredWeights(tmp_path)
    with load_model(FAMILY / "base", device="cpu") as base:
        stored.add("base", base)
        of_base = _copy(base)
    subject = load_model(FAMILY / "aligned", device="cpu")
    stored.add("subject", subject)
    seen: list[bool] = []
    with moved(subject, stored, back_to="subject") as go:
        go(Point("a", {"subject": 1.0}, ((0.5, _noise),)))
        seen.append(_same(parameters(subject), of_base))
        go(Point("b", {"subject": 0.3, "base": 0.7}))
        # From the reference (here the subject), alpha = -1 along reference - base is the base.
        go(Point("c", {"subject": 1.0 + -1.0, "base": 1.0}))
        seen.append(_same(parameters(subject), of_base))
    assert seen == [False, True]
    with load_model(FAMILY / "aligned", device="cpu") as again:
        assert _same(parameters(subject), parameters(again))
        names = dict(again.model.named_buffers())
        assert all(torch.equal(b, names[n]) for n, b in subject.model.named_buffers())


def test_the_weights_come_back_when_a_measurement_fails(tmp_path: Path) -> None:
    loaded = _running(llama())
    stored = StoredWeights(tmp_path)
    stored.add("subject", loaded)
    before = _copy(loaded)
    with (
        pytest.raises(KeyboardInterrupt),
        moved(loaded, stored, back_to="subject") as go,
    ):
        go(Point("a", {"subject": 1.0}, ((1e30, _noise),)))
        raise KeyboardInterrupt
    assert _same(parameters(loaded), before)


def test_random_directions_leave_norms_and_their_lengths_alone(tmp_path: Path) -> None:
    loaded = _running(qwen2())
    stored = StoredWeights(tmp_path)
    stored.add("subject", loaded)
    before = _copy(loaded)
    with moved(loaded, stored, back_to="subject") as go:
        go(Point("a", {"subject": 1.0}, ((-0.25, _noise),)))
        for name, tensor in parameters(loaded).items():
            moved_by = float((tensor - before[name]).norm())
            wanted = 0.25 * float(before[name].norm()) if perturbed(name) else 0.0
            assert moved_by == pytest.approx(wanted, rel=1e-4, abs=1e-6), name
    assert any("norm" in name for name in before)


def test_tied_weights_move_once(tmp_path: Path) -> None:
    model = llama().requires_grad_(False)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    loaded = _running(model)
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head.weight is not embedding.weight:
        head.weight = embedding.weight
    stored = StoredWeights(tmp_path)
    stored.add("subject", loaded)
    before = embedding.weight.clone()
    with moved(loaded, stored, back_to="subject") as go:
        go(Point("a", {"subject": 1.0}, ((0.5, _noise),)))
        assert float((embedding.weight - before).norm()) == pytest.approx(
            0.5 * float(before.norm()), rel=1e-4
        )
        assert head.weight is embedding.weight


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    stored = StoredWeights(tmp_path)
    stored.add("reference", _running(llama()))
    with pytest.raises(MismatchError, match=r"embed_tokens.weight is \[50, 24\] in the subject"):
        stored.add("subject", _running(llama(vocabulary=50)))
