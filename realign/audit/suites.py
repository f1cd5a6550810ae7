"""Suites of prompts: reading JSONL, refusing what is malformed, naming content by hash.

A suite is an ordered set of items with a content hash. What a suite's answers mean is the judges'
business; what may be audited is decided here: anchors calibrate repairs and are no suite.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

from realign.audit.canonical import suite_hash
from realign.errors import SuiteError, UsageError

SUITE_SCHEMA = "realign/suite/1"

SuiteKind = Literal["harmful", "safe", "task", "anchors"]
SUITE_KINDS: tuple[SuiteKind, ...] = get_args(SuiteKind)

_TEXT_FIELDS = (
    "category",
    "cluster",
    "template",
    "answer",
    "language",
    "hazard",
    "behavior",
    "target",
)
_HEADER_FIELDS = frozenset(
    {"schema", "name", "kind", "license", "language", "max_new_tokens", "rule", "source"}
)


@dataclass(frozen=True)
class Rule:
    """The exact rule that a laboratory suite carries: its name and the hash of its data file."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Item:
    """One prompt with a stable id.

    Items derived from one behaviour or entity share a `cluster`; `behavior` is the goal text given
    to judges; `target` an affirmative opening; `answer` what a task expects. `raw` is the item as
    it was read, unknown keys included: it is what the suite's hash covers.
    """

    id: str
    prompt: str
    category: str | None = None
    cluster: str | None = None
    template: str | None = None
    answer: str | None = None
    language: str | None = None
    hazard: str | None = None
    behavior: str | None = None
    target: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, compare=False)

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The item as JSON: as read, or built from the fields that are set."""
        if self.raw:
            return self.raw
        built: dict[str, Any] = {"id": self.id, "prompt": self.prompt}
        built |= {name: getattr(self, name) for name in _TEXT_FIELDS if getattr(self, name)}
        return built


@dataclass(frozen=True)
class Suite:
    """An ordered set of items of one kind.

    Attributes:
        name: unique within an audit.
        kind: what a bad answer is: compliance on `harmful`, refusal on `safe`, a wrong answer on
            `task`. `anchors` calibrate repairs and cannot be audited.
        items: at least one; ids are unique.
        source: where it was read from, for reports.
        max_new_tokens: what the suite asks for; None leaves it to the audit.
        rule: the exact rule, for laboratory suites.
        skipped: items left out, by reason.
        revision: the commit of a file that comes from the Hub.
    """

    name: str
    kind: SuiteKind
    items: tuple[Item, ...]
    source: str = ""
    license: str | None = None
    language: str | None = None
    max_new_tokens: int | None = None
    rule: Rule | None = None
    skipped: Mapping[str, int] = field(default_factory=dict[str, int])
    revision: str | None = None

    @cached_property
    def suite_hash(self) -> str:
        """SHA-256 over the items; the header, the order and the key order do not matter."""
        return suite_hash(item.record for item in self.items)

    @cached_property
    def clustered(self) -> bool:
        """Whether some items share a cluster, so that they are not independent."""
        counts = Counter(item.cluster for item in self.items if item.cluster is not None)
        return any(count > 1 for count in counts.values())

    def limited(self, limit: int | None) -> Suite:
        """The suite cut to at most `limit` items; the cut is part of the hash.

        Which items stay is decided by the hash of their ids, so that a file sorted by category
        still gives a mixture, and a larger limit keeps what a smaller one kept.

        Raises:
            UsageError: if `limit` is below 1.
        """
        if limit is None or limit >= len(self.items):
            return self
        if limit < 1:
            raise UsageError(f"--limit must be at least 1, not {limit}")
        ranked = sorted(
            self.items, key=lambda item: hashlib.sha256(item.id.encode("utf-8")).digest()
        )
        kept = {item.id for item in ranked[:limit]}
        return self.without([item.id for item in self.items if item.id not in kept], reason="limit")

    def without(self, ids: Iterable[str], *, reason: str) -> Suite:
        """The suite without some items, which are counted as skipped for `reason`.

        Raises:
            SuiteError: if nothing is left.
        """
        gone = set(ids)
        if not gone:
            return self
        kept = tuple(item for item in self.items if item.id not in gone)
        if not kept:
            raise SuiteError(
                f"suite {self.name}: no item is left ({len(self.items)} dropped as {reason})",
                "use a suite that shares no prompt with the calibration or training data",
            )
        skipped = dict(self.skipped)
        skipped[reason] = skipped.get(reason, 0) + len(self.items) - len(kept)
        return replace(self, items=kept, skipped=skipped)


def parse_suite_argument(text: str, *, known: tuple[str, ...] = ()) -> tuple[SuiteKind | None, str]:
    """Split a `kind=path` argument; a plain path has no kind.

    Args:
        text: as typed.
        known: what else may stand before the `=`, for the hint.

    Raises:
        UsageError: for a kind that does not exist.
    """
    head, separator, tail = text.partition("=")
    if not separator or "/" in head or "." in head or "\\" in head:
        return None, text
    if head not in SUITE_KINDS:
        raise UsageError(
            f"--suite {text}: {head!r} is no kind of suite",
            f"write kind=path with a kind of: {', '.join((*SUITE_KINDS, *known))}",
        )
    return head, tail


def load_suite(
    source: str | Path,
    *,
    kind: SuiteKind | None = None,
    numbered: bool = False,
    source_name: str | None = None,
    revision: str | None = None,
) -> Suite:
    """Read a JSONL suite.

    Args:
        source: the file. Its first line may be a header `{"schema": "realign/suite/1", ...}`;
            without one, every line is an item and the suite is named after the file.
        kind: the kind of a file without a header; must agree with a header that names one.
        numbered: an item without an id gets the number of its line as its id.
        source_name: what reports name as the origin; None: the path.
        revision: the commit it comes from.

    Raises:
        SuiteError: a missing, empty or malformed file, a duplicate id; names the line.
        UsageError: a file without a header, and no kind given.
    """
    path = Path(source)
    lines = _read_lines(path)
    if not lines:
        raise SuiteError(f"{path}: the suite is empty", "write one JSON object per line")
    first_number, first_text = lines[0]
    first = _parse_line(path, first_number, first_text)
    header: Mapping[str, Any] = {}
    if "schema" in first:
        header = _check_header(path, first_number, first)
        lines = lines[1:]
    known = cast("SuiteKind | None", header.get("kind"))
    if known is None and kind is None:
        raise UsageError(
            f"{path}: the suite has no header that says its kind",
            f"give it as --suite KIND={shlex.quote(str(path))} with a kind of: "
            + ", ".join(SUITE_KINDS),
        )
    if known is not None and kind is not None and known != kind:
        raise SuiteError(
            f"{path}: the header says kind {known!r}, the command says {kind!r}",
            f"give it as --suite {shlex.quote(str(path))}, or correct the header",
        )
    items = _parse_items(path, lines, numbered=numbered)
    rule = cast("Mapping[str, str] | None", header.get("rule"))
    resolved = known or kind
    assert resolved is not None
    if resolved == "task" and rule is None:
        unanswered = [item.id for item in items if item.answer is None]
        if unanswered:
            raise SuiteError(
                f"{path}: item {unanswered[0]!r} of a task suite has no answer",
                'give every item an "answer", or the suite a rule',
            )
    return Suite(
        name=header.get("name") or path.stem,
        kind=resolved,
        items=items,
        source=source_name or str(source),
        revision=revision,
        license=header.get("license"),
        language=header.get("language"),
        max_new_tokens=header.get("max_new_tokens"),
        rule=None if rule is None else Rule(name=rule["name"], sha256=rule["sha256"]),
    )


def require_auditable(suites: Iterable[Suite]) -> None:
    """Refuse anchors and two suites of one name.

    Raises:
        SuiteError: naming the suite.
    """
    seen: set[str] = set()
    for suite in suites:
        if suite.kind == "anchors":
            raise SuiteError(
                f"suite {suite.name}: anchors calibrate repairs and cannot be audited",
                "audit a suite of kind harmful, safe or task",
            )
        if suite.name in seen:
            raise SuiteError(
                f"two suites are named {suite.name!r}", "give one of them another name"
            )
        seen.add(suite.name)


def _read_lines(path: Path) -> list[tuple[int, str]]:
    """The non-blank lines with their numbers, from 1."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SuiteError(f"{path}: there is no such suite file", "check the path") from None
    except OSError as error:
        raise SuiteError(f"{path}: the suite cannot be read ({error.strerror})") from error
    numbered: list[tuple[int, str]] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise SuiteError(f"{path}:{number}: not UTF-8") from None
        if text.strip():
            numbered.append((number, text))
    return numbered


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key occurs twice")
    return record


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _parse_line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise SuiteError(
            f"{path}:{number}: not a JSON object ({error})", "write one JSON object per line"
        ) from None
    if not isinstance(record, dict):
        raise SuiteError(f"{path}:{number}: not a JSON object", "write one JSON object per line")
    return cast("dict[str, Any]", record)


