"""The texts that a user gives a method: JSON lines in one of three shapes, read and checked.

    {"prompt": "...", "response": "..."}                    safe, harmful; task and keep, where the
                                                            response may be missing
    {"messages": [{"role": "user", ...}, ...]}              the same; it ends with the reply
    {"prompt": "...", "chosen": "...", "rejected": "..."}   pairs

A first line that is a suite's header is passed over and "answer" is taken for "response", so that a
suite can serve as data. Other keys are ignored. Here: reading, the content's hash, and what a plan
can say of it. Not here: tokens, which need a model's tokenizer (`rendered`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.audit.canonical import sha256_json
from realign.audit.contamination import overlap, words_of
from realign.audit.suite_sources import read_suites
from realign.errors import SuiteError, UsageError
from realign.repair.preparation import Data

OPTIONS: Mapping[Data, str] = {
    "safe": "--safe-data",
    "harmful": "--harmful-data",
    "task": "--task-data",
    "keep": "--keep-data",
    "pairs": "--pairs",
}
"""The option that names the file of each kind of text."""

_ANSWERED: frozenset[Data] = frozenset({"safe", "harmful"})  # there, every row needs its reply
_REPLY_KEYS = ("response", "answer")
_SHAPE_PAIR = '{"prompt": "...", "chosen": "...", "rejected": "..."}'
_SHAPE_ROW = '{"prompt": "...", "response": "..."}'
_SHAPE_MESSAGES = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)


@dataclass(frozen=True)
class Text:
    """A prompt and the reply to it; None where the model is to give one."""

    prompt: str
    reply: str | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt with a good and a bad reply."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class TextFile:
    """The rows of one file, in its order.

    Attributes:
        data: what they are for.
        source: the file as it was named.
        rows: `Pair` for "pairs", else `Text`; at least one.
    """

    data: Data
    source: str
    rows: tuple[Text | Pair, ...]

    @property
    def sha256(self) -> str:
        """Hash of the content: blank lines, key order, other keys and the shape do not matter."""
        return sha256_json([list(vars(row).values()) for row in self.rows])

    @property
    def texts(self) -> tuple[Text, ...]:
        """The rows of a file that does not hold pairs."""
        assert self.data != "pairs"
        return cast(tuple[Text, ...], self.rows)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The rows of a file of pairs."""
        assert self.data == "pairs"
        return cast(tuple[Pair, ...], self.rows)


@dataclass(frozen=True)
class PlannedTexts:
    """What a plan says of a file."""

    data: Data
    source: str
    sha256: str
    count: int
    unanswered: int
    """Rows whose reply the model will be asked for."""
    characters: int = 0
    """Of all rows, prompts and replies; both sequences of a pair."""
    longest: int = 0
    """Of the longest sequence."""


def texts_of(request: Any) -> dict[Data, str | Path]:
    """The files that a request names, by what they are for."""
    fields: Mapping[Data, str] = {
        "safe": "safe_data",
        "harmful": "harmful_data",
        "task": "task_data",
        "keep": "keep_data",
        "pairs": "pairs",
    }
    return {
        data: getattr(request, name)
        for data, name in fields.items()
        if getattr(request, name, None) is not None
    }


def load_texts(source: str | Path, data: Data, *, option: str | None = None) -> TextFile:
    """Read a file.

    Args:
        source: a file of JSON lines.
        data: what it is for; decides which shapes are right.
        option: the option that named it, for messages; None: that of `OPTIONS`.

    Raises:
        SuiteError: it is missing, empty or not UTF-8, or a row has another shape; names the line.
    """
    path, option = Path(source).expanduser(), option or OPTIONS[data]
    rows: list[Text | Pair] = []
    for number, line in _lines(path, option):
        record = _record(line, where=f"{path}:{number}", data=data)
        if not (number == 1 and "schema" in record):
            rows.append(_row(record, where=f"{path}:{number}", data=data))
    if not rows:
        raise SuiteError(f"{path}: there is no text for {option} in it", expected(data))
    return TextFile(data, str(source), tuple(rows))


def plan_texts(
    sources: Mapping[Data, str | Path], *, suites: Sequence[str | Path] = ()
) -> dict[Data, PlannedTexts]:
    """Check every file before any model is loaded.

    Args:
        sources: the files, by what they are for.
        suites: suites that are audited in the same run, as on the command line.

    Raises:
        SuiteError: a file is missing or malformed, or shares prompts with a suite of this run.
    """
    planned: dict[Data, PlannedTexts] = {}
    for data, source in sources.items():
        texts = load_texts(source, data)
        _refuse_overlap(texts, suites)
        unanswered = sum(isinstance(row, Text) and row.reply is None for row in texts.rows)
        lengths = [length for row in texts.rows for length in _lengths(row)]
        planned[data] = PlannedTexts(
            data,
            texts.source,
            texts.sha256,
            len(texts.rows),
            unanswered=unanswered,
            characters=sum(lengths),
            longest=max(lengths),
        )
    return planned


