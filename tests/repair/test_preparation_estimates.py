"""What a plan predicts of a preparation; measured in tests/slow/test_preparation_memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training_support import TINY, rows, write_rows

from realign.repair.demands import Measurement, ModelSize, TextSize
from realign.repair.plan import plan, plan_repair
from realign.repair.preparation import Statistics
from realign.repair.registry import build_method, find_method, method_names
from realign.repair.request import RepairRequest, open_inputs
from realign.repair.workbench import ModelWorkbench


def _request(folder: Path, method: str, **options: Any) -> RepairRequest:
    texts = write_rows(folder / "texts.jsonl", rows("order", 8))
    usual: dict[str, Any] = {
        "finetuned": TINY / "howto2_p5",
        "aligned": TINY / "aligned",
        "base": TINY / "base",
        "anchors": TINY / "suites" / "anchors.jsonl",
        "device": "cpu",
        **dict.fromkeys(("safe_data", "harmful_data", "keep_data", "task_data"), texts),
    }
    return RepairRequest(method=method, **{**usual, **options})


def _peak(folder: Path, method: str, **options: Any) -> int:
    return plan(_request(folder, method, **options)).estimate.peak_memory


RUNNING = ("forward", "gradients", "training")


@pytest.mark.parametrize(
    "name", [each for each in method_names() if find_method(each).cost_class in RUNNING]
)
def test_every_method_that_runs_a_model_is_predicted_to_hold_it(tmp_path: Path, name: str) -> None:
    method = build_method(name)
    assert bool(method.measures()) != method.trains
    settings = {"loss": "refusal"} if name == "somf" else {}
    assert _peak(tmp_path, name, settings=settings) > _peak(tmp_path, "wise_ft") + 150 * 2**20


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("safe_delta", {}),
        ("antidote", {}),
        ("nlsr", {}),
        ("lssf", {}),
        ("irr", {"keep_fraction": 0.0}),
        ("irr", {"keep_fraction": 0.5}),
        ("irr", {"keep_fraction": 0.5, "recalibrate": False}),
    ],
)
def test_what_is_declared_is_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    asked: set[Measurement] = set()

    def inputs(_: Any, *, role: str, diagonal: bool = False, **__: Any) -> Statistics:
        asked.add(Measurement(role, "diagonal" if diagonal else "inputs"))
        return Statistics()

    def outputs(_: Any, *, role: str, **__: Any) -> Statistics:
        asked.add(Measurement(role, "smaller"))
        return Statistics()

    def gradients(_: Any, *, role: str, **__: Any) -> dict[str, Any]:
        asked.add(Measurement(role, "gradients"))
        return {}

    monkeypatch.setattr(ModelWorkbench, "input_moments", inputs)
    monkeypatch.setattr(ModelWorkbench, "moments", outputs)
    monkeypatch.setattr(ModelWorkbench, "gradients", gradients)
    request = _request(tmp_path, name, settings=settings, cache_dir=tmp_path)
    with open_inputs(request) as opened:
        found = plan_repair(request, opened)
        found.method.prepare(ModelWorkbench(request, found, opened))
    assert asked == set(found.method.measures()) != set()


def test_statistics_that_decide_nothing_cost_nothing(tmp_path: Path) -> None:
    off: dict[str, Any] = {"keep_fraction": 0.0, "recalibrate": False}
    fisher = {"keep_fraction": 0.5, "recalibrate": False}
    peaks = [_peak(tmp_path, "irr", settings=each) for each in (off, fisher)]
    assert peaks[1] > peaks[0] + 100 * 2**20
    assert build_method("irr", off).measures() == ()


def test_read_block_by_block_less_is_held(tmp_path: Path) -> None:
    for name in ("lssf", "safe_delta", "nlsr", "antidote"):
        assert _peak(tmp_path, name, offload=True) <= _peak(tmp_path, name)


def test_trainings_grow_with_what_they_hold() -> None:
    sizes: dict[str, Any] = {
        "rows": 4096, "blocks": 4, "hidden": 64, "inner": 256, "vocabulary": 1000,
        "texts": dict.fromkeys(("safe", "harmful", "keep", "pairs"), TextSize(50, 2000, 60)),
    }  # fmt: skip
    small = ModelSize(model=10**6, edited=8 * 10**5, **sizes)
    large = ModelSize(model=3 * 10**6, edited=24 * 10**5, **sizes)
    for name, least in (
        ("one_shot", 8), ("safe_patching", 20), ("somf", 14), ("two_teachers", 16), ("q_realign", 4)
    ):  # fmt: skip
        method = build_method(name, {"granularity": "row"} if name == "somf" else {})
        more = method.training_bytes(large) - method.training_bytes(small)
        assert more >= least * 10**6, name
    elements = build_method("somf", {"granularity": "element"})
    by_row = build_method("somf", {"granularity": "row"})
    assert elements.training_bytes(large) > by_row.training_bytes(large) + 20 * 10**6
    both = build_method("safe_patching", {"beta": 0.5})
    assert both.training_bytes(large) > build_method("safe_patching").training_bytes(large)
    tuned = build_method("one_shot", {"mode": "sft"})
    assert tuned.training_bytes(large) > build_method("one_shot").training_bytes(large) + 3 * 10**7


def test_anchors_stand_in_for_refusals() -> None:
    anchors = {"anchors": TextSize(20, 2000, 190)}
    size = ModelSize(
        model=1, edited=1, rows=1, blocks=1, hidden=1, inner=1, vocabulary=1, texts=anchors
    )
    assert size.batch("safe", 16) == 16 * 190 and size.batch("keep", 16) == 0
    assert size.batch("safe", 64) == 20 * 190


def test_models_that_run_are_read_once_more(tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in (TINY / "aligned").glob("*.safetensors"))

    def read(name: str) -> int:
        return plan(_request(tmp_path, name)).estimate.read

    assert read("safe_delta") - read("wise_ft") == pytest.approx(size, rel=0.02)
    assert read("lssf") - read("replace") == pytest.approx(size, rel=0.02)
