"""What the leaderboard runs: every method with its declared range of strengths and settings.

A method is swept by the universal dial t of W(t) = Wf + t (W' - Wf), which costs no new repair, and
by those of its own settings that say how far it goes (a rank, a fraction, a threshold). A method
that is registered and not declared here is run at its defaults over `DIAL`. `usual` is the point
that stands for the method where no sweep is made: its own default at full strength unless said
otherwise. Everything here is fixed before results are looked at; see `docs/leaderboard.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from realign.errors import UsageError
from realign.repair.method import Method
from realign.repair.methods.null_control import ReplaceNull
from realign.repair.registry import METHODS, build_method

DIAL = (0.25, 0.5, 0.75, 1.0)
FINE = (0.4, 0.6, 0.7, 0.8, 0.9)
BEYOND = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
REFUSAL_TUNING = "refusal_tuning"
_NULL = "replace_null"
Settings = Mapping[str, Any]


def _no_settings() -> tuple[Settings, ...]:
    return ({},)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method over its range."""

    name: str
    method: str
    """A registered method, the null control, or the plain baseline."""
    settings: tuple[Settings, ...] = field(default_factory=_no_settings)
    """One repair each; the first is the usual one."""
    dial: tuple[float, ...] = DIAL
    """Strengths of every repair."""
    fine: tuple[float, ...] = FINE
    """Strengths between those of the dial, asked where a fine sweep is wanted."""
    usual: float = 1.0
    """The strength that stands for the method where none is chosen."""
    kind: str = "method"
    """method, baseline or control."""

    def strengths(self, *, fine: bool) -> tuple[float, ...]:
        """The dial, strongest first; with what lies between, where that is wanted."""
        return tuple(sorted({*self.dial, *(self.fine if fine else ())}, reverse=True))

    def build(self, settings: Settings) -> Method:
        """The method with one of its settings.

        Raises:
            UsageError: a setting that the method does not have or refuses.
        """
        assert self.method != REFUSAL_TUNING, "the plain baseline is no method"
        if self.method == _NULL:
            return ReplaceNull(**settings)
        return build_method(self.method, settings)

    def label(self, settings: Settings, strength: float) -> str:
        """What a table calls one point."""
        told = [f"{name} {value}" for name, value in settings.items() if name != "safety_vector"]
        return ", ".join([*told, f"t {strength:g}"])


def _swept(name: str, values: Iterable[Any], **fixed: Any) -> tuple[Settings, ...]:
    return tuple({**fixed, name: value} for value in values)


_BASE: tuple[Settings, ...] = ({"safety_vector": "base"},)
_FULL: tuple[Settings, ...] = ({"safety_vector": "unaligned", "gamma": 1.0},)
_FULL_BASE: tuple[Settings, ...] = ({"safety_vector": "base", "gamma": 1.0},)