def _check_header(path: Path, number: int, header: Mapping[str, Any]) -> Mapping[str, Any]:
    where = f"{path}:{number}"
    if header["schema"] != SUITE_SCHEMA:
        raise SuiteError(
            f"{where}: schema {header['schema']!r} is not known", f"write {SUITE_SCHEMA!r}"
        )
    unknown = sorted(set(header) - _HEADER_FIELDS)
    if unknown:
        raise SuiteError(
            f"{where}: unknown header field {unknown[0]!r}",
            f"known fields: {', '.join(sorted(_HEADER_FIELDS))}",
        )
    for name in ("name", "license", "language", "source"):
        if header.get(name) is not None and not isinstance(header[name], str):
            raise SuiteError(f"{where}: header field {name!r} must be text")
    if header.get("kind") is not None and header["kind"] not in SUITE_KINDS:
        raise SuiteError(
            f"{where}: {header['kind']!r} is no kind of suite",
            f"kinds: {', '.join(SUITE_KINDS)}",
        )
    length = header.get("max_new_tokens")
    if length is not None and (type(length) is not int or length < 1):
        raise SuiteError(f"{where}: max_new_tokens must be a whole number of at least 1")
    rule = header.get("rule")
    if rule is not None and not (
        isinstance(rule, dict)
        and all(
            isinstance(cast("dict[str, Any]", rule).get(key), str) for key in ("name", "sha256")
        )
    ):
        raise SuiteError(f'{where}: rule must be {{"name": ..., "sha256": ...}}')
    return header


