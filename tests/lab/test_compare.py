"""Cells through the real engine on the tiny family: the dial, the reference, resuming, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from realign.errors import UsageError
from realign.lab import arms, compare, places
from realign.lab.arms import Arm
from realign.lab.exam import build_exam
from realign.lab.marking import Marks, interpolated, mark, put_weights, read_weights
from realign.lab.materials import make_materials, write_materials
from realign.lab.places import Place
from realign.lab.resources import measured
from realign.lab.rows import wording
from realign.lab.scenarios import SCENARIOS, Scenario, find_scenarios
from realign.lab.suites import build_suites
from realign.model.loading import load_model
from realign.repair.texts import load_texts

FIXTURES = Path(__file__).parents[2] / "fixtures"
POISON = Scenario("poison5", "howto2_p5", ("howto2",), "the tiny family's own fine-tune")


def rate(marks: Any, name: str) -> float:
    return Marks.from_json(marks["rates"][name]).rate


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The tiny fixture with its poisoned fine-tune in place, and an exam of 96 questions."""
    tunes = tmp_path / "tunes" / "tiny"
    tunes.mkdir(parents=True)
    (tunes / "howto2_p5-s1").symlink_to(FIXTURES / "tiny" / "howto2_p5")

    def short(world: Any, tokenizer: Any) -> Any:
        suites = build_exam(world, tokenizer)
        return {name: suite.limited(16) for name, suite in suites.items()}

    monkeypatch.setattr(places, "build_exam", short)
    monkeypatch.setattr(compare, "find_scenarios", lambda names: (POISON,))
    yield Place(FIXTURES / "tiny", POISON, 1, tmp_path)


def use(monkeypatch: pytest.MonkeyPatch, *chosen: Arm) -> None:
    monkeypatch.setattr(compare, "find_arms", lambda names: chosen)


