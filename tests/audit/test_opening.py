"""What an audit refuses before it loads a model: other architectures, NaN and infinity."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import realign
from realign.errors import MismatchError, NonFiniteError

FIXTURES = Path(__file__).parents[2] / "fixtures"
SUITE = FIXTURES / "small" / "suites" / "harmful.jsonl"


def test_a_reference_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        realign.audit(
            FIXTURES / "small" / "both_p5",
            reference=FIXTURES / "tiny" / "aligned",
            suites=[str(SUITE)],
            out=tmp_path / "out",
        )
    assert "num_hidden_layers" in caught.value.message
    assert "reference" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_nan_is_named_with_its_tensor_and_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(FIXTURES / "small" / "both_p5", broken)
    weights = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError) as caught:
        realign.audit(
            broken,
            reference=FIXTURES / "small" / "aligned",
            suites=[str(SUITE)],
            out=tmp_path / "out",
        )
    assert name in caught.value.message
    assert "model.safetensors" in caught.value.message
    assert not (tmp_path / "out").exists()
