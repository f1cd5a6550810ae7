"""The study: finished points in a journal file, and where to look next.

Only finished points are written, in one append each, so that an interruption at any moment leaves
a study that goes on where it stopped. A point under way lives in a copy of the study in memory,
where it reports to optuna and may be pruned. The next point depends on the points before it and the
seed alone: a study in two runs is the study in one. Here: optuna and its file. Not here: what a
point is worth (`measure`), when it is broken off (`pruning`), when the search ends (`search`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from realign.audit.canonical import canonical_json
from realign.errors import MissingExtraError, OutputError, UsageError
from realign.tune.folder import JOURNAL, drop_half_line
from realign.tune.measure import Proxies, Rate, cost_of
from realign.tune.points import Pruned, Trial, around, best_of, next_common, rounded
from realign.tune.request import STEP, Limits
from realign.tune.strengths import Point

if TYPE_CHECKING:
    import optuna

    from realign.tune.pruning import LimitsPruner

NAME = "realign-tune"


def require_optuna() -> Any:
    """The optuna module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise MissingExtraError("optuna", "tune") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


class StudyFile:
    """The journal of one study, in a folder that is locked while it is open."""

    def __init__(
        self,
        folder: Path,
        *,
        about: Mapping[str, Any],
        limits: Limits,
        groups: int,
        top: float,
    ) -> None:
        """Open or begin a study.

        Args:
            folder: exists; `locked` holds it.
            about: what the study depends on; another study in the same folder is refused.
            limits: what points are held to.
            groups: strengths per point.
            top: largest strength.

        Raises:
            UsageError: the folder holds a study of something else.
            OutputError: the journal cannot be read or written.
            MissingExtraError: optuna is not installed.
        """
        self._optuna = require_optuna()
        self._limits, self._groups, self._top = limits, groups, top
        self.path = folder / JOURNAL
        drop_half_line(self.path)
        try:
            self._study = self._open(about)
        except (OSError, ValueError, KeyError) as error:
            raise OutputError(
                f"{self.path} cannot be used: {error}", "choose another -o, or remove it"
            ) from error

    def _open(self, about: Mapping[str, Any]) -> optuna.Study:
        optuna = self._optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage = JournalStorage(JournalFileBackend(str(self.path), cast(Any, _HeldLock())))
        study = optuna.create_study(
            study_name=NAME, storage=storage, direction="minimize", load_if_exists=True
        )
        stored = cast("dict[str, Any] | None", study.user_attrs.get("about"))
        if stored is None:
            study.set_user_attr("about", dict(about))
        elif canonical_json(stored) != canonical_json(dict(about)):
            differing = sorted(k for k in {*stored, *about} if stored.get(k) != about.get(k))
            raise UsageError(
                f"{self.path} is the study of another tuning: it differs in {', '.join(differing)}",
                "choose another -o, or repeat the command that began it",
            )
        return study

    @property
    def finetuned(self) -> dict[str, Rate] | None:
        """The fine-tune's own rates on the tuning prompts, once they are known."""
        stored = self._study.user_attrs.get("finetuned")
        return None if stored is None else _rates(stored)

    def set_finetuned(self, rates: Mapping[str, Rate]) -> None:
        """Keep the fine-tune's own rates."""
        self._study.set_user_attr("finetuned", {name: vars(rate) for name, rate in rates.items()})

    @property
    def final_runs(self) -> int:
        """How often the held-out prompts have been looked at."""
        return int(self._study.user_attrs.get("final_runs", 0))

    def count_final_run(self) -> None:
        """Say that the held-out prompts are looked at once more."""
        self._study.set_user_attr("final_runs", self.final_runs + 1)

    def trials(self) -> list[Trial]:
        """Every finished point, in order."""
        base = self.finetuned
        found: list[Trial] = []
        for each in self._study.get_trials(deepcopy=False):
            stored = each.user_attrs
            rates = None if stored["rates"] is None else _rates(stored["rates"])
            pruned = None if stored["pruned"] is None else Pruned(**stored["pruned"])
            cost = None
            if pruned is None and rates is not None and base is not None:
                cost = cost_of(rates, base, confidence=self._limits.confidence)
            found.append(
                Trial(
                    number=each.number,
                    point=self._point(each.params),
                    proxies=Proxies(**stored["proxies"]),
                    rates=rates,
                    cost=cost,
                    pruned=pruned,
                )
            )
        return found

    def begin(self, point: Point) -> LiveTrial:
        """A point to look at; the journal hears of it when it is finished."""
        from realign.tune.pruning import LimitsPruner

        pruner = LimitsPruner()
        study = self._copy(pruner=pruner)
        study.enqueue_trial({_name(i): t for i, t in enumerate(point)})
        return LiveTrial(study, study.ask(self._space()), pruner)

    def add(self, live: LiveTrial, trial: Trial) -> None:
        """Append a finished point; its number is given by the order."""
        self._study.add_trial(live.finished(trial, self._limits))

    def propose(self, *, seed: int) -> Point | None:
        """The next point, one that has not been looked at.

        First a grid of strengths common to all groups, then the middle between the strongest of
        them that is within the limits and the next one that is not; with several groups, then the
        neighbours of the best point so far, and what the sampler makes of all that is known.

        Returns:
            None where there is nothing left to look at.
        """
        trials, limits = self.trials(), self._limits
        known = {trial.point for trial in trials}
        t = next_common(trials, limits, top=self._top)
        if t is not None:
            return (t,) * self._groups
        if self._groups == 1:
            return None
        best = None if self.finetuned is None else best_of(trials, self.finetuned, limits)
        if best is not None and min(best.point) >= self._top:
            return None  # anything else is less of the same
        for point in () if best is None else around(best.point, self._top):
            if point not in known:
                return point
        if len(known) >= round(self._top / STEP + 1) ** self._groups:
            return None
        optuna = self._optuna
        study = self._copy(
            sampler=optuna.samplers.TPESampler(seed=_seed(seed, len(known)), n_startup_trials=0)
        )
        for _ in range(200):
            asked = study.ask(self._space())
            point = self._point(asked.params)
            if point not in known and any(point):
                return point
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _copy(self, **options: Any) -> optuna.Study:
        """The finished points in memory: one that never is must leave no trace in the journal."""
        study = self._optuna.create_study(direction="minimize", **options)
        study.add_trials(self._study.get_trials(deepcopy=False))
        return study

    def _space(self) -> dict[str, Any]:
        distribution = self._optuna.distributions.FloatDistribution
        return {_name(i): distribution(0.0, self._top, step=STEP) for i in range(self._groups)}

    def _point(self, params: Mapping[str, float]) -> Point:
        return tuple(rounded(params[_name(i)]) for i in range(self._groups))


