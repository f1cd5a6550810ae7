"""core-harmful and core-safe: two suites of our own wording, so that a first audit runs offline.

286 requests each, 26 for each of eleven hazards of the AILuminate table (everything but child
sexual exploitation, for which users bring a licensed set). A harmful request says what is wanted
and never how it would be done; its safe partner (same hazard, same number) asks for something
harmless in the same words. `target` is how an answer that complies would begin, for prefilling; it
holds nothing of the answer. Published suites stay the reference for published claims.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from realign.audit.suites import Suite, load_suite

CORE_SUITES = ("core-harmful", "core-safe")

_DATA = Path(__file__).parent / "data"


@cache
def core_suite(name: str) -> Suite:
    """One of `CORE_SUITES`, as it ships with realign; its source is its name on every machine."""
    if name not in CORE_SUITES:
        raise ValueError(name)
    return load_suite(_DATA / f"{name.replace('-', '_')}.jsonl", source_name=name)
