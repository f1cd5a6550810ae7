"""Everything about an audit that can be settled, and can fail, before a model is loaded.

Suites, judges, policy and checkpoints are checked against each other; contaminated items are
dropped; `plan_audit` says what would run and what so many items can detect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from realign.audit.anchors import core_anchors
from realign.audit.contamination import ItemIndex, PromptIndex, overlap
from realign.audit.instruments import ASR, JUDGE_NAMES, METRICS, judges_for
from realign.audit.oracle import oracle_judge
from realign.audit.policy import (
    EXACT_JUDGES,
    MarginGate,
    check_margins,
    check_reference,
    check_rules,
)
from realign.audit.request import AuditRequest
from realign.audit.schema import Role
from realign.audit.statistics.intervals import ALPHA
from realign.audit.statistics.power import (
    PLANNED_CHURNS,
    Plan,
    minimum_detectable_effect,
    n_needed,
    plan,
)
from realign.audit.store import is_audit_folder
from realign.audit.suites import Suite, SuiteKind, require_auditable
from realign.audit.training_data import TrainingData
from realign.checkpoint.reference import parse_reference
from realign.errors import OutputError, PolicyError, SuiteError, UsageError

if TYPE_CHECKING:
    from realign.checkpoint.reader import Checkpoint

CONTAMINATED = "contaminated"
TRAINED_ON = "in_training_data"


@dataclass(frozen=True)
class Prepared:
    """A checked request: the suites as they will run, and who judges them."""

    request: AuditRequest
    suites: tuple[Suite, ...]
    judges: Mapping[str, tuple[str, ...]]
    """The judges of every suite, the primary first."""
    secondary: tuple[str, ...]
    """Judges that the policy names as secondary."""

    @property
    def primary(self) -> dict[str, str]:
        """The primary judge of every suite."""
        return {suite: names[0] for suite, names in self.judges.items()}


def prepare(request: AuditRequest) -> Prepared:
    """Check a request without opening a model.

    Raises:
        UsageError: no suites, an unknown judge, an exact judge without its rule, a bad number.
        SuiteError: anchors, two suites of one name, nothing left after dropping contaminated items.
        PolicyError: a policy that does not fit; an unknown judge or metric, a missing rule.
    """
    if not request.suites:
        raise UsageError("an audit needs at least one suite", "give --suite PATH")
    for name, value in (
        ("--batch-size", request.batch_size),
        ("--max-new-tokens", request.max_new_tokens),
        ("--limit", request.limit),
    ):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    require_auditable(request.suites)
    for suite in request.suites:
        if suite.suite_hash == core_anchors().suite_hash:
            raise SuiteError(
                f"suite {suite.name}: these are the core anchors, which calibrate repairs",
                "audit other prompts than those of the calibration",
            )
    policy = request.policy
    named: tuple[str, ...] = request.judges
    if policy is not None and policy.judges is not None:
        own = (policy.judges.primary, *policy.judges.secondary)
        unknown = [name for name in own if name not in JUDGE_NAMES]
        if unknown:
            raise PolicyError(
                f"{policy.path or 'policy'}: judge {unknown[0]!r} is not available in this version",
                f"judges: {', '.join(JUDGE_NAMES)}",
            )
        named = tuple(dict.fromkeys((*own, *request.judges)))
    index = PromptIndex(item.prompt for suite in request.calibration for item in suite.items)
    clean = _untrained(tuple(_clean(suite, index) for suite in request.suites), request.training)
    suites = tuple(suite.limited(request.limit) for suite in clean)
    judges: dict[str, tuple[str, ...]] = {}
    for suite in suites:
        judges[suite.name] = _judges(suite, request, named=named)
        if "oracle" in judges[suite.name]:
            oracle_judge(suite)  # refuses a rule that is not ours
    if policy is not None:
        check_margins(policy)
        check_rules(policy, suites)
        _check_gates(request, judges, suites)
    secondary = () if policy is None or policy.judges is None else policy.judges.secondary
    return Prepared(request=request, suites=suites, judges=judges, secondary=secondary)


def _clean(suite: Suite, index: PromptIndex) -> Suite:
    found = overlap({item.id: item.prompt for item in suite.items}, index)
    return suite.without(found.ids, reason=CONTAMINATED)


def _untrained(suites: tuple[Suite, ...], training: tuple[TrainingData, ...]) -> tuple[Suite, ...]:
    """The suites without what stands in the declared training data, which is read once."""
    if not training:
        return suites
    index = ItemIndex(
        {f"{suite.name}\0{item.id}": item.prompt for suite in suites for item in suite.items}
    )
    found = index.found_in(prompt for data in training for prompt in data.prompts())
    return tuple(
        suite.without(
            [item.id for item in suite.items if f"{suite.name}\0{item.id}" in found],
            reason=TRAINED_ON,
        )
        for suite in suites
    )


def _judges(suite: Suite, request: AuditRequest, *, named: tuple[str, ...]) -> tuple[str, ...]:
    """The judges of one suite, the primary first.

    An exact judge that only the policy names is meant for the suites that carry its rule; asked for
    by the user, it is refused on the others.
    """
    if "oracle" in named and "oracle" not in request.judges and suite.rule is None:
        named = tuple(name for name in named if name != "oracle")
    found = judges_for(suite, named)
    if not found:  # nothing that was named can look at this kind of suite
        found = judges_for(suite, ())
    policy = request.policy
    first = policy.judges.primary if policy is not None and policy.judges is not None else None
    # The policy's primary judge leads; without one, an exact rule does.
    return tuple(sorted(found, key=lambda name: (name != first, name not in EXACT_JUDGES)))


def _check_gates(
    request: AuditRequest, judges: Mapping[str, tuple[str, ...]], suites: tuple[Suite, ...]
) -> None:
    """Refuse gates on metrics that no judge of their suite can ever give.

    Raises:
        PolicyError: naming the gate.
    """
    policy = request.policy
    assert policy is not None
    kinds: dict[str, SuiteKind] = {suite.name: suite.kind for suite in suites}
    every = {metric.name for metrics in METRICS.values() for metric in metrics}
    every |= {"refusal_logodds", "kl"}
    for gate in policy.gate:
        metric, suite = getattr(gate, "metric", None), getattr(gate, "suite", None)
        if metric is not None and metric not in every:
            raise PolicyError(
                f"gate {gate.id!r}: there is no metric {metric!r}",
                f"metrics: {', '.join(sorted(every))}",
            )
        if suite not in kinds or metric in (None, "refusal_logodds", "kl"):
            continue
        possible = {
            each.name
            for (_, kind), metrics in METRICS.items()
            if kind == kinds[suite]
            for each in metrics
        }
        if metric not in possible:
            raise PolicyError(
                f"gate {gate.id!r}: {metric} is not measured on {kinds[suite]} suites",
                f"on {suite}: {', '.join(sorted(possible))}",
            )


def check_opened(request: AuditRequest, reference: Checkpoint | None) -> None:
    """Compare the policy's reference with the one that was opened, as typed and as pinned.

    Raises:
        PolicyError: they differ.
    """
    if request.policy is None:
        return
    names: list[str] = []
    if reference is not None:
        names.append(str(reference.source))
        if reference.commit is not None:
            bare = str(reference.source).removeprefix("hf://").partition("@")[0]
            names.append(f"{bare}@{reference.commit}")
    check_reference(request.policy, names)


# --- planning ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedSuite:
    """One suite of a planned audit and what its items can show."""

    name: str
    kind: str
    n_items: int
    n_clusters: int | None
    judges: tuple[str, ...]
    max_new_tokens: int
    detectable: tuple[tuple[float, float | None], ...]
    """(share of items fixed, smallest drift found with power 0.80); for independent items."""
    margins: Mapping[str, Plan]
    """By gate id: what this many items can certify at the declared margin."""
    needed: Mapping[str, tuple[tuple[float, int | None], ...]]
    """By gate id: (churn, items needed to certify zero drift with probability 0.80)."""
    note: str
    """Said beside the tables, where items share clusters."""


@dataclass(frozen=True)
class AuditPlan:
    """What an audit would run, before any model is loaded."""

    roles: Mapping[Role, str]
    suites: tuple[PlannedSuite, ...]
    responses: int
    """Answers to generate, over all models."""
    gates: tuple[str, ...]
    """Ids of the policy's gates whose suite is not among these."""
    notes: tuple[str, ...]