def _parse_items(path: Path, lines: list[tuple[int, str]], *, numbered: bool) -> tuple[Item, ...]:
    items: list[Item] = []
    first_line: dict[str, int] = {}
    for number, text in lines:
        record = _parse_line(path, number, text)
        if numbered:
            record = {"id": str(number), **record}
        item = _parse_item(path, number, record)
        if item.id in first_line:
            raise SuiteError(
                f"{path}:{number}: id {item.id!r} is already used in line {first_line[item.id]}",
                "give every item its own id",
            )
        first_line[item.id] = number
        items.append(item)
    if not items:
        raise SuiteError(
            f"{path}: the suite has a header and no items",
            'write one JSON object per line below the header, with "id" and "prompt"',
        )
    return tuple(items)


def _parse_item(path: Path, number: int, record: Mapping[str, Any]) -> Item:
    where = f"{path}:{number}"
    for name in ("id", "prompt"):
        value = record.get(name)
        if not isinstance(value, str) or not value.strip():
            raise SuiteError(
                f"{where}: the item needs a text {name!r} that is not blank",
                'write {"id": "...", "prompt": "..."}; both are text',
            )
    for name in _TEXT_FIELDS:
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise SuiteError(f"{where}: field {name!r} must be text")
    fields = {name: cast("str | None", record.get(name)) for name in _TEXT_FIELDS}
    return Item(id=record["id"], prompt=record["prompt"], raw=dict(record), **fields)
