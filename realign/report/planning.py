"""The plan of an audit on a terminal: what would run, and what so many items can show."""

from __future__ import annotations

from typing import TYPE_CHECKING

from realign.report.tables import plain_table
from realign.report.words import MISSING, ROLES, difference

if TYPE_CHECKING:
    from rich.console import RenderableType

    from realign.audit.prepare import AuditPlan


def audit_plan_tables(plan: AuditPlan) -> tuple[RenderableType, ...]:
    """Return what `realign audit --plan` shows."""
    from rich.text import Text

    models = plain_table("Models", left=["role", "checkpoint"])
    for role, source in plan.roles.items():
        models.add_row(ROLES[role], Text(source))

    suites = plain_table(f"Suites ({plan.responses} answers in all)")
    for title in ("suite", "kind", "items", "groups", "judges", "tokens"):
        suites.add_column(
            title, justify="right" if title in ("items", "groups", "tokens") else "left"
        )
    for suite in plan.suites:
        groups = MISSING if suite.n_clusters is None else str(suite.n_clusters)
        suites.add_row(
            Text(suite.name),
            suite.kind,
            str(suite.n_items),
            groups,
            ", ".join(suite.judges),
            str(suite.max_new_tokens),
        )

    rates = [rate for rate, _ in plan.suites[0].detectable] if plan.suites else []
    power = plain_table(
        "Smallest drift that would be found 8 times in 10",
        left=["suite"],
        right=[f"if {100 * rate:.0f} % improve by chance" for rate in rates],
    )
    for suite in plan.suites:
        power.add_row(Text(suite.name), *(difference(effect) for _, effect in suite.detectable))

    needed = plain_table(
        "Items needed to certify a margin, by churn", left=["gate"], right=["items now"]
    )
    churns: list[float] = []
    for suite in plan.suites:
        for gate, sizes in suite.needed.items():
            if not churns:
                churns = [churn for churn, _ in sizes]
                for churn in churns:
                    needed.add_column(f"churn {100 * churn:.0f} %", justify="right")
            cells = (MISSING if n is None else str(n) for _, n in sizes)
            needed.add_row(Text(gate), str(suite.n_items), *cells)

    notes = [Text(f"note: {note}", style="yellow") for note in plan.notes]
    notes += [
        Text(f"note: {suite.name}: {suite.note}", style="yellow")
        for suite in plan.suites
        if suite.note
    ]
    parts: list[RenderableType] = [models, "", suites, "", power]
    if churns:
        parts += ["", needed]
    return (*parts, *([""] if notes else []), *notes)
