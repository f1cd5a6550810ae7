"""The spectral and GPU benchmarks at toy size: their logic, not their figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu.__main__ import main as gpu_main  # noqa: E402
from benchmarks.gpu.__main__ import measure as measure_gpu  # noqa: E402
from benchmarks.gpu.__main__ import record as record_gpu  # noqa: E402
from benchmarks.gpu.shapes import Model  # noqa: E402
from benchmarks.spectra import edit_pass, family, naive, ranks, scan  # noqa: E402
from benchmarks.spectra.record import record  # noqa: E402
from benchmarks.spectra.synthetic import weights  # noqa: E402
from realign.subspace.spectrum import Spectrum  # noqa: E402


def test_every_rank_is_that_of_a_float64_svd() -> None:
    found = ranks.measure(scale=20, count=96)
    assert found["identical"] == found["matrices"] == 96
    assert found["decisions"] == 96 * 2 * len(ranks.RULES)
    kinds = {text.partition(", 2")[0] for text in found["suite"]}
    assert len({text.split(", ")[-1] for text in found["suite"]}) == len(ranks.DTYPES)
    assert len(kinds) >= 8


def test_a_wrong_spectrum_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: noise of one per cent moves some of these ranks."""
    exact = ranks.spectrum

    def coarse(m: torch.Tensor) -> Spectrum:
        noise = torch.randn(m.shape, generator=torch.Generator().manual_seed(0))
        return exact(m.float() * (1 + 0.01 * noise))

    monkeypatch.setattr(ranks, "spectrum", coarse)
    assert ranks.measure(scale=20, count=24)["identical"] < 24


@pytest.mark.parametrize("shape", [(40, 40), (24, 64), (64, 24)])
def test_the_edit_pass_meets_its_dense_reference(shape: tuple[int, int]) -> None:
    case = edit_pass.Case(*shape, tokens=300)
    found = edit_pass.agreement(case)
    assert found["within"], found
    assert found["relative_error_of_edit"] < 1e-5
    ours, _ = case.ours()
    script = case.naive()
    assert float((ours.float() - script.float()).abs().max()) < 1e-2 * float(script.abs().max())


def test_a_wrong_output_is_outside_of_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = edit_pass.Case(40, 40, tokens=300)
    edited, edit = case.ours()
    edited[3, 4] += 4 * edited[3, 4].abs().clamp(min=1e-3) * 2**-8
    monkeypatch.setattr(case, "ours", lambda: (edited, edit))
    assert not edit_pass.agreement(case)["within"]


def test_scan_and_script_compute_the_same_numbers() -> None:
    found = scan.measure_shape(48, 96, repeats=1)
    assert found["largest_difference"] < 1e-3
    assert scan.target_of("64x64") == 3.5 and scan.target_of("64x256") == 7.0
    assert scan.target_of("256x64") == 7.0 and scan.target_of("64x128") is None


def test_the_script_is_lssf() -> None:
    """At eta just below 1 the projector is the identity: the safety vector comes back whole."""
    family_of = weights(16, 16, seed=3, dtype=torch.float32)
    z = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    edited, rank = naive.lssf(z, family_of, eta=0.999999)
    expected = family_of.finetuned + family_of.aligned - family_of.unaligned
    assert rank == 16 and torch.allclose(edited, expected, atol=1e-5)


def test_the_family_benchmark_reads_and_scans(tmp_path: Path) -> None:
    shape = family.Shape(layers=2, hidden=64, ffn=96, kv=32, vocabulary=50)
    found = family.measure(shape, repeats=1, folder=tmp_path)
    assert found["matrices"] == 14
    params = sum(o * i for _, (o, i) in shape.matrices()) + 2 * 50 * 64 + 5 * 64
    assert found["bytes"] == 2 * 2 * params
    assert found["found"]["relative_distance"] == pytest.approx(0.05, rel=0.05)
    assert found["found"]["excess"] == pytest.approx(1.0, abs=0.3)
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_measured_has_no_verdict() -> None:
    empty = record({}, {})
    assert [target["met"] for target in empty["targets"]] == [None] * 4
    assert [target["measured"] for target in empty["targets"]] == [None] * 4
    found = ranks.measure(scale=12, count=8)
    (target,) = (t for t in record({"ranks": found}, {})["targets"] if t["measured"])
    assert target["what"].startswith("Rank decisions") and target["met"] is False  # 8 are too few


def test_the_gpu_benchmark_runs_on_any_device(tmp_path: Path) -> None:
    model = Model(hidden=32, ffn=48, heads=4, kv_heads=2)
    found = measure_gpu(
        model, torch.device("cpu"), layers=1, folder=tmp_path, tokens=300, repeats=1
    )
    assert max(found["agreement"].values()) == 0.0
    assert set(found["decompositions"]["shapes"]) == {"32x32", "16x32", "48x32", "32x48"}
    assert sum(r["count"] for r in found["decompositions"]["shapes"].values()) == 224
    result = record_gpu(found, "a device", {})
    assert result["targets"][0]["met"] is None
    assert "| all layers |" in result["section"]["markdown"]
    assert json.dumps(result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_main(["--into", str(tmp_path)]) == 0
    assert "not yet measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