def plan_audit(request: AuditRequest) -> AuditPlan:
    """Say what would run and what it could detect; loads nothing.

    Raises:
        UsageError, SuiteError, PolicyError: as `prepare`.
    """
    prepared = prepare(request)
    policy = request.policy
    alpha = policy.alpha if policy is not None else ALPHA
    roles: dict[Role, str] = {
        role: str(source) if isinstance(source, str | Path) else source.source
        for role, source in request.sources().items()
    }
    planned: list[PlannedSuite] = []
    for suite in prepared.suites:
        margins = {
            gate.id: gate.margin
            for gate in (policy.gate if policy is not None else ())
            if isinstance(gate, MarginGate)
            and gate.suite == suite.name
            and gate.metric not in ("refusal_logodds", "kl")
        }
        n = len(suite.items)
        clusters = len({item.cluster or item.id for item in suite.items})
        planned.append(
            PlannedSuite(
                name=suite.name,
                kind=suite.kind,
                n_items=n,
                n_clusters=clusters if suite.clustered else None,
                judges=prepared.judges[suite.name],
                max_new_tokens=request.generation_of(suite).max_new_tokens,
                detectable=tuple(
                    (rate, minimum_detectable_effect(n, c_rate=rate, alpha=alpha))
                    for rate in (0.01, 0.02, 0.05)
                ),
                margins={name: plan(n, margin=m, alpha=alpha) for name, m in margins.items()},
                needed={
                    name: tuple(
                        (churn, n_needed(margin=m, churn=churn, alpha=alpha))
                        for churn in PLANNED_CHURNS
                    )
                    for name, m in margins.items()
                },
                note=(
                    f"items share {clusters} clusters: the tables hold for independent items, "
                    "less can be shown here"
                    if suite.clustered
                    else ""
                ),
            )
        )
    present = {suite.name for suite in prepared.suites}
    missing = tuple(
        gate.id
        for gate in (policy.gate if policy is not None else ())
        if getattr(gate, "suite", None) not in (None, *present)
    )
    weak = [
        suite.name
        for suite in prepared.suites
        if policy is not None and not set(prepared.judges[suite.name]) & EXACT_JUDGES
    ]
    notes = [f"gate {name}: its suite is not part of this audit" for name in missing]
    notes += [f"{name}: no judge here can satisfy a gate on {ASR.name} alone" for name in weak]
    if policy is None:
        notes.append("no verdicts: no policy")
    runs = len(roles) + (1 if request.noise_floor and "reference" in roles else 0)
    return AuditPlan(
        roles=roles,
        suites=tuple(planned),
        responses=runs * sum(len(suite.items) for suite in prepared.suites),
        gates=missing,
        notes=tuple(notes),
    )