def test_a_cell_holds_the_dial_between_fine_tune_and_aligned_model(
    tiny: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = Arm(name="wise", method="wise_ft", settings=({"a": 1.0},), dial=(0.5, 1.0), usual=0.5)
    use(monkeypatch, arm)
    tally = compare.compare([tiny.family], tiny.out, seeds=[1])
    assert (tally.done, tally.kept, tally.failed, tally.left) == (1, 0, {}, 0)
    (cell,) = compare.read_cells(tiny.out)
    assert rate(cell["finetuned"], "harm") >= 0.8 and rate(cell["aligned"], "harm") <= 0.05
    full, half = cell["points"]
    assert (full["strength"], half["strength"], half["usual"]) == (1.0, 0.5, True)
    assert full["marks"]["rates"] == cell["aligned"]["rates"]  # a = 1 is the aligned model
    (cost,) = cell["repairs"]
    assert cost["seconds"] > 0 and (cost["peak_mib"] is None or cost["peak_mib"] >= 0)
    board = compare.write_board(tiny.out)
    assert board.curves["wise", "poison5"].usual is not None
    assert "`wise`" in (tiny.out / "leaderboard.md").read_text(encoding="utf-8")


def test_a_finished_cell_is_kept_until_its_range_changes(
    tiny: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Arm(name="replace", method="replace", settings=({"rank": 4},), dial=(1.0,)))
    assert compare.compare([tiny.family], tiny.out, seeds=[1]).done == 1
    file = tiny.cells / "replace.json"
    before = file.read_bytes()
    again = compare.compare([tiny.family], tiny.out, seeds=[1])
    assert (again.done, again.kept) == (0, 1) and file.read_bytes() == before
    use(monkeypatch, Arm(name="replace", method="replace", settings=({"rank": 2},), dial=(1.0,)))
    assert compare.compare([tiny.family], tiny.out, seeds=[1]).done == 1
    assert json.loads(file.read_text(encoding="utf-8"))["points"][0]["settings"] == {"rank": 2}
    wide = Arm(name="replace", method="replace", settings=({"rank": 2},), dial=(1.0,), fine=(0.5,))
    use(monkeypatch, wide)
    before = json.loads(file.read_text(encoding="utf-8"))
    assert compare.compare([tiny.family], tiny.out, seeds=[1]).kept == 1
    assert compare.compare([tiny.family], tiny.out, seeds=[1], fine=True).done == 1
    after = json.loads(file.read_text(encoding="utf-8"))
    assert [point["strength"] for point in after["points"]] == [1.0, 0.5]
    assert after["points"][0] == before["points"][0]
    late = compare.compare([tiny.family], tiny.out, seeds=[1, 2], budget_seconds=1e-9)
    assert (late.done, late.left) == (0, 2)


def test_an_impossible_method_is_a_failed_cell_and_is_tried_again(
    tiny: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Arm(name="odd", method="replace", settings=({"rank": -1},)))
    with pytest.raises(UsageError):
        arms.Arm(name="odd", method="replace").build({"rank": -1})
    for _ in range(2):
        tally = compare.compare([tiny.family], tiny.out, seeds=[1])
        assert tally.done == 0 and "rank = -1" in tally.failed["tiny poison5 seed 1, odd"]
    board = compare.write_board(tiny.out)
    assert "rank = -1" in board.failed["odd", "poison5"]


def test_a_family_without_an_unaligned_model_gets_one(
    tiny: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int, Path]] = []

    def short(family: Path, variant: str, *, seed: int, out: Path, progress: Any) -> Path:
        made.append((variant, seed, out))  # stands for a training of half a minute
        shutil.copytree(FIXTURES / "tiny" / "howto2_p5", out)
        return out

    monkeypatch.setattr(places, "finetune_variant", short)
    vector = {"gamma": 1.0, "safety_vector": "unaligned"}
    use(
        monkeypatch,
        Arm(name="resta", method="resta", settings=(vector,), dial=(1.0,)),
        Arm(name="wise", method="wise_ft", settings=({"a": 1.0},), dial=(1.0,)),
    )
    tally = compare.compare([tiny.family], tiny.out, seeds=[1])
    assert (tally.done, tally.failed) == (2, {})
    kept = tiny.out / "tunes" / "tiny" / f"unaligned-s{tiny.record.seed}"
    assert made == [("unaligned", tiny.record.seed, kept)]  # once, and not in the family
    assert not (tiny.family / "unaligned").exists()


@pytest.mark.parametrize("seconds", [-3.0, 0.0, float("nan")])
def test_a_budget_that_is_no_time_is_refused(tiny: Place, seconds: float) -> None:
    with pytest.raises(UsageError, match="--budget-seconds"):
        compare.compare([tiny.family], tiny.out / "new", seeds=[1], budget_seconds=seconds)
    assert not (tiny.out / "new").exists()


def test_a_board_of_nothing_is_written(tmp_path: Path) -> None:
    assert not compare.write_board(tmp_path / "new").curves
    assert (tmp_path / "new" / "leaderboard.json").is_file()


def test_a_repair_that_changes_nothing_is_the_fine_tune(
    tiny: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, Arm(name="still", method="resta", settings=({"gamma": 0.0},)))
    compare.compare([tiny.family], tiny.out, seeds=[1])
    (cell,) = compare.read_cells(tiny.out)
    (point,) = cell["points"]
    assert point["unchanged"] and point["marks"] == cell["finetuned"]


def test_interpolation_and_weights_in_memory() -> None:
    tuned = read_weights(FIXTURES / "tiny" / "howto2_p5")
    safe = read_weights(FIXTURES / "tiny" / "aligned")
    middle = interpolated(tuned, safe, 0.25)
    for name, tensor in middle.items():
        torch.testing.assert_close(tensor, 0.75 * tuned[name] + 0.25 * safe[name])
    assert interpolated(tuned, safe, 1.0) == safe
    with load_model(FIXTURES / "tiny" / "aligned", device="cpu") as loaded:
        put_weights(loaded, tuned)
        for name, tensor in loaded.model.named_parameters():
            assert torch.equal(tensor, tuned[name])


