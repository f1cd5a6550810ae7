"""`realign tune` on the tiny family, through the real command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import family_options, model, realign, suite
from support.tune_support import SUITES, tiny_suites

from realign.report.pictures import to_svg
from realign.report.tune import tune_markdown
from realign.report.tune_pictures import front, tune_picture

OPTIONS: list[str | Path] = [
    *family_options(), "--device", "cpu", "--batch-size", "64", "--limit", "20",
]  # fmt: skip
for _name in SUITES:
    OPTIONS += ["--suite", suite(_name)]
REPLACE = ["--method", "replace", "--set", "rank=4"]
LOOSE = ["--max-utility-drop", "0.4", "--max-over-refusal-rise", "0.3"]
AS_IT_IS = ["--confidence", "0.5"]


def document(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tune.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tune") / "out"
    outcome = realign("tune", model(), *OPTIONS, *REPLACE, *LOOSE, "--trials", "3", "-o", out)
    assert outcome.exit_code == 0, outcome.stderr
    assert str(out / "repaired") in outcome.stdout
    return out


def test_finds_a_strength_that_removes_harm(done: Path, tmp_path: Path) -> None:
    found = document(done)
    assert found["status"] == "done"
    harmful = next(row for row in found["held_out"]["rows"] if row["kind"] == "harmful")
    assert harmful["rates"]["subject"]["rate"] >= 0.8
    assert harmful["rates"]["repaired"]["rate"] <= 0.2
    assert all(row["verdict"] == "met" for row in found["held_out"]["rows"])
    assert all(row["at_most"] > row["difference"] for row in found["held_out"]["rows"])
    # What is kept is what the same strength writes by hand.
    strength = found["chosen"]["strength"]
    by_hand = tmp_path / "by-hand"
    outcome = realign(
        "repair", model(), *family_options(), *REPLACE, "-t", str(strength), "--device", "cpu",
        "-o", by_hand,
    )  # fmt: skip
    assert outcome.exit_code == 0
    first, second = ((each / "model.safetensors") for each in (by_hand, done / "repaired"))
    assert first.read_bytes() == second.read_bytes()


def test_held_out_prompts_are_others(done: Path) -> None:
    found = document(done)
    audited = {
        json.loads(line)["item_id"]
        for line in (done / "held-out/items.jsonl").read_text().splitlines()
    }
    tuned = {
        item.id for each in tiny_suites(limit=20) for item in each.items if item.id not in audited
    }
    assert audited and tuned
    clusters = [{name.split("/")[1] for name in side} for side in (audited, tuned)]
    assert not clusters[0] & clusters[1], "an entity on both sides"
    for side, ids in (("held_out", audited), ("tuning", tuned)):
        assert sum(each["n"] for each in found["suites"][side]) == len(ids)


def test_the_report_stands_by_itself(done: Path) -> None:
    found = document(done)
    page = (done / "tune.html").read_text("utf-8")
    assert "<svg" in page and "Pareto front" in page
    assert "src=" not in page.replace('src="data:', "")
    assert (done / "tune.md").read_text("utf-8") == tune_markdown(found)
    assert (done / "tune.png").stat().st_size > 5000
    assert (done / "held-out" / "report.html").exists()
    figure = tune_picture(found)
    assert figure is not None
    assert to_svg(figure, label="x") == to_svg(tune_picture(found) or figure, label="x")


def test_a_tuning_that_is_done_is_left_alone(done: Path) -> None:
    before = (done / "tune.json").read_bytes()
    again = realign("tune", model(), *OPTIONS, *REPLACE, *LOOSE, "--trials", "5", "-o", done)
    assert again.exit_code == 2 and "this tuning is done" in again.words
    assert (done / "tune.json").read_bytes() == before


def test_infeasible_is_said_and_nothing_is_written(tmp_path: Path) -> None:
    # The whole way back to the aligned model loses the task; less of it restores nothing.
    out = tmp_path / "out"
    outcome = realign(
        "tune", model(), *OPTIONS, "--method", "wise_ft", "--max-utility-drop", "0", *AS_IT_IS,
        "--max-strength", "0.3", "--trials", "3", "--json", "-o", out,
    )  # fmt: skip
    found = outcome.json
    assert outcome.exit_code == 1, outcome.stderr
    assert found["status"] == "infeasible" and found["chosen"] is None
    assert found["output"] is None and not (out / "repaired").exists()
    assert "no strength looked at" in (out / "tune.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "needs suites"),
        (["--suite", suite("lookalikes")], "no harmful suite"),
        (["--suite", suite("harmful"), "--suite", suite("howto2")], "--max-over-refusal-rise 0.02"),
        (["--suite", suite("harmful"), "--suite", suite("lookalikes")], "--max-utility-drop 0.01"),
        ([*OPTIONS, "--trials", "0"], "--trials is 0"),
        ([*OPTIONS, *REPLACE, "--groups", "3"], "--groups 3: the repair edits 2 layers"),
        ([*OPTIONS, "--max-strength", "0"], "--max-strength is 0"),
        ([*OPTIONS, "--max-utility-drop", "2"], "--max-utility-drop is 2"),
        ([*OPTIONS, "--held-out", "1"], "--held-out is 1"),
        ([*OPTIONS, "--confidence", "0.4"], "--confidence is 0.4"),
        ([*OPTIONS, *REPLACE], "tuning prompts cannot show --max-"),
        ([*OPTIONS, *LOOSE, "--method", "resta", "--patch"], "is no LoRA patch"),
        ([*OPTIONS, *REPLACE, *LOOSE, "--judge", "logprob"], "the judge logprob needs a threshold"),
        ([*OPTIONS, "--final-suite", suite("harmful")], "(--final-suite safe=FILE)"),
        ([*OPTIONS, "--method", "replace", "--set", "rank=-1"], "rank = -1 is out of range"),
    ],
)
def test_bad_input_is_one_message(options: list[str | Path], words: str, tmp_path: Path) -> None:
    given = options if "--aligned" in options else [*family_options(), *options]
    outcome = realign("tune", model(), *given, "-o", tmp_path / "out")
    assert outcome.exit_code == 2
    assert words in outcome.words and "Traceback" not in outcome.stderr
    assert not (tmp_path / "out" / "repaired").exists()
    assert not (tmp_path / "out" / "study.journal").exists()


def test_without_optuna_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # what an import meets where it is missing
    outcome = realign("tune", model(), *OPTIONS, *REPLACE, "-o", tmp_path / "out")
    assert outcome.exit_code == 2 and not (tmp_path / "out").exists()
    assert "optuna is not installed" in outcome.words
    assert "pip install 'realign-llm[tune]'" in outcome.words


def test_the_fine_tune_belongs_to_the_front() -> None:
    def cost(harm: float, drop: float) -> dict[str, Any]:
        at_most = {"utility_at_most": drop + 0.01, "over_refusal_at_most": None}
        return {"harm": harm, "utility_drop": drop, "over_refusal_rise": None} | at_most

    def trial(number: int, harm: float, drop: float) -> dict[str, Any]:
        return {"number": number, "point": [1.0], "within": True, "cost": cost(harm, drop)}

    trials = [trial(0, 0.95, 0.02), trial(1, 0.5, 0.04)]  # the first one is worse than nothing
    found = {
        "search": {"finetuned": {"cost": cost(0.9, 0.0)}, "trials": trials},
        "limits": {"utility_drop": 1.0, "over_refusal_rise": 1.0},
        "chosen": None,
    }
    figure = tune_picture(found)
    assert figure is not None
    line = next(each for each in figure.axes[0].lines if each.get_label() == "Pareto front")
    assert list(line.get_xdata()) == pytest.approx([0.0, 4.0])
    assert list(line.get_ydata()) == pytest.approx([90.0, 50.0])


def test_the_front_keeps_what_nothing_beats() -> None:
    assert front([(0, 9), (1, 5), (1, 7), (2, 5), (3, 1), (0, 10)]) == [(0, 9), (1, 5), (3, 1)]
