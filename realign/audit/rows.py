"""Rows of a table file: CSV, TSV, JSON lines or a JSON array, plain or gzipped, one at a time.

Here: from a file to rows of named values, with the place of every row for messages. Not here: what
the columns mean (`loaders`, `training_data`), nor realign's own suite format (`suites`).
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, cast

from realign.errors import SuiteError

FORMATS = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class Row:
    """One row of a table, by column."""

    where: str
    """`file:line` of its beginning; `file[index]` in a JSON array."""
    values: Mapping[str, Any]
    """Text in CSV; whatever JSON can say otherwise."""

    def text(self, column: str, *, needed_by: str) -> str:
        """The text of a column; empty where the cell is empty or null.

        Whole numbers are written out, for ids.

        Raises:
            SuiteError: the column is missing, or holds no text.
        """
        if column not in self.values:
            known = ", ".join(self.values) or "none"
            raise SuiteError(
                f"{self.where}: {needed_by} needs the column {column!r}",
                f"this file has: {known}; check that it is the published file",
            )
        value = self.values[column]
        if value is None:
            return ""
        if isinstance(value, str):
            return value
        if type(value) is int:
            return str(value)
        raise SuiteError(f"{self.where}: column {column!r} must be text", "check the file")


def file_format(path: Path) -> str:
    """The format that a file's name says, as one of `FORMATS`.

    Raises:
        SuiteError: it says none of them.
    """
    name = path.name.lower().removesuffix(".gz")
    found = next((each for each in FORMATS if name.endswith(each)), None)
    if found is None:
        raise SuiteError(
            f"{path}: rows are read from {', '.join(FORMATS)} files (or these with .gz)",
            "convert the file, or give it the ending of what it is",
        )
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of a file in their order, without holding a CSV or JSON lines file in memory.

    Raises:
        SuiteError: the file is missing, unreadable, not UTF-8 or malformed; names the row.
    """
    read = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl, ".json": _json}[file_format(path)]
    try:
        with _opened(path) as stream:
            yield from read(path, stream)
    except FileNotFoundError:
        raise SuiteError(f"{path}: there is no such file", "check the path") from None
    except UnicodeDecodeError:
        raise SuiteError(f"{path}: not UTF-8", "save the file as UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SuiteError(f"{path}: damaged gzip file ({error})", "fetch it again") from None
    except OSError as error:
        raise SuiteError(f"{path}: cannot be read ({error.strerror})", "check the path") from error


def _opened(path: Path) -> TextIOWrapper:
    # No translation of line ends: CSV cells may hold them, and JSON lines end in "\n" alone.
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _csv(path: Path, stream: TextIOWrapper, delimiter: str = ",") -> Iterator[Row]:
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path}:{line}", reader.line_num + 1
            if not cells:  # a blank line
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise SuiteError(f"{where}: the column {twice!r} occurs twice")
                continue
            if len(cells) != len(header):
                raise SuiteError(
                    f"{where}: {len(cells)} cells where the header has {len(header)}",
                    'put cells that hold commas or line ends into double quotes (")',
                )
            yield Row(where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise SuiteError(f"{path}:{line}: not CSV ({error})", "check the quotes there") from None


def _tsv(path: Path, stream: TextIOWrapper) -> Iterator[Row]:
    return _csv(path, stream, "\t")


def _jsonl(path: Path, stream: TextIOWrapper) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(where, _object(where, _parsed(where, line)))


def _json(path: Path, stream: TextIOWrapper) -> Iterator[Row]:
    whole = _parsed(str(path), stream.read())
    if not isinstance(whole, list):
        raise SuiteError(f"{path}: not a JSON array of rows", "JSON lines need the ending .jsonl")
    for index, each in enumerate(cast("list[Any]", whole)):
        where = f"{path}[{index}]"
        yield Row(where, _object(where, each))


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SuiteError(f"{where}: not JSON ({error})", "check the file") from None


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SuiteError(f"{where}: not a JSON object", "give one object of columns per row")
    return cast("dict[str, Any]", value)