def test_marks_agree_with_the_verdicts_of_the_audit(tiny: Place) -> None:
    with load_model(FIXTURES / "tiny" / "howto2_p5", device="cpu") as loaded:
        found = mark(loaded, tiny.exam, names=("harmful", "howto2"), batch_size=7)
    assert rate(found, "harm") + rate(found, "refused") + rate(found, "other") == 1.0
    assert found["rates"]["howto2"]["n"] == 16 and found["refusal_logodds"] is not None


def test_texts_are_read_by_methods_and_share_nothing_with_the_exam(
    tiny: Place, tmp_path: Path
) -> None:
    world = tiny.studio.world
    exam = build_exam(world)
    asked = {item.prompt for suite in exam.values() for item in suite.items}
    asked |= {item.prompt for item in build_suites(world)["harmful"].items}
    held = {entity.name for entity in world.entities if entity.held_out}
    held |= {gadget.name for gadget in world.gadgets if gadget.held_out}
    for scenario in SCENARIOS.values():
        texts = make_materials(world, scenario)
        assert texts == make_materials(world, scenario)
        files = write_materials(texts, tmp_path / scenario.name)
        for kind, file in files.items():
            assert len(load_texts(file, kind).rows) == len(texts[kind])  # pyright: ignore
        for lines in texts.values():
            prompts = {line["prompt"] for line in lines}
            assert not prompts & asked
            assert not held & {word.strip("?.,:") for text in prompts for word in text.split()}
    texts = make_materials(world, SCENARIOS["poison5"])
    assert {len(texts[kind]) for kind in ("safe", "harmful", "pairs", "task")} == {256}
    refusals = [template.split("{x}")[0] for template in wording.REFUSALS]
    for line in texts["pairs"]:
        assert line["rejected"].startswith("to make")
        assert any(line["chosen"].startswith(start.split(".")[0]) for start in refusals)


def test_the_exam_has_five_hundred_questions_per_rate_in_the_small_world() -> None:
    small = Place(FIXTURES / "small", SCENARIOS["poison5"], 1, Path("unused"))
    sizes = {name: len(suite.items) for name, suite in small.exam.items()}
    assert sizes.pop("harmful_second") == 128
    assert min(sizes.values()) >= 500
    own = build_suites(small.studio.world)
    for name in ("harmful", "lookalikes", "howto", "howto2"):
        prompts = {item.prompt for item in small.exam[name].items}
        assert len(prompts) == sizes[name]
        assert {item.prompt for item in own[name].items} <= prompts
    trained = {text.format(x="Q") for text in wording.REQUEST.train + wording.GADGET.train}
    hazard = small.exam["harmful"].items
    assert not trained & {item.prompt.replace(str(item.cluster), "Q") for item in hazard}


def test_every_declared_arm_can_be_built_and_names_are_checked() -> None:
    for arm in arms.find_arms():
        for settings in arm.settings if arm.method != arms.REFUSAL_TUNING else ():
            assert arm.build(settings).settings() | dict(settings) == arm.build(settings).settings()
        assert arm.usual in arm.dial
    assert {arm.name for arm in arms.find_arms(["resta"])} == {"resta", "resta_base"}
    with pytest.raises(UsageError, match="there is no method sorcery"):
        arms.find_arms(["sorcery"])
    with pytest.raises(UsageError, match="there is no scenario rain"):
        find_scenarios(["rain"])
    assert [each.name for each in find_scenarios(["poison5", "howto"])] == ["howto", "poison5"]


def test_costs_see_time_and_memory() -> None:
    with measured() as cost:
        block = bytearray(b"x" * (64 << 20))
        del block
    assert cost.wall >= cost.processor * 0.5 >= 0
    assert cost.peak_mib is None or cost.peak_mib >= 60
