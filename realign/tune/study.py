"""The study: finished points in a journal file, and where to look next.

Only finished points are written, in one append each, so that an interruption at any moment leaves
a study that goes on where it stopped. The next point depends on the points before it and the seed
alone: a study in two runs is the study in one. Here: optuna and its file. Not here: what a point
is worth (`measure`), when the search ends (`search`).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from realign.audit.canonical import canonical_json
from realign.errors import MissingExtraError, OutputError, UsageError
from realign.tune.measure import Cost, Proxies, Rate, cost_of
from realign.tune.request import MAX_STRENGTH, STEP, Limits
from realign.tune.strengths import Point

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"
LOCK = ".tune.lock"
NAME = "realign-tune"
GRID = (1.0, 0.5, 0.25, 0.75, 1.25, 1.5)
"""Strengths common to all groups that every study looks at first."""
MOVES = (0.2, 0.1)
"""By how much single groups are turned up or down around the best point."""


@dataclass(frozen=True)
class Trial:
    """One finished point."""

    number: int
    point: Point
    proxies: Proxies
    rates: Mapping[str, Rate] | None
    """None where the proxies left nothing to hope for."""
    cost: Cost | None
    skipped: str = ""
    """Why nothing was generated."""


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


def grid_of(top: float) -> tuple[float, ...]:
    """The global strengths that every study looks at first."""
    known = [t for t in GRID if t <= top]
    return tuple(known) if top in known else (*known, top)


def next_common(trials: Sequence[Trial], limits: Limits, *, top: float) -> float | None:
    """The next strength common to all groups.

    Sought is the strongest one within the limits: nothing below such a one is looked at, nor above
    the first one beyond it that is not. In between the grid goes first, then the middle.

    Args:
        trials: what is known.
        limits: what decides.
        top: largest strength.

    Returns:
        None where the border is known to a step.
    """
    common = {trial.point[0]: trial for trial in trials if len(set(trial.point)) == 1}
    kept = [t for t, each in common.items() if each.cost is not None and each.cost.within(limits)]
    low = max(kept, default=0.0)
    high = min((t for t in common if t > low), default=None)
    for t in grid_of(top):
        if t > low and (high is None or t < high):
            return t
    if high is None:
        return None
    middle = _rounded((low + high) / 2)
    return middle if low < middle < high else None


def _around(best: Point, top: float) -> Iterator[Point]:
    """The best point with one group turned up; then with another one turned down for it."""
    indices = range(len(best))
    for size in MOVES:
        for up in indices:
            for down in (None, *indices):
                moved = list(best)
                moved[up] = min(top, moved[up] + size)
                if down is not None:
                    moved[down] = max(0.0, moved[down] - size)
                point = tuple(map(_rounded, moved))
                if down != up and any(point):
                    yield point


def top_strength(asked: float | None, *, bound: float) -> float:
    """The largest strength looked at, a multiple of the step.

    Args:
        asked: by the user.
        bound: of the method.

    Raises:
        UsageError: more than the method's bound was asked for.
    """
    if asked is not None and asked > bound:
        raise UsageError(f"--max-strength is {asked:g}", f"the method allows at most {bound:g}")
    wanted = min(MAX_STRENGTH, bound) if asked is None else asked
    return round(int(wanted / STEP + 1e-9) * STEP, 6)


class StudyFile:
    """The journal of one study, in a folder that is locked while it is open."""

    def __init__(self, folder: Path, *, about: Mapping[str, Any], groups: int, top: float) -> None:
        """Open or begin a study.

        Args:
            folder: exists; `locked` holds it.
            about: what the study depends on; another study in the same folder is refused.
            groups: strengths per point.
            top: largest strength.

        Raises:
            UsageError: the folder holds a study of something else.
            OutputError: the journal cannot be read or written.
            MissingExtraError: optuna is not installed.
        """
        self._optuna = require_optuna()
        self._groups, self._top = groups, top
        self.path = folder / JOURNAL
        _drop_half_line(self.path)
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
            found.append(
                Trial(
                    number=each.number,
                    point=self._point(each.params),
                    proxies=Proxies(**stored["proxies"]),
                    rates=rates,
                    cost=None if rates is None or base is None else cost_of(rates, base),
                    skipped=stored["skipped"],
                )
            )
        return found

    def add(self, trial: Trial, *, limits: Limits) -> None:
        """Append a finished point; its number is given by the order."""
        optuna = self._optuna
        states = optuna.trial.TrialState
        cost, proxies = trial.cost, trial.proxies
        done = cost is not None
        self._study.add_trial(
            optuna.trial.create_trial(
                state=states.COMPLETE if done else states.PRUNED,
                # A tenth of the cost decides between points of equal harm; choosing is done
                # elsewhere, this leads the sampler only.
                value=None if cost is None else cost.harm + 0.1 * cost.total,
                params={_name(i): t for i, t in enumerate(trial.point)},
                distributions=self._space(),
                intermediate_values={} if done else {0: -(proxies.refusal or 0.0)},
                constraints=None if cost is None else cost.excess(limits),
                user_attrs={
                    "proxies": vars(proxies),
                    "rates": None
                    if trial.rates is None
                    else {name: vars(rate) for name, rate in trial.rates.items()},
                    "skipped": trial.skipped,
                },
            )
        )

    def propose(self, *, limits: Limits, seed: int) -> Point | None:
        """The next point, one that has not been looked at.

        First a grid of strengths common to all groups, then the middle between the strongest of
        them that is within the limits and the next one that is not; with several groups, then the
        neighbours of the best point so far, and what the sampler makes of all that is known.

        Returns:
            None where there is nothing left to look at.
        """
        trials = self.trials()
        known = {trial.point for trial in trials}
        t = next_common(trials, limits, top=self._top)
        if t is not None:
            return (t,) * self._groups
        if self._groups == 1:
            return None
        best = None if self.finetuned is None else best_of(trials, self.finetuned, limits)
        if best is not None and min(best.point) >= self._top:
            return None  # anything else is less of the same
        for point in () if best is None else _around(best.point, self._top):
            if point not in known:
                return point
        if len(known) >= round(self._top / STEP + 1) ** self._groups:
            return None
        optuna = self._optuna
        # In memory: a point that is never finished must leave no trace in the journal.
        study = optuna.create_study(
            direction="minimize",
            sampler=optuna.samplers.TPESampler(seed=_seed(seed, len(known)), n_startup_trials=0),
        )
        study.add_trials(self._study.get_trials(deepcopy=False))
        for _ in range(200):
            asked = study.ask(self._space())
            point = self._point(asked.params)
            if point not in known and any(point):
                return point
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _space(self) -> dict[str, Any]:
        distribution = self._optuna.distributions.FloatDistribution
        return {_name(i): distribution(0.0, self._top, step=STEP) for i in range(self._groups)}

    def _point(self, params: Mapping[str, float]) -> Point:
        return tuple(_rounded(params[_name(i)]) for i in range(self._groups))


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the folder of a study.

    Raises:
        OutputError: it cannot be made, holds other things, or another run holds it.
    """
    try:
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if not fresh and any(folder.iterdir()) and not (folder / JOURNAL).exists():
            names = {path.name for path in folder.iterdir()}
            if names != {LOCK}:
                raise OutputError(
                    f"{folder} exists and is not the folder of a tuning", "choose another -o"
                )
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except (NotADirectoryError, FileExistsError):
        raise OutputError(f"{folder} is not a folder", "choose another -o") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(
                f"another tuning is at work in {folder}", "wait for it, or choose another -o"
            ) from None
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


