"""--offload in a plan: where it holds, where it is refused, where it means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training_support import TINY, rows, write_rows

from realign.errors import UsageError
from realign.model.loading import load_model
from realign.repair import rendered
from realign.repair.plan import plan, plan_repair
from realign.repair.registry import find_method, method_names
from realign.repair.request import RepairRequest, open_inputs
from realign.repair.workbench import ModelWorkbench


def _request(folder: Path, method: str, **options: Any) -> RepairRequest:
    texts = {
        "harmful_data": write_rows(folder / "harmful.jsonl", rows("order", 8)),
        "keep_data": write_rows(folder / "keep.jsonl", rows("order", 8)),
    }
    usual: dict[str, Any] = {
        "finetuned": TINY / "howto2_p5",
        "aligned": TINY / "aligned",
        "base": TINY / "base",
        "anchors": TINY / "suites" / "anchors.jsonl",
        "cache_dir": folder / "cache",
        "device": "cpu",
        "offload": True,
    }
    return RepairRequest(method=method, **{**usual, **texts, **options})


TRAINING = ("one_shot", "q_realign", "safe_patching", "somf", "two_teachers")


def test_methods_that_train_are_known() -> None:
    assert {name for name in method_names() if find_method(name).trains} == set(TRAINING)


@pytest.mark.parametrize("method", TRAINING)
def test_a_model_that_is_trained_cannot_be_read_block_by_block(tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"settings": {"loss": "refusal"} if method == "somf" else {}}
    if method == "two_teachers":
        options["task_data"] = write_rows(tmp_path / "task.jsonl", rows("order", 8))
    with pytest.raises(UsageError, match=f"^{method} trains .* --offload cannot") as raised:
        plan(_request(tmp_path, method, **options))
    assert "leave --offload out" in raised.value.hint
    assert raised.value.exit_code == 2
    plan(_request(tmp_path, method, **options, offload=False))


@pytest.mark.parametrize(
    ("method", "settings"),
    [("wise_ft", {}), ("safe_lora", {}), ("irr", {"keep_fraction": 0.0, "recalibrate": False})],
)
def test_a_method_that_runs_no_model_says_so(tmp_path: Path, method: str, settings: Any) -> None:
    found = plan(_request(tmp_path, method, settings=settings))
    line = f"{method} runs no model with these settings: --offload is not used"
    assert [note for note in found.notes if "--offload" in note] == [line]


def test_a_method_that_measures_takes_it_without_a_word(tmp_path: Path) -> None:
    found = plan(_request(tmp_path, "lssf"))
    assert found.offload and not any("--offload" in note for note in found.notes)


def test_open_rows_are_answered_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_rows(tmp_path / "task.jsonl", [{"prompt": r["prompt"]} for r in rows("order", 5)])
    seen: list[bool] = []

    def watched(*args: Any, **options: Any) -> Any:
        loaded = load_model(*args, **options)
        seen.append(loaded.offloaded)
        return loaded

    monkeypatch.setattr(rendered, "load_model", watched)
    found: list[Any] = []
    for offload in (False, True):
        request = _request(
            tmp_path,
            "irr",
            settings={"keep_fraction": 0.0},
            task_data=task,
            offload=offload,
            cache_dir=tmp_path / str(offload),
        )
        (tmp_path / str(offload)).mkdir()
        with open_inputs(request) as inputs:
            bench = ModelWorkbench(request, plan_repair(request, inputs), inputs)
            found.append(bench.examples("task", role="finetuned"))
    assert seen == [False, True]
    assert found[0] == found[1] and len(found[0]) == 5
