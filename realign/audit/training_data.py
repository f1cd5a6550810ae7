"""What the subject was trained on, as its owner declares it: a stream of the prompts in a file.

Here: the usual shapes of training rows, read for what a user asks. Not here: comparing them with a
suite (`contamination`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from realign.audit.rows import Row, file_format, read_rows
from realign.audit.suite_sources import local_file
from realign.errors import SuiteError
from realign.progress import SILENT, Progress

_CHATS = ("messages", "conversations", "conversation")
_ASKED = ("prompt", "instruction", "question", "query")
_KNOWN = (*_CHATS, *_ASKED, "text")
_USER = frozenset(("user", "human", "prompter"))


@dataclass(frozen=True)
class TrainingData:
    """One declared file."""

    path: Path
    source: str
    """As the user named it."""
    revision: str | None = None
    """The commit of a file from the Hub."""

    def prompts(self) -> Iterator[str]:
        """Every prompt of the file, one at a time.

        What a user says in a chat, each turn on its own; `prompt`, `instruction`, `question` or
        `query`, with and without its `input`; where there is only `text`, the whole of it.

        Raises:
            SuiteError: the file is malformed, or a row has none of these.
        """
        for row in read_rows(self.path):
            yield from _prompts(row)


def declared_training(
    source: str | Path, *, offline: bool = False, progress: Progress = SILENT
) -> TrainingData:
    """Find declared training data: a file, or `hf://datasets/org/name@COMMIT/path`.

    Raises:
        SuiteError: there is no such file, or none that rows are read from.
        UsageError, NotFoundError: as `realign.audit.suite_sources.local_file`.
    """
    file = local_file(source, offline=offline, progress=progress)
    file_format(file.path)
    if not file.path.is_file():
        raise SuiteError(f"{file.path}: there is no such training data", "check the path")
    return TrainingData(file.path, file.source, file.revision)


def _prompts(row: Row) -> Iterator[str]:
    values = row.values
    chat = next((values[name] for name in _CHATS if isinstance(values.get(name), list)), None)
    if chat is not None:
        yield from _user_turns(row, cast("list[Any]", chat))
        return
    for name in _ASKED:
        asked = values.get(name)
        if isinstance(asked, list):  # a chat up to the answer
            yield from _user_turns(row, cast("list[Any]", asked))
            return
        if isinstance(asked, str):
            yield asked
            more = values.get("input")
            if isinstance(more, str) and more.strip():
                yield more
                yield f"{asked}\n{more}"
            return
    whole = values.get("text")
    if not isinstance(whole, str):
        raise SuiteError(
            f"{row.where}: the row holds no prompt that is known",
            f"one of these columns is needed: {', '.join(_KNOWN)}",
        )
    yield whole


def _user_turns(row: Row, turns: Iterable[Any]) -> Iterator[str]:
    for turn in turns:
        if not isinstance(turn, dict):
            raise SuiteError(
                f"{row.where}: a message is no object", 'write {"role": ..., "content": ...}'
            )
        each = cast("Mapping[str, Any]", turn)
        if each.get("role", each.get("from")) not in _USER:
            continue
        content = each.get("content", each.get("value"))
        if isinstance(content, list):  # parts of a message, of which some are text
            content = "".join(map(_text_of, cast("list[Any]", content)))
        if isinstance(content, str):
            yield content


def _text_of(part: Any) -> str:
    """The text of one part of a message; an image has none."""
    text = cast("dict[str, Any]", part).get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""