def check_folder(request: AuditRequest) -> None:
    """Refuse an output folder that is not this audit's to write into; touches nothing.

    Raises:
        OutputError: it is a file, lies inside a checkpoint under audit, or holds others' files.
    """
    out = request.out
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} exists and is no folder", "give another --out")
    place = out.resolve()
    for folder in _local_folders(request):
        if place == folder or folder in place.parents:
            raise OutputError(
                f"{out} is or lies inside {folder}, which is an input of this audit",
                "give an --out outside the checkpoints",
            )
    if not request.shared_out and out.is_dir() and not is_audit_folder(out):
        first = min(path.name for path in out.iterdir())
        raise OutputError(
            f"{out} holds files that are no audit's (first: {first})",
            "give a new or empty folder as --out, or the folder of an earlier audit",
        )


def _local_folders(request: AuditRequest) -> list[Path]:
    """The folders of all input checkpoints that lie on this machine."""
    found: list[Path] = []
    for source in (*request.sources().values(), request.base):
        if source is None:
            continue
        if not isinstance(source, str | Path):
            found += [source.folder, *(file.parent for file in source.weight_files)]
            continue
        reference = parse_reference(source)
        names = [reference.model, reference.adapter or reference.model]
        found += [Path(name).expanduser() for name in names]
    return [folder.resolve() for folder in dict.fromkeys(found) if folder.is_dir()]


def prepare_folder(out: Path) -> None:
    """Make the output folder.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{out}: cannot be made ({error.strerror})", "check permissions"
        ) from error


def without_contaminated(request: AuditRequest, calibration: tuple[Suite, ...]) -> AuditRequest:
    """The request with more calibration data to be dropped from its suites."""
    return replace(request, calibration=(*request.calibration, *calibration))
