"""The policy: margins and gates, declared before the run in a TOML file.

An unknown key is an error, because a misspelt margin would silently gate nothing. Fractions, not
percent. There is no default margin that passes silently: without a policy an audit gives rates and
intervals and no verdicts.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from realign.audit.schema import ComparisonName, Role
from realign.audit.suites import Suite
from realign.errors import PolicyError

POLICY_SCHEMA = "realign/policy/1"
LATER_KINDS = ("findings", "weights")
EXACT_JUDGES = frozenset({"oracle", "exact-match"})
"""Judges that apply an exact rule; each satisfies a gate alone."""


class _Strict(BaseModel):
    # strict: 1 is no text and "0.03" is no number; TOML knows the difference.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _Gate(_Strict):
    id: str = Field(min_length=1)
    required: bool = True


class MarginGate(_Gate):
    """The verdict of one comparison must be `within_margin`.

    A margin on `refusal_logodds` gives a verdict (nats), but never passes the gate: nobody read an
    answer (`needs_second_judge`). The KL has no margin, see `check_margins`.
    """

    kind: Literal["margin"]
    comparison: ComparisonName
    suite: str
    metric: str
    margin: float = Field(gt=0)


class MaxRateGate(_Gate):
    """The upper limit of a model's rate must not exceed `value`."""

    kind: Literal["max_rate"]
    role: Role
    suite: str
    metric: str
    value: float = Field(ge=0, le=1)


class MaxValueGate(_Gate):
    """The upper limit of a mean (KL or refusal log-odds, nats) must not exceed `value`.

    It bounds a number that the policy names as such and judges no answer, so that it needs no
    second judge.
    """

    kind: Literal["max_value"]
    role: Role
    suite: str
    metric: str
    value: float


class NoFamilyDriftGate(_Gate):
    """No drift may be found over all harmful suites together."""

    kind: Literal["no_family_drift"]
    comparison: ComparisonName


class MaxInvalidExcessGate(_Gate):
    """A model may not give more invalid answers than the reference, beyond `value`."""

    kind: Literal["max_invalid_excess"]
    role: Role
    value: float = Field(ge=0, le=1)
    suite: str | None = None


class MinKappaGate(_Gate):
    """Primary and secondary judges must agree at least this well."""

    kind: Literal["min_kappa"]
    value: float = Field(ge=-1, le=1)
    suite: str | None = None
    role: Role | None = None


Gate = Annotated[
    MarginGate
    | MaxRateGate
    | MaxValueGate
    | NoFamilyDriftGate
    | MaxInvalidExcessGate
    | MinKappaGate,
    Field(discriminator="kind"),
]


class PolicyModels(_Strict):
    """Which reference the policy was written for."""

    reference: str | None = None


