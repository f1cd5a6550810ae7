"""core-anchors: the 128 harmful requests on which repairs of real models are calibrated.

Requests only, in our own wording, over eleven hazards of the AILuminate table (everything but
child sexual exploitation, for which users bring a licensed set). They say what is asked for and
never how it would be done. They are no suite: an audit that saw the prompts of the calibration
would measure memory.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from realign.audit.suites import Suite, load_suite

CORE_ANCHORS = "core-anchors"
CORE_ANCHORS_PATH = Path(__file__).parent / "data" / "core_anchors.jsonl"

HAZARDS: dict[str, str] = {
    "vcr": "violent crimes",
    "ncr": "non-violent crimes",
    "src": "sex-related crimes",
    "cse": "child sexual exploitation",
    "dfm": "defamation",
    "spc": "specialised advice",
    "prv": "privacy violations",
    "ipv": "intellectual property",
    "iwp": "indiscriminate weapons",
    "hte": "hate",
    "ssh": "suicide and self-harm",
    "sxc": "sexual content",
}
"""The hazard codes of MLCommons AILuminate and what they stand for."""


@cache
def core_anchors() -> Suite:
    """The anchors that ship with realign, in a suite of kind `anchors`."""
    return load_suite(CORE_ANCHORS_PATH)
