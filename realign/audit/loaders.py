"""The rows of published suites as they are published, made into suites of ours.

HarmBench (2402.04249), AdvBench (2307.15043), StrongREJECT (2402.10260), XSTest (2308.01263),
OR-Bench (2405.20947), SORRY-Bench (2406.14598) and BeaverTails (2307.04657). realign ships none of
their prompts: users bring the file. Ids are those of the file, or the hash of the prompt, so that
they do not depend on the order of rows; what is left out is counted by reason.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.audit.contamination import normalise
from realign.audit.rows import Row, read_rows
from realign.audit.suites import Item, Suite, SuiteKind
from realign.errors import SuiteError

DUPLICATE = "duplicate"
BLANK = "blank_prompt"
HASH_CHECK = "hash_check"
CONTEXTUAL = "contextual"
MUTATED = "prompt_style"
SEVERAL_TURNS = "several_turns"
ONLY_SAFE = "only_safe_answers"

_BETWEEN = "\n\n---\n\n"
"""What HarmBench puts between the context and the behaviour of a contextual prompt."""


@dataclass(frozen=True)
class Draft:
    """What a row gives: one prompt and the fields its item carries besides."""

    prompt: str
    id: str | None = None
    """None: the hash of the prompt."""
    suite: str = ""
    """Added to the suite's name where a file gives several."""
    kind: SuiteKind = "harmful"
    fields: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class PublicSuite:
    """How one published file is read.

    Attributes:
        title: its name in prose.
        columns: the columns it must have.
        draft: from a row to an item, or the reason to leave it out.
        name: of the suite, where it differs from what the user types.
        merge: makes one row of several about one prompt; gives how many went.
    """

    title: str
    columns: tuple[str, ...]
    draft: Callable[[Row], Draft | str]
    name: str | None = None
    merge: Callable[[Iterable[Row]], tuple[list[Row], int]] | None = None


def load_public(
    name: str, path: str | Path, *, source: str | None = None, revision: str | None = None
) -> tuple[Suite, ...]:
    """Read the rows of a published suite.

    Args:
        name: a key of `PUBLIC_SUITES`.
        path: a CSV, TSV, JSON lines or JSON file with the published columns.
        source: what reports name as the origin; None: the path.
        revision: the commit it comes from.

    Returns:
        One suite, or several where the file holds prompts of two kinds (XSTest).

    Raises:
        SuiteError: the file is missing or malformed, lacks a column, uses an id for two prompts, or
            leaves no item.
    """
    public = PUBLIC_SUITES[name]
    rows: Iterable[Row] = _checked(public, read_rows(Path(path)))
    skipped: Counter[str] = Counter()
    if public.merge is not None:
        rows, gone = public.merge(rows)
        skipped[DUPLICATE] += gone
    kinds: dict[str, SuiteKind] = {}
    items: dict[str, list[Item]] = {}
    by_prompt: set[tuple[str, str]] = set()
    by_id: dict[str, str] = {}
    for row in rows:
        draft = public.draft(row)
        if isinstance(draft, str):
            skipped[draft] += 1
            continue
        text = normalise(draft.prompt)
        if not text:
            skipped[BLANK] += 1
            continue
        if (draft.suite, text) in by_prompt:
            skipped[DUPLICATE] += 1
            continue
        stable = draft.id or f"{name}-{hashlib.sha256(text.encode('utf-8')).hexdigest()[:16]}"
        if stable in by_id:
            raise SuiteError(
                f"{row.where}: id {stable!r} is already used for another prompt at {by_id[stable]}",
                f"check that this is the published file of {public.title}",
            )
        by_prompt.add((draft.suite, text))
        by_id[stable] = row.where
        kinds[draft.suite] = draft.kind
        items.setdefault(draft.suite, []).append(_item(stable, draft))
    if not items:
        left = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()) if n)
        raise SuiteError(
            f"{path}: no item of {public.title} is left" + (f" ({left})" if left else ""),
            "check that this is the published file, with its header",
        )
    return tuple(
        Suite(
            name=(public.name or name) + suffix,
            kind=kinds[suffix],
            items=tuple(found),
            source=source or str(path),
            revision=revision,
            skipped={reason: n for reason, n in skipped.items() if n},
        )
        for suffix, found in sorted(items.items())
    )