class LiveTrial:
    """A point under way: it reports stage by stage, and is broken off where that is hopeless."""

    def __init__(self, study: optuna.Study, trial: optuna.Trial, pruner: LimitsPruner) -> None:
        self._study, self._trial, self._pruner = study, trial, pruner

    def report(self, step: int, value: float) -> Pruned | None:
        """Tell optuna what a stage has found.

        Returns:
            Why to break off; None to go on.
        """
        from realign.tune.pruning import stage_of

        self._trial.report(value, step)
        if not self._trial.should_prune():
            return None
        return Pruned(stage_of(step), self._pruner.reason)

    def finished(self, trial: Trial, limits: Limits) -> optuna.trial.FrozenTrial:
        """The end of it, as optuna keeps it."""
        attributes: dict[str, Any] = {
            "proxies": vars(trial.proxies),
            "rates": None
            if trial.rates is None
            else {name: vars(rate) for name, rate in trial.rates.items()},
            "pruned": None if trial.pruned is None else vars(trial.pruned),
        }
        for name, value in attributes.items():
            self._trial.set_user_attr(name, value)
        if trial.cost is None:
            return self._study.tell(self._trial, state=_pruned())
        for name, value in trial.cost.excess(limits).items():
            self._trial.set_constraint(name, value)
        # A tenth of the cost decides between points of equal harm; choosing is done elsewhere,
        # this leads the sampler only.
        return self._study.tell(self._trial, trial.cost.harm + 0.1 * trial.cost.total)


def _pruned() -> optuna.trial.TrialState:
    return require_optuna().trial.TrialState.PRUNED


class _HeldLock:
    """A lock for optuna that does nothing: the folder is locked as a whole."""

    def acquire(self) -> bool:
        """Taken."""
        return True

    def release(self) -> None:
        """Given back."""


def _rates(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Rate]:
    return {name: Rate(**each) for name, each in stored.items()}


def _name(index: int) -> str:
    return f"t{index}"


def _seed(seed: int, count: int) -> int:
    digest = hashlib.sha256(f"{seed}|{count}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
