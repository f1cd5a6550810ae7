"""Q-realign as a method: what one matrix becomes, its control, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.model_support import llama
from support.quantise_support import opened, save_pair
from torch import Tensor

from realign.errors import UsageError
from realign.repair.edit import Dense, Layer, Unchanged
from realign.repair.methods.q_realign import QRealign
from realign.repair.preparation import Statistics
from realign.subspace.quantiser import row_grid

KEY = "w"
QUICK = {"prompts": 16, "epochs_first": 1, "epochs_rest": 1, "bits": 4}


def layer_of(weight: Tensor) -> Layer:
    return Layer(key=KEY, module="q_proj", layer=0, finetuned=weight, aligned=weight)


def statistics(**tables: Tensor) -> Statistics:
    return Statistics(tables={name: {KEY: value} for name, value in tables.items()})


def weight_of(rows: int = 6, columns: int = 8) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("factor", "expected"), [(1.0, (-1, 0, 1, 2)), (0.5, (-0.5, 0, 1, 1))])
def test_the_hand_example_as_an_edit(factor: float, expected: tuple[float, ...]) -> None:
    row = torch.tensor([[-1.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    each = torch.tensor([factor], dtype=torch.float64)
    edit = QRealign(bits=2).edit(layer_of(row), statistics(high=each, low=each))
    if factor == 1.0:
        assert isinstance(edit, Unchanged)  # it stands on the grid
    else:
        assert isinstance(edit, Dense) and edit.target is not None
        assert edit.target.tolist() == [list(expected)]
        assert torch.equal(edit.delta, edit.target - row)


def test_sixteen_bits_without_clipping_stay_within_a_step() -> None:
    weight = weight_of()
    edit = QRealign(bits=16, clip=False).edit(layer_of(weight), statistics())
    assert isinstance(edit, Dense) and edit.target is not None
    step = row_grid(weight, high=1.0, low=1.0, bits=16).step
    assert ((edit.target - weight).abs() <= step).all()


def test_smoothing_is_folded_back() -> None:
    # Eight bits of W diag(v), divided by v again: no entry is further away than its own step.
    weight, v = weight_of(), torch.linspace(0.2, 5.0, 8)
    edit = QRealign(clip=False).edit(layer_of(weight), statistics(smooth=v))
    assert isinstance(edit, Dense) and edit.target is not None
    step = row_grid(weight * v, high=1.0, low=1.0, bits=8).step
    assert ((edit.target - weight).abs() <= step / v * 1.001).all()
    unsmoothed = QRealign(clip=False).edit(layer_of(weight), statistics())
    assert isinstance(unsmoothed, Dense) and unsmoothed.target is not None
    assert not torch.equal(edit.target, unsmoothed.target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_target_is_in_the_type_of_the_file(dtype: torch.dtype) -> None:
    edit = QRealign().edit(layer_of(weight_of().to(dtype)), statistics())
    assert isinstance(edit, Dense) and edit.target is not None and edit.target.dtype == dtype
    assert edit.delta.dtype == torch.float32


def test_the_control_edits_nothing_and_names_itself(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench:
        method = QRealign(**{**QUICK, "quantise": False})
        found = method.prepare(bench)
        assert found.facts["control_error"] <= 1e-5
        for layer in bench.layers():
            edit = method.edit(layer, found)
            assert isinstance(edit, Unchanged)
            assert "this run is the control" in edit.reason and "measured" in edit.reason


def test_the_training_reaches_every_matrix(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench:
        method = QRealign(**QUICK)
        found = method.prepare(bench)
        edits = {key: method.edit(bench.layer(key), found) for key in bench.slots}
        assert bench.made == 1
    for key, edit in edits.items():
        assert isinstance(edit, Dense), key
        assert edit.facts["bits"] == 4 and 0.5 < float(edit.facts["clip_high"] or 0) < 1.0
    assert found.facts["malicious_prompts"] == 12 and found.facts["benign_prompts"] == 4
    for name in ("malicious_side_before", "malicious_side_after", "probe_accuracy"):
        assert 0.0 <= float(found.facts[name] or 0) <= 1.0


def test_plain_rounding_needs_no_training(tmp_path: Path) -> None:
    with opened(save_pair(tmp_path, llama())) as bench:
        method = QRealign(**{**QUICK, "clip": False, "smooth": False})
        found = method.prepare(bench)
    assert not {"high", "low", "smooth", "norm"} & set(found.tables)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 1},
        {"bits": 17},
        {"malicious_share": 1.0},
        {"prompts": 3},
        {"epochs_first": 0},
        {"clip": "yes"},
        {"probe_strength": 0.0},
        {"quantise": False, "smooth": False},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        QRealign(**settings)  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_official_code() -> None:
    found = QRealign().settings()
    assert found == {
        "bits": 8,
        "quantise": True,
        "clip": True,
        "smooth": True,
        "prompts": 200,
        "malicious_share": 0.75,
        "length": 128,
        "epochs_first": 5,
        "epochs_rest": 15,
        "clip_rate": 1e-2,
        "smooth_rate": 1e-3,
        "probe_strength": 1.0,
    }
