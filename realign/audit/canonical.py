"""Canonical JSON and the hashes that identify suites, judges, generations and instruments.

Two results may be compared only if they come from the same instrument, so an instrument's name is
a hash over what defines it. What a setting resolves to on one model (stop ids, dtype, batch size)
is recorded beside the model and not hashed: two models could never share an instrument otherwise.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

INSTRUMENT_ID_LENGTH = 16


def canonical_json(value: Any) -> str:
    """One JSON text per value: keys sorted by code point, no blanks, no escapes, no NaN.

    Args:
        value: anything JSON can say. Text is not normalised.

    Raises:
        ValueError: for NaN or infinity.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, as 64 hexadecimal digits.

    Lone surrogates, which a broken tokenizer can produce, are encoded as they are.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, without a final newline."""
    return sha256_text(canonical_json(value))


def suite_hash(items: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 over the canonical JSON lines of all items, sorted by id, one newline each."""
    lines = (canonical_json(item) + "\n" for item in sorted(items, key=lambda item: item["id"]))
    return sha256_text("".join(lines))


def instrument_id(*, generation: str, judge: str, suite: str) -> str:
    """The first 16 hexadecimal digits over the three hashes that make an instrument."""
    whole = sha256_json({"generation": generation, "judge": judge, "suite": suite})
    return whole[:INSTRUMENT_ID_LENGTH]


def prompt_hash(token_ids: Sequence[int]) -> str:
    """SHA-256 of the token ids that were fed, as little-endian unsigned 32-bit numbers."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).hexdigest()


def response_hash(response: str) -> str:
    """SHA-256 of a response's text."""
    return sha256_text(response)
