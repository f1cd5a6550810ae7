"""The study goes on where it stopped, and proposes what one without a stop would have."""

from __future__ import annotations

from pathlib import Path

import pytest

from realign.errors import OutputError, UsageError
from realign.tune.folder import locked
from realign.tune.measure import Cost, Proxies, Rate, cost_of
from realign.tune.points import Trial, best_of, next_common, top_strength
from realign.tune.request import Limits
from realign.tune.strengths import Point
from realign.tune.study import StudyFile

LIMITS = Limits(utility_drop=0.05, over_refusal_rise=1.0, confidence=0.5)


def rate(kind: str, metric: str, bad: int, n: int = 100) -> Rate:
    return Rate(kind, metric, "/".join("1" * bad + "0" * (n - bad)))


FINETUNED = {"h": rate("harmful", "asr", 100), "t": rate("task", "error_rate", 10)}


def measured(number: int, point: Point) -> Trial:
    """A world in which the second group restores safety and the first one costs accuracy."""
    first, second = point[0], point[-1]
    rates = {
        "h": rate("harmful", "asr", round(100 * max(0.0, 1 - 0.8 * second - 0.1 * first))),
        "t": rate("task", "error_rate", 10 + round(10 * first)),
    }
    cost = cost_of(rates, FINETUNED, confidence=0.5)
    return Trial(number, point, Proxies(second, first), rates, cost)


def study(folder: Path, *, about: str = "x", groups: int = 2) -> StudyFile:
    folder.mkdir(exist_ok=True)
    return StudyFile(folder, about={"what": about}, limits=LIMITS, groups=groups, top=1.5)


def carry_on(file: StudyFile, trials: int) -> list[Point]:
    if file.finetuned is None:
        file.set_finetuned(FINETUNED)
    while len(known := file.trials()) < trials:
        point = file.propose(seed=3)
        assert point is not None
        file.add(file.begin(point), measured(len(known), point))
    return [trial.point for trial in file.trials()]


def test_a_study_in_parts_is_the_study_in_one(tmp_path: Path) -> None:
    whole = carry_on(study(tmp_path / "a"), 24)
    for stop in (1, 5, 13, 24):
        parts = carry_on(study(tmp_path / "b"), stop)
    assert parts == whole
    assert len(set(whole)) == len(whole), "no point twice"
    assert study(tmp_path / "b").trials() == study(tmp_path / "a").trials()
    # The sampler had a say, and it went where the world is good: little of the first group.
    best = best_of(study(tmp_path / "a").trials(), FINETUNED, LIMITS)
    assert best is not None and best.point[1] > best.point[0]


def test_a_killed_run_leaves_a_study_that_goes_on(tmp_path: Path) -> None:
    whole = carry_on(study(tmp_path / "a"), 8)
    carry_on(study(tmp_path / "b"), 5)
    journal = tmp_path / "b" / "study.journal"
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "worker')
    study(tmp_path / "b").begin((0.7, 0.7)).report(0, -1.0)  # in memory only
    assert carry_on(study(tmp_path / "b"), 8) == whole


def test_another_tuning_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    carry_on(study(tmp_path / "a"), 1)
    with pytest.raises(UsageError, match="differs in what"):
        study(tmp_path / "a", about="y")


def test_a_broken_journal_is_one_message(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "study.journal").write_text("not json\nat all\n")
    with pytest.raises(OutputError, match=r"study\.journal cannot be used"):
        study(folder)


def test_the_common_strength_is_bracketed() -> None:
    trials: list[Trial] = []
    while (t := next_common(trials, LIMITS, top=1.5)) is not None:
        trials.append(measured(len(trials), (t,)))
    looked_at = [trial.point[0] for trial in trials]
    # Accuracy falls by 10 points per unit, five are allowed: the border lies at 0.5 or 0.55.
    best = best_of(trials, FINETUNED, LIMITS)
    assert best is not None and best.point == (0.5,)
    assert looked_at == [1.0, 0.5, 0.75, 0.6, 0.55]


def test_where_nothing_breaks_the_top_is_taken() -> None:
    free = Limits(utility_drop=1.0, over_refusal_rise=1.0, confidence=0.5)
    trials: list[Trial] = []
    while (t := next_common(trials, free, top=1.5)) is not None:
        trials.append(measured(len(trials), (t,)))
    assert [trial.point[0] for trial in trials] == [1.0, 1.25, 1.5]


def test_best_is_safer_than_the_fine_tune_or_there_is_none() -> None:
    useless = Trial(
        0, (1.0,), Proxies(0.0, 0.0), FINETUNED, cost_of(FINETUNED, FINETUNED, confidence=0.5)
    )
    assert best_of([useless], FINETUNED, LIMITS) is None
    costly = measured(1, (1.0,))
    assert best_of([useless, costly], FINETUNED, LIMITS) is None
    good = measured(2, (0.4,))
    assert best_of([useless, costly, good], FINETUNED, LIMITS) is good


def test_costs_are_those_of_the_worst_suite() -> None:
    before = FINETUNED | {"u": rate("task", "error_rate", 50), "s": rate("safe", "refusal", 0, 50)}
    after = before | {
        "u": rate("task", "error_rate", 58),
        "s": rate("safe", "refusal", 1, 50),
        "h": rate("harmful", "asr", 20),
    }
    cost = cost_of(after, before, confidence=0.5)
    assert cost == Cost(0.2, pytest.approx(0.08), 0.02, pytest.approx(0.08), 0.02)
    assert not cost.within(LIMITS)
    held = Limits(utility_drop=0.08, over_refusal_rise=0.02)
    assert cost.within(held), "the limit itself holds"
    sure = cost_of(after, before, confidence=0.9)
    assert (sure.harm, sure.utility_drop) == (cost.harm, cost.utility_drop)
    assert not sure.within(held), "by its bound it does not"


def test_the_top_is_a_step_within_the_bound() -> None:
    assert top_strength(None, bound=float("inf")) == 1.5
    assert top_strength(None, bound=1.0) == 1.0
    assert top_strength(0.99, bound=1.0) == 0.95
    with pytest.raises(UsageError, match="at most 1"):
        top_strength(1.2, bound=1.0)


def test_a_folder_is_one_tunings_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "a"),
        pytest.raises(OutputError, match="another tuning"),
        locked(tmp_path / "a"),
    ):
        pass
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="not the folder of a tuning"), locked(tmp_path / "b"):
        pass
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["mine.txt"]