class _HeldLock:
    """A lock for optuna that does nothing: the folder is locked as a whole."""

    def acquire(self) -> bool:
        """Taken."""
        return True

    def release(self) -> None:
        """Given back."""


def _drop_half_line(path: Path) -> None:
    """Cut what a killed run left of a line it was writing."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _rates(stored: Mapping[str, Mapping[str, Any]]) -> dict[str, Rate]:
    return {name: Rate(**each) for name, each in stored.items()}


def _name(index: int) -> str:
    return f"t{index}"


def _rounded(value: float) -> float:
    """The nearest multiple of the step, free of the noise of adding steps up."""
    return round(round(value / STEP) * STEP, 6)


def _seed(seed: int, count: int) -> int:
    digest = hashlib.sha256(f"{seed}|{count}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def best_of(trials: Sequence[Trial], finetuned: Mapping[str, Rate], limits: Limits) -> Trial | None:
    """The safest point within the limits: then the cheapest, then the weakest.

    Returns:
        None where no point is within the limits and safer than the fine-tune.
    """
    start = cost_of(finetuned, finetuned).harm
    allowed = [
        trial
        for trial in trials
        if trial.cost is not None and trial.cost.within(limits) and trial.cost.harm < start
    ]

    def rank(trial: Trial) -> tuple[float, float, float, int]:
        assert trial.cost is not None
        return trial.cost.harm, trial.cost.total, sum(trial.point), trial.number

    return min(allowed, key=rank, default=None)