class PolicyJudges(_Strict):
    """Who judges: the primary's verdict stands unless a secondary contradicts it."""

    primary: str
    secondary: tuple[str, ...] = ()
    min_kappa: float = Field(default=0.60, ge=-1, le=1)

    @field_validator("secondary", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(cast("list[Any]", value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _distinct(self) -> PolicyJudges:
        if len({self.primary, *self.secondary}) != 1 + len(self.secondary):
            raise ValueError("a judge is named twice")
        return self


class Policy(_Strict):
    """A whole policy, after defaults."""

    # `schema` shadows a method of pydantic; the file says "schema".
    schema_: Literal["realign/policy/1"] = Field(alias="schema")
    alpha: float = Field(default=0.025, gt=0, lt=0.5)
    fail_on: Literal["critical", "error", "warning", "never"] = "error"
    on_inconclusive: Literal["fail", "warn"] = "fail"
    allow_remote_judge: bool = False
    models: PolicyModels = PolicyModels()
    judges: PolicyJudges | None = None
    gate: tuple[Gate, ...] = ()
    path: str | None = Field(default=None, exclude=True)
    sha256: str = Field(default="", exclude=True)

    @field_validator("gate", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: Any) -> Any:
        return tuple(cast("list[Any]", value)) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _distinct(self) -> Policy:
        seen: set[str] = set()
        for gate in self.gate:
            if gate.id in seen:
                raise ValueError(f"two gates have the id {gate.id!r}")
            seen.add(gate.id)
        return self

    def margin_for(
        self, *, comparison: ComparisonName, suite: str, metric: str
    ) -> tuple[float, ComparisonName] | None:
        """The declared margin of one comparison, and the comparison that it was declared for.

        A margin gate of this comparison decides; a margin that the policy declares for the same
        suite and metric in another comparison holds here too (the smallest, if they differ).
        """
        gates = [
            gate
            for gate in self.gate
            if isinstance(gate, MarginGate) and (gate.suite, gate.metric) == (suite, metric)
        ]
        own = [gate for gate in gates if gate.comparison == comparison]
        strictest = min(own or gates, key=lambda gate: gate.margin, default=None)
        return None if strictest is None else (strictest.margin, strictest.comparison)

    @property
    def has_required_gate(self) -> bool:
        """Whether anything in it can fail an audit."""
        return any(gate.required for gate in self.gate)

    def effective(self) -> dict[str, Any]:
        """The full policy after defaults, as JSON."""
        return self.model_dump(mode="json", by_alias=True)


def load_policy(path: str | Path) -> Policy:
    """Read a policy file.

    Raises:
        PolicyError: a missing or unreadable file, an unknown key, a value out of range, a gate
            kind that this version cannot evaluate.
    """
    file = Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise PolicyError(
            f"{path}: the policy cannot be read ({error.strerror})", "check the path"
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: the policy is not UTF-8 ({error})") from error
    return parse_policy(text, path=str(path))


def parse_policy(text: str, *, path: str | None = None) -> Policy:
    """A policy from its TOML text.

    Raises:
        PolicyError: as `load_policy`.
    """
    name = path or "policy"
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{name}: not TOML ({error})") from error
    for key in ("path", "sha256"):
        if key in raw:
            raise PolicyError(f"{name}: unknown key {key!r}")
    _refuse_later_kinds(name, raw)
    raw.setdefault("schema", None)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    try:
        return Policy.model_validate(raw | {"path": path, "sha256": digest})
    except ValidationError as error:
        raise PolicyError(f"{name}: {_first_fault(error, raw)}", _hint(error)) from error


def check_margins(policy: Policy) -> None:
    """Refuse margins that nothing can be put to.

    Raises:
        PolicyError: a margin of 1 or more on a metric that is a rate, or any on the KL.
    """
    for gate in policy.gate:
        if not isinstance(gate, MarginGate) or gate.metric == "refusal_logodds":
            continue
        if gate.metric == "kl":
            raise PolicyError(
                f"gate {gate.id!r}: there is no margin on kl, which is a comparison with the "
                "reference already",
                'bound it with a gate of kind "max_value"',
            )
        if gate.margin >= 1.0:
            raise PolicyError(
                f"gate {gate.id!r}: margin {gate.margin} of a rate must be below 1",
                "margins are fractions: 0.03 is three percentage points",
            )


def require_gate(policy: Policy) -> None:
    """Refuse a policy that decides nothing where its gates are to decide something.

    Raises:
        PolicyError: no gate of it is required.
    """
    if not policy.has_required_gate:
        raise PolicyError(
            f"{policy.path or 'policy'}: no required gate, so that any result would be kept",
            "add a gate, or remove 'required = false' from one"
            if policy.gate
            else "add a gate to the policy",
        )


def check_rules(policy: Policy, suites: Iterable[Suite]) -> None:
    """Whether `oracle`, where the policy names it, can judge every gated suite.

    Raises:
        PolicyError: a gated suite carries no rule; names it.
    """
    by_name = {suite.name: suite for suite in suites}
    judges = policy.judges
    named = () if judges is None else (judges.primary, *judges.secondary)
    for gate in policy.gate:
        suite = by_name.get(getattr(gate, "suite", None) or "")
        if suite is None or suite.kind == "task":
            continue
        if "oracle" in named and suite.rule is None:
            raise PolicyError(
                f"gate {gate.id!r}: suite {suite.name} carries no rule, so that oracle cannot "
                "judge it",
                "name another primary judge, or gate a laboratory suite",
            )


def check_reference(policy: Policy, references: Iterable[str]) -> None:
    """Whether the audit's reference is the one that the policy was written for.

    Args:
        policy: the policy.
        references: what the reference may be called: as typed, and pinned `id@commit`.

    Raises:
        PolicyError: another reference than the policy names, or a branch or tag where a gate needs
            a commit.
    """
    wanted = policy.models.reference
    if wanted is None:
        return
    name, separator, revision = wanted.rpartition("@")
    if separator and "/" in name and not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise PolicyError(
            f"models.reference {wanted!r} is not pinned to a commit",
            "write org/name@ and the 40 hexadecimal digits of the commit",
        )
    known = [reference.removeprefix("hf://") for reference in references]
    if wanted.removeprefix("hf://") not in known:
        raise PolicyError(
            f"the policy is written for the reference {wanted!r}, this audit has "
            f"{known[0] if known else 'none'!r}",
            "audit against that reference, or change models.reference",
        )


def _refuse_later_kinds(name: str, raw: dict[str, Any]) -> None:
    gates = raw.get("gate")
    for gate in cast("list[Any]", gates) if isinstance(gates, list) else []:
        kind = cast("dict[str, Any]", gate).get("kind") if isinstance(gate, dict) else None
        if kind in LATER_KINDS:
            raise PolicyError(
                f"{name}: gate kind {kind!r} is not available in this version",
                "remove the gate; kinds: margin, max_rate, max_value, no_family_drift, "
                "max_invalid_excess, min_kappa",
            )
    if "suppress" in raw:
        raise PolicyError(
            f"{name}: 'suppress' is not available in this version (it belongs to gate kind "
            "'findings')",
            "remove it",
        )


def _first_fault(error: ValidationError, raw: dict[str, Any]) -> str:
    fault = error.errors()[0]
    # A discriminated union puts the tag into the location; people know the gate by its id.
    steps = [step for step in fault["loc"] if not str(step).startswith("function-")]
    if steps[:1] == ["gate"] and len(steps) > 1 and isinstance(steps[1], int):
        gate = raw["gate"][steps[1]]
        known = gate.get("id") if isinstance(gate, dict) else None
        place = f"gate {known!r}" if known else f"gate number {steps[1] + 1}"
        steps = [place, *steps[3 if len(steps) > 2 else 2 :]]
    where = ": ".join(str(step) for step in steps)
    if fault["type"] == "extra_forbidden":
        *before, key = steps
        place = f" in {': '.join(map(str, before))}" if before else ""
        return f"unknown key {key!r}{place}"
    return f"{where}: {fault['msg']}" if where else str(fault["msg"])


def _hint(error: ValidationError) -> str:
    if error.errors()[0]["type"] == "extra_forbidden":
        return "an unknown key is an error, so that a misspelt margin cannot gate nothing"
    return ""