def _lengths(row: Text | Pair) -> list[int]:
    """Characters of the sequences that a row makes."""
    replies = (row.chosen, row.rejected) if isinstance(row, Pair) else (row.reply or "",)
    return [len(row.prompt) + len(reply) for reply in replies]


def withheld_words(suites: Sequence[str | Path], own: Iterable[str]) -> frozenset[str]:
    """Words that the prompts of harmful and safe suites have and none of ours has.

    Args:
        suites: as on the command line.
        own: the prompts that were given for calibration.

    Raises:
        SuiteError: a suite cannot be read.
    """
    asked: set[str] = set()
    for suite in (suite for source in suites for suite in read_suites(source)):
        if suite.kind in ("harmful", "safe"):
            asked.update(*(words_of(item.prompt) for item in suite.items))
    return frozenset(asked.difference(*map(words_of, own)))


def missing_data(data: Data, *, method: str) -> UsageError:
    """Make the error for texts that a method needs and that were not given."""
    about = {
        "safe": "prompts with refusals",
        "harmful": "harmful prompts with compliant answers",
        "task": "rows of the downstream task",
        "keep": "benign prompts whose answers must stay",
        "pairs": "prompts with a chosen and a rejected answer",
    }
    return UsageError(
        f"{method} needs {about[data]}", f"give them with {OPTIONS[data]} FILE: {_shapes(data)}"
    )


def expected(data: Data) -> str:
    """Say what the lines of a file must look like."""
    return f"write one JSON object per line: {_shapes(data)}"


def _shapes(data: Data) -> str:
    if data == "pairs":
        return _SHAPE_PAIR
    optional = "" if data in _ANSWERED else " (the response may be left out)"
    return f"{_SHAPE_ROW} or {_SHAPE_MESSAGES}{optional}"


def _refuse_overlap(texts: TextFile, suites: Sequence[str | Path]) -> None:
    prompts = {str(number): row.prompt for number, row in enumerate(texts.rows, start=1)}
    for suite in (suite for source in suites for suite in read_suites(source)):
        shared = overlap(prompts, [item.prompt for item in suite.items])
        if shared.ids:
            raise SuiteError(
                f"{texts.source} ({OPTIONS[texts.data]}) shares {shared.n_contaminated} prompts "
                f"with the suite {suite.name}, the first is row {shared.ids[0]}",
                "calibrate on prompts that are not measured: take other data or another suite",
            )


def _lines(path: Path, option: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SuiteError(
            f"{path}: the file of {option} cannot be read ({error.strerror})",
            "check the path",
        ) from None
    found: list[tuple[int, str]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise SuiteError(f"{path}:{number}: not UTF-8", "save the file as UTF-8") from None
        if text.strip():
            found.append((number, text))
    return found


def _record(line: str, *, where: str, data: Data) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SuiteError(f"{where}: not a JSON object ({error})", expected(data)) from None
    if not isinstance(record, dict):
        raise SuiteError(f"{where}: not a JSON object", expected(data))
    return cast("dict[str, Any]", record)


def _row(record: Mapping[str, Any], *, where: str, data: Data) -> Text | Pair:
    try:
        if data == "pairs":
            prompt, chosen, rejected = (
                _text(record, name) for name in ("prompt", "chosen", "rejected")
            )
            if chosen == rejected:
                raise ValueError("chosen and rejected are the same")
            return Pair(prompt, chosen, rejected)
        row = _of_messages(record["messages"]) if "messages" in record else _of_fields(record)
        if row.reply is None and data in _ANSWERED:
            raise ValueError('the reply is missing ("response")')
    except ValueError as error:
        raise SuiteError(f"{where}: {error}", expected(data)) from None
    return row


def _of_fields(record: Mapping[str, Any]) -> Text:
    if "chosen" in record or "rejected" in record:
        raise ValueError("a preference pair, where one reply is wanted")
    given = [name for name in _REPLY_KEYS if record.get(name) is not None]
    if len(given) > 1:
        raise ValueError('both "response" and "answer" are given')
    return Text(_text(record, "prompt"), _text(record, given[0]) if given else None)


def _of_messages(messages: Any) -> Text:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list of turns')
    turns = cast(list[Any], messages)
    roles: list[Any] = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise ValueError('a turn of "messages" is not an object')
        roles.append(cast(dict[str, Any], turn).get("role"))
    if roles not in (["user"], ["user", "assistant"]):
        raise ValueError(
            f'the roles of "messages" are {", ".join(map(str, roles))}: one user turn and its '
            "reply are wanted"
        )
    return Text(*(_text(turn, "content") for turn in turns))


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'no text in "{name}"')
    value.encode("utf-8")  # JSON can spell halves of surrogate pairs, which no tokenizer takes
    return value
