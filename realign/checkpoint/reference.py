"""What a user types to name a checkpoint, parsed: a path, a Hub id, a pinned revision, an adapter.

Here: text to parts. Not here: finding the files (`hub`) and reading them (`reader`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from realign.errors import NotFoundError, UsageError

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True)
class Reference:
    """One checkpoint as the user names it.

    Accepted: a folder; `org/name`; `org/name@revision`; `hf://org/name@revision`; and
    `MODEL+ADAPTER`, where both sides are one of these.
    """

    text: str
    model: str
    """A path or a Hub id, without revision."""
    revision: str | None
    adapter: str | None
    """The right-hand side of MODEL+ADAPTER, not yet parsed."""
    is_local: bool


def parse_reference(text: str | Path) -> Reference:
    """Parse what the user typed; an existing path wins over every other reading.

    Raises:
        UsageError: the text is empty.
        NotFoundError: it is neither an existing folder nor of the form of a Hub id.
    """
    written = str(text)
    if not written.strip():
        raise UsageError("an empty checkpoint name", "give a folder or a Hub id")
    if Path(written).expanduser().exists():
        return Reference(written, written, None, None, True)
    for position in (i for i, letter in enumerate(written) if letter == "+"):
        left, right = written[:position], written[position + 1 :]
        if left and right and _looks_real(left) and _looks_real(right):
            model = parse_reference(left)
            return Reference(written, model.model, model.revision, right, model.is_local)
    plain = written.removeprefix("hf://")
    model, _, revision = plain.partition("@")
    if _is_hub_id(model) and not written.startswith((".", "/", "~")):
        return Reference(written, model, revision or None, None, False)
    raise NotFoundError(f"{written} does not exist", _suggestion(Path(written).expanduser()))


def _looks_real(text: str) -> bool:
    plain = text.removeprefix("hf://").partition("@")[0]
    return Path(text).expanduser().exists() or _is_hub_id(plain)


def _is_hub_id(text: str) -> bool:
    return bool(_HUB_ID.fullmatch(text)) and "/" in text and ".." not in text and "--" not in text


def _suggestion(path: Path) -> str:
    from difflib import get_close_matches

    parent = path.parent
    if parent.is_dir():
        close = get_close_matches(path.name, [p.name for p in parent.iterdir()], n=1, cutoff=0.6)
        if close:
            return f"did you mean {parent / close[0]}?"
        return "give a folder that exists, or a Hub id of the form org/name"
    return f"the folder {parent} does not exist either"
