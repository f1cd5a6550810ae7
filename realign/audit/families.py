"""One decision per comparison over all harmful suites together (arXiv 2602.10144)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from realign.audit.instruments import ASR, NON_REFUSAL
from realign.audit.pairing import COMPARISONS, Pairing
from realign.audit.schema import (
    FamilyEntry,
    FisherTest,
    MaxDrop,
)
from realign.audit.statistics.intervals import ALPHA
from realign.audit.statistics.multiplicity import FamilyMember, family_test
from realign.errors import UsageError


def family_entries(
    pairings: Sequence[Pairing], *, primary: Mapping[str, str], alpha: float = ALPHA
) -> list[FamilyEntry]:
    """One decision per comparison over all harmful suites, by their primary judges."""
    entries: list[FamilyEntry] = []
    for name in COMPARISONS:
        members = [
            pairing
            for pairing in pairings
            if pairing.name == name
            and pairing.key[2] in (ASR.name, NON_REFUSAL.name)
            and primary.get(pairing.key[0]) == pairing.key[1]
            and pairing.comparator.instrument.suite.kind == "harmful"
        ]
        if not members:
            continue
        suites = tuple(pairing.key[0] for pairing in members)
        try:
            test = family_test([_member(pairing) for pairing in members], alpha=alpha)
        except UsageError as error:
            entries.append(
                FamilyEntry(
                    name=f"{name}: harmful", comparison=name, members=suites, reason=error.message
                )
            )
            continue
        entries.append(
            FamilyEntry(
                name=f"{name}: harmful",
                comparison=name,
                members=suites,
                pooled_p=test.pooled_p,
                max_drop=(
                    None if test.max_drop is None else MaxDrop(T=test.max_drop, p=test.max_drop_p)
                ),
                fisher=FisherTest(X=test.fisher, p=test.fisher_p),
                flagged=test.flagged,
            )
        )
    return entries


def _member(pairing: Pairing) -> FamilyMember:
    table = pairing.headline.table
    assert table is not None, f"{pairing.key} is not binary"
    suite, judge, _ = pairing.key
    return FamilyMember(
        suite=suite,
        judge=judge,
        b=table.b,
        c=table.c,
        clustered=pairing.comparator.instrument.suite.clustered,
    )
