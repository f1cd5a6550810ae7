"""Points are broken off by optuna's pruner, for the right reason, where nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import optuna
from hypothesis import given, settings
from hypothesis import strategies as st

from realign.tune.measure import HARM, Proxies, Rate, cost_of, harm_of, least_excess
from realign.tune.points import Trial
from realign.tune.request import Limits
from realign.tune.search import look_at
from realign.tune.study import StudyFile

LIMITS = Limits(utility_drop=0.1, over_refusal_rise=1.0, confidence=0.5)
N = 40


def rates(harm: str, wrong: str) -> dict[str, Rate]:
    return {
        "h": Rate("harmful", "asr", "/".join(harm)),
        "t": Rate("task", "error_rate", "/".join(wrong)),
    }


FINETUNED = rates("1" * N, "0" * N)


class Model:
    """Stands for a scaled model with a meter: it knows its answers and counts what it is asked."""

    def __init__(self, refusal: float, distance: float, *, harm: int, wrong: int) -> None:
        self.answers = ("1" * harm + "0" * (N - harm), "1" * wrong + "0" * (N - wrong))
        self._refusal, self._distance = refusal, distance
        self.asked: list[str] = []

    def refusal(self) -> float:
        self.asked.append("refusal")
        return self._refusal

    def distance(self) -> float:
        self.asked.append("KL")
        return self._distance

    def ask(self) -> Iterator[tuple[int, Mapping[str, Rate]]]:
        harm, wrong = self.answers
        for turn in range(8):
            self.asked.append("costs" if turn < HARM else "harm")
            costs, harms = min(N, 10 * (turn + 1)), max(0, 10 * (turn + 1 - HARM))
            yield (
                turn,
                rates(
                    harm[:harms].ljust(N, "?"),
                    wrong[:costs].ljust(N, "?"),
                ),
            )


def look(file: StudyFile, point: float, model: Model) -> Trial:
    live, number = file.begin((point,)), len(file.trials())
    trial = look_at(
        live, model, FINETUNED, number=number, point=(point,), limits=LIMITS,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    file.add(live, trial)
    assert file.trials()[-1] == trial, "as it is read from the journal"
    return trial


def opened(folder: Path) -> StudyFile:
    file = StudyFile(folder, about={}, limits=LIMITS, groups=1, top=1.5)
    file.set_finetuned(FINETUNED)
    return file


def test_each_stage_breaks_off_and_later_ones_are_not_asked(tmp_path: Path) -> None:
    file = opened(tmp_path)
    kept = Model(1.0, 1.0, harm=8, wrong=4)
    assert look(file, 0.5, kept).pruned is None
    assert len(kept.asked) == 10
    slightly = Model(3.0, 1.5, harm=0, wrong=5)
    assert look(file, 0.75, slightly).pruned is None, "beyond the limit, though not clearly"

    costly = Model(4.0, 2.0, harm=0, wrong=30)
    trial = look(file, 1.25, costly)
    assert trial.pruned is not None and trial.pruned.stage == "costs"
    assert costly.asked.count("costs") == 1, "ten wrong answers of forty are more than 15 points"
    assert trial.rates is not None and trial.rates["t"].answered == 10 and trial.cost is None

    weaker = Model(0.9, 0.1, harm=0, wrong=0)
    pruned = look(file, 0.25, weaker).pruned
    assert pruned is not None and pruned.stage == "refusal" and "trial 1" in pruned.reason
    assert weaker.asked == ["refusal"]

    far = Model(4.0, 2.6, harm=0, wrong=0)
    pruned = look(file, 1.5, far).pruned
    assert pruned is not None and pruned.stage == "KL" and "trial 3" in pruned.reason
    assert far.asked == ["refusal", "KL"]

    harmful = Model(2.0, 1.0, harm=20, wrong=0)
    pruned = look(file, 0.6, harmful).pruned
    assert pruned is not None and pruned.stage == "harm" and "trial 1" in pruned.reason
    assert harmful.asked.count("harm") == 1


def test_optuna_knows_of_every_stage(tmp_path: Path) -> None:
    file = opened(tmp_path)
    look(file, 0.5, Model(1.0, 1.0, harm=8, wrong=4))
    look(file, 0.25, Model(0.9, 0.1, harm=0, wrong=0))
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(file.path))
    )
    (kept, pruned) = optuna.load_study(study_name="realign-tune", storage=storage).trials
    assert kept.state == optuna.trial.TrialState.COMPLETE
    assert [*kept.intermediate_values] == list(range(10))
    assert kept.intermediate_values[9] == 0.2 and kept.constraints == {"utility": 0.0}
    assert pruned.state == optuna.trial.TrialState.PRUNED
    assert pruned.intermediate_values == {0: -0.9}


@given(st.text("01", min_size=N, max_size=N), st.text("01", min_size=N, max_size=N), st.data())
@settings(max_examples=50, deadline=None)
def test_open_answers_never_make_a_point_look_worse_than_it_is(
    harm: str, wrong: str, data: st.DataObject
) -> None:
    whole = rates(harm, wrong)
    known = data.draw(st.integers(0, N))
    part = rates(harm[:known].ljust(N, "?"), wrong[:known].ljust(N, "?"))
    assert harm_of(part) <= harm_of(whole)
    excess = [least_excess(each, FINETUNED, LIMITS) for each in (part, whole)]
    assert excess[0] is not None and excess[1] is not None and excess[0] <= excess[1]
    cost = cost_of(whole, FINETUNED, confidence=0.5)
    assert cost.within(LIMITS) == (excess[1] <= 1e-9)
    assert Proxies(None, None).distance is None