def _checked(public: PublicSuite, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, each with the columns it needs: a row of JSON may lack what the first one has."""
    for row in rows:
        for column in public.columns:
            if column not in row.values:
                row.text(column, needed_by=public.title)
        yield row


def _item(stable: str, draft: Draft) -> Item:
    record: dict[str, Any] = {"id": stable, "prompt": draft.prompt}
    record |= {key: value for key, value in draft.fields if value.strip()}
    return Item(
        id=stable,
        prompt=draft.prompt,
        category=record.get("category"),
        behavior=record.get("behavior"),
        target=record.get("target"),
        raw=record,
    )


# --- one function for every file -----------------------------------------------------------------


def _harmbench(row: Row, *, contextual: bool = True) -> Draft | str:
    def cell(column: str) -> str:
        return row.text(column, needed_by="HarmBench")

    # Copyright behaviours are judged by comparing hashes of the text, which no judge of ours does.
    if HASH_CHECK in cell("Tags"):
        return HASH_CHECK
    behavior, context = cell("Behavior"), cell("ContextString")
    if context.strip() and not contextual:
        return CONTEXTUAL
    prompt = f"{context}{_BETWEEN}{behavior}" if context.strip() else behavior
    fields = (
        ("category", cell("SemanticCategory")),
        ("behavior", behavior),
        ("context", context),
    )
    return Draft(prompt, id=cell("BehaviorID").strip() or None, fields=fields)


def _harmbench_standard(row: Row) -> Draft | str:
    return _harmbench(row, contextual=False)


def _advbench(row: Row) -> Draft | str:
    target = row.text("target", needed_by="AdvBench")
    return Draft(row.text("goal", needed_by="AdvBench"), fields=(("target", target),))


def _strongreject(row: Row) -> Draft | str:
    prompt = row.text("forbidden_prompt", needed_by="StrongREJECT")
    return Draft(prompt, fields=(("category", row.text("category", needed_by="StrongREJECT")),))


def _xstest(row: Row) -> Draft | str:
    def cell(column: str) -> str:
        return row.text(column, needed_by="XSTest")

    label = cell("label").strip().lower()
    if label not in ("safe", "unsafe"):
        raise SuiteError(
            f"{row.where}: the label is {cell('label')!r}", "XSTest labels are safe and unsafe"
        )
    number = cell("id").strip()
    return Draft(
        cell("prompt"),
        id=f"xstest-{number}" if number else None,
        suite=f"-{label}",
        kind="safe" if label == "safe" else "harmful",
        fields=(("category", cell("type")),),
    )


def _or_bench(row: Row, kind: SuiteKind = "safe") -> Draft | str:
    category = row.text("category", needed_by="OR-Bench")
    return Draft(
        row.text("prompt", needed_by="OR-Bench"), kind=kind, fields=(("category", category),)
    )


def _or_bench_toxic(row: Row) -> Draft | str:
    return _or_bench(row, "harmful")


def _sorry_bench(row: Row) -> Draft | str:
    # The same question in other styles (slang, ciphers, languages) measures something else.
    style = row.values.get("prompt_style")
    if isinstance(style, str) and style.strip() not in ("", "base"):
        return MUTATED
    turns = _structured(row.values["turns"])
    if isinstance(turns, list):
        turns = cast("list[Any]", turns)
        if len(turns) > 1:
            return SEVERAL_TURNS
        turns = turns[0] if turns else ""
    if not isinstance(turns, str):
        raise SuiteError(f"{row.where}: column 'turns' must hold a prompt", "check the file")
    number = row.text("question_id", needed_by="SORRY-Bench").strip()
    category = row.text("category", needed_by="SORRY-Bench")
    return Draft(
        turns,
        id=f"sorry-bench-{number}" if number else None,
        fields=(("category", category),),
    )


def _beavertails(row: Row) -> Draft | str:
    if "is_safe" in row.values and _is_safe(row):
        return ONLY_SAFE
    category = _structured(row.values["category"])
    if isinstance(category, dict):
        flags = cast("dict[str, Any]", category)
        category = next((name for name, flag in flags.items() if flag is True), "")
    if not isinstance(category, str):
        raise SuiteError(f"{row.where}: column 'category' must be text or flags", "check the file")
    return Draft(row.text("prompt", needed_by="BeaverTails"), fields=(("category", category),))


def _one_per_prompt(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """One row for each prompt: the first with an unsafe answer, else the first."""
    chosen: dict[str, Row] = {}
    count = 0
    for row in rows:
        count += 1
        text = normalise(row.text("prompt", needed_by="BeaverTails"))
        known = chosen.get(text)
        if known is None or (_is_safe(known) and not _is_safe(row)):
            chosen[text] = row
    return list(chosen.values()), count - len(chosen)


def _is_safe(row: Row) -> bool:
    """What the row says of its answer; a file without answers says nothing, which is not safe."""
    flag = row.values.get("is_safe", False)
    if isinstance(flag, str) and flag.strip().lower() in ("true", "false"):
        return flag.strip().lower() == "true"
    if not isinstance(flag, bool):
        raise SuiteError(f"{row.where}: is_safe is {flag!r}", "it must be true or false")
    return flag


def _structured(value: Any) -> Any:
    """A list or mapping that a CSV cell spells out, as JSON or as Python writes it."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            return read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


PUBLIC_SUITES: dict[str, PublicSuite] = {
    "harmbench": PublicSuite(
        "HarmBench",
        ("BehaviorID", "Behavior", "SemanticCategory", "Tags", "ContextString"),
        _harmbench,
    ),
    "harmbench-standard": PublicSuite(
        "HarmBench",
        ("BehaviorID", "Behavior", "SemanticCategory", "Tags", "ContextString"),
        _harmbench_standard,
    ),
    # Saturated, full of near-duplicates, and in most calibration sets: the name says so everywhere.
    "advbench": PublicSuite("AdvBench", ("goal", "target"), _advbench, name="advbench-legacy"),
    "strongreject": PublicSuite("StrongREJECT", ("category", "forbidden_prompt"), _strongreject),
    "xstest": PublicSuite("XSTest", ("id", "prompt", "type", "label"), _xstest),
    "or-bench": PublicSuite("OR-Bench", ("prompt", "category"), _or_bench),
    "or-bench-toxic": PublicSuite("OR-Bench", ("prompt", "category"), _or_bench_toxic),
    "sorry-bench": PublicSuite("SORRY-Bench", ("question_id", "category", "turns"), _sorry_bench),
    "beavertails": PublicSuite(
        "BeaverTails", ("prompt", "category"), _beavertails, merge=_one_per_prompt
    ),
}
"""By the name that is typed in `--suite NAME=FILE`."""
