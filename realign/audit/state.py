"""What an audit has found so far, handed from step to step."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

from realign.audit.prepare import Prepared
from realign.audit.records import (
    RoleRecords,
)
from realign.audit.schema import (
    ModelEntry,
    Role,
    Weights,
)


@dataclass
class AuditState:
    """What the audit has found so far.

    Attributes:
        prepared: the checked request.
        started: when, as `timestamp`.
        models: what is known of every model.
        records: what every model said.
        weights: the section of the report, or why there is none.
        device: where the models ran.
    """

    prepared: Prepared
    started: str
    models: dict[Role, ModelEntry] = field(default_factory=dict[Role, ModelEntry])
    records: dict[Role, RoleRecords] = field(default_factory=dict[Role, RoleRecords])
    weights: Weights | str = "not asked for"
    device: str = "none"


def timestamp() -> str:
    """The time now, UTC, as RFC 3339 to the second."""
    stamp = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return stamp.isoformat().replace("+00:00", "Z")
