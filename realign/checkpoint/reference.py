"""What a user types to name a checkpoint, parsed: a path, a Hub id, a pinned revision, an adapter.

Here: text to parts. Not here: finding the files (`hub`) and reading them (`reader`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from realign.errors import NotFoundError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# A revision may hold slashes only as the Hub's own refs; what else follows a slash is a subfolder.
_REVISION = re.compile(r"(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+)(?:/(?P<sub>.+))?")
_HUB = "hf://"


@dataclass(frozen=True)
class Reference:
    """One checkpoint as the user names it.

    Accepted: a folder; `org/name`; `org/name@revision`; `hf://org/name@revision/subfolder`; and
    `MODEL+ADAPTER`, where both sides are one of these.
    """

    text: str
    model: str
    """A path or a Hub id, without revision."""
    revision: str | None
    adapter: str | None
    """The right-hand side of MODEL+ADAPTER, not yet parsed."""
    is_local: bool
    subfolder: str | None = None
    """A folder inside a Hub repository."""


def parse_reference(text: str | Path) -> Reference:
    """Parse what the user typed; an existing path wins over every other reading.

    Raises:
        UsageError: the text is empty.
        NotFoundError: it is neither an existing path nor of the form of a Hub id; the hint names
            what is spelled alike.
    """
    written = str(text)
    if not written.strip():
        raise UsageError("an empty checkpoint name", "give a folder or a Hub id")
    if _exists(written):
        return Reference(written, written, None, None, True)
    pair = _split_adapter(written)
    if pair is not None:
        model = parse_reference(pair[0])
        return Reference(
            written, model.model, model.revision, pair[1], model.is_local, model.subfolder
        )
    found = _parse_hub(written)
    if found is None or _looks_mistyped(written):
        raise NotFoundError(f"{written} does not exist", _suggestion(written))
    return found


def _exists(text: str) -> bool:
    if text.startswith(_HUB):
        return False
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
        return False


def _split_adapter(written: str) -> tuple[str, str] | None:
    """The two sides of MODEL+ADAPTER, where both can be read; a path may hold a plus of its own."""
    for position in (i for i, letter in enumerate(written) if letter == "+"):
        left, right = written[:position], written[position + 1 :]
        sides = [_exists(side) or _parse_hub(side) is not None for side in (left, right)]
        if all(sides):
            return left, right
        if any(sides) and left and right:
            missing = right if sides[0] else left
            raise NotFoundError(f"{missing} does not exist", _suggestion(missing))
    return None


def _parse_hub(written: str) -> Reference | None:
    if written.startswith((".", "/", "~")):
        return None
    plain = written.removeprefix(_HUB)
    model, at, rest = plain.partition("@")
    subfolder: str | None = None
    if not at and written.startswith(_HUB):
        model, subfolder = "/".join(model.split("/")[:2]), "/".join(model.split("/")[2:]) or None
    if not _HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        return None
    if not at:
        return Reference(written, model, None, None, False, subfolder)
    found = _REVISION.fullmatch(rest)
    if found is None or ".." in rest:
        return None
    return Reference(written, model, found["revision"], None, False, found["sub"])


def _looks_mistyped(written: str) -> bool:
    """Whether `folder/nam` more likely means a local `folder/name` than a Hub id."""
    if written.startswith(_HUB) or "@" in written:
        return False
    path = Path(written)
    return path.parent.is_dir() and bool(_close(path))


def _close(path: Path) -> list[str]:
    try:
        names = [each.name for each in path.parent.iterdir() if each.is_dir()]
    except OSError:
        return []
    return get_close_matches(path.name, names, n=3, cutoff=0.6)


def _suggestion(written: str) -> str:
    plain = written.removeprefix(_HUB)
    if "/" not in plain and "\\" not in plain and not _close(Path(plain)):
        return "give a folder that exists, or a Hub id of the form org/name"
    try:
        path = Path(written).expanduser()
        close = _close(path)
        parent_exists = path.parent.is_dir()
    except (OSError, ValueError, RuntimeError):
        return "give a folder that exists, or a Hub id of the form org/name"
    if close:
        known = " or ".join(str(path.parent / name) for name in close)
        hub = f"; for the Hub, write {_HUB}{plain}" if _HUB_ID.fullmatch(plain) else ""
        return f"did you mean {known}?{hub}"
    if parent_exists:
        return "give a folder that exists, or a Hub id of the form org/name"
    return f"the folder {path.parent} does not exist either"