DECLARED: tuple[Arm, ...] = (
    Arm(name=REFUSAL_TUNING, method=REFUSAL_TUNING, kind="baseline"),
    Arm(
        name="wise_ft",
        method="wise_ft",
        settings=({"a": 1.0},),
        dial=(0.2, 0.4, 0.5, 0.6, 0.7, 0.8),
        fine=(0.05, 0.1, 0.15, 0.25, 0.3),
        usual=0.5,
        kind="baseline",
    ),
    Arm(
        name=_NULL,
        method=_NULL,
        settings=_swept("rank", (8, 16)),
        dial=(1.0,),
        fine=(),
        kind="control",
    ),
    Arm(
        name="resta",
        method="resta",
        settings=_FULL,
        dial=(0.2, 0.3, 0.4, 0.5, 0.75),
        fine=(0.35, 0.45, 0.6),
        usual=0.5,
    ),
    Arm(name="resta_base", method="resta", settings=_FULL_BASE, dial=BEYOND, usual=0.5),
    Arm(
        name="lssf",
        method="lssf",
        settings=_swept("eta", (0.85, 0.95), safety_vector="unaligned"),
        dial=(0.5, 1.0, 1.5, 2.0),
    ),
    Arm(name="lssf_base", method="lssf", settings=_BASE, dial=(0.5, 1.0, 1.5, 2.0, 3.0)),
    Arm(
        name="delta_svd",
        method="delta_svd",
        settings=({"rank": 8, "safety_vector": "base"},),
        dial=(0.5, 0.75, 1.0, 1.25),
    ),
    Arm(
        name="replace",
        method="replace",
        settings=_swept("rank", (8, 2, 4, 6, 12, 16)),
        dial=(1.0,),
        fine=(),
    ),
    Arm(name="lox", method="lox", settings=_swept("k", (6, 2)), dial=(0.25, 0.5, 0.75, 1.0, 1.25)),
    Arm(
        name="safe_lora",
        method="safe_lora",
        settings=(
            {"tau": 0.5},
            {"tau": "auto"},
            {"selection": "number", "num_layers": 10},
            {"selection": "number", "num_layers": 1000},
        ),
        dial=(0.5, 1.0),
    ),
    Arm(
        name="safemerge",
        method="safemerge",
        settings=(
            {"tau": 0.35, "w": 0.8},
            {"tau": "auto", "w": 0.8},
            {"tau": "auto", "w": 0.4},
            {"tau": 1.01, "w": 0.6},
            {"tau": 1.01, "w": 0.3},
        ),
        dial=(1.0,),
        fine=(),
    ),
    Arm(name="somf", method="somf", dial=DIAL),
    Arm(
        name="safe_delta",
        method="safe_delta",
        settings=(
            {"s": 0.1},
            *({"budget": "relative", "s": s} for s in (0.05, 0.2, 0.4, 0.6, 0.8)),
            # The default drop_fraction of 0.15 binds from about s = 0.6: without it, finer.
            *(
                {"budget": "relative", "s": s, "drop_fraction": 0.0}
                for s in (0.4, 0.6, 0.7, 0.8, 0.9)
            ),
        ),
        dial=(1.0,),
        fine=(),
    ),
    Arm(name="safe_patching", method="safe_patching", dial=BEYOND),
    Arm(
        name="antidote",
        method="antidote",
        settings=(
            *_swept("alpha", (0.05, 0.02, 0.1)),
            *_swept("alpha", (0.1, 0.3, 0.5), prune_to="aligned"),
        ),
        dial=(1.0,),
        fine=(),
    ),
    Arm(
        name="nlsr",
        method="nlsr",
        settings=_swept("fraction", (0.5, 0.25, 0.75, 1.0)),
        dial=(0.5, 1.0),
    ),
    Arm(
        name="irr",
        method="irr",
        settings=(
            {},
            *_swept("keep_fraction", (0.25, 0.5, 0.7, 0.8, 0.9)),
            {"recalibrate": False},
        ),
        dial=(0.5, 1.0),
    ),
    # The laboratory's vocabulary lacks the sentence that ships with the method.
    Arm(name="one_shot", method="one_shot", settings=({"example": "safe"},), dial=BEYOND),
    Arm(name="q_realign", method="q_realign", dial=(0.5, 1.0)),
    Arm(name="two_teachers", method="two_teachers", dial=(0.5, 0.75, 0.9, 1.0, 1.15, 1.3), fine=()),
)


def find_arms(names: Sequence[str] | None = None) -> tuple[Arm, ...]:
    """The arms of those names, or of those methods; None: all that can run.

    Declared ones first; then every registered method that is not declared, at its defaults.

    Raises:
        UsageError: no arm and no registered method has that name.
    """
    present = [
        arm for arm in DECLARED if arm.method in METHODS or arm.method in (REFUSAL_TUNING, _NULL)
    ]
    declared = {arm.method for arm in DECLARED}
    present += [Arm(name=name, method=name) for name in METHODS if name not in declared]
    if names is None:
        return tuple(present)
    known = {each for arm in present for each in (arm.name, arm.method)}
    for name in names:
        if name not in known:
            raise UsageError(
                f"there is no method {name}", f"choose from: {', '.join(sorted(known))}"
            )
    return tuple(arm for arm in present if arm.name in names or arm.method in names)


def arm_range(arm: Arm, *, fine: bool) -> str:
    """What is asked of an arm, settings and strengths, as text."""
    settings = [dict(each) for each in arm.settings]
    return json.dumps([settings, arm.strengths(fine=fine)], sort_keys=True)
