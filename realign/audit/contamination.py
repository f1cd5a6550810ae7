"""Whether two sets of prompts share prompts, so that nothing is measured on what calibrated it.

Two prompts match when, lower-cased and with whitespace collapsed, they are equal or share 13
consecutive words. One published repair was evaluated on 520 prompts of which 500 stood in its own
calibration file; a match here drops the item from the headline and is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

RUN_WORDS = 13


def normalise(prompt: str) -> str:
    """Lower-cased, with every run of whitespace made one space."""
    return " ".join(prompt.lower().split())


class PromptIndex:
    """Prompts to match against: calibration anchors, or the declared training data."""

    def __init__(self, prompts: Iterable[str]) -> None:
        self._whole: set[str] = set()
        self._runs: set[str] = set()
        for prompt in prompts:
            text = normalise(prompt)
            self._whole.add(text)
            self._runs.update(_runs(text))

    def matches(self, prompt: str) -> bool:
        """Whether the prompt equals one of ours or shares 13 consecutive words with one."""
        text = normalise(prompt)
        return text in self._whole or any(run in self._runs for run in _runs(text))


@dataclass(frozen=True)
class Overlap:
    """What of one prompt set occurs in another."""

    n: int
    """Prompts looked at."""
    ids: tuple[str, ...]
    """Ids of those that match, in the order given."""

    @property
    def n_contaminated(self) -> int:
        """How many match."""
        return len(self.ids)


def words_of(prompt: str) -> frozenset[str]:
    """The words of a prompt in lower case, without punctuation."""
    return frozenset(re.findall(r"\w+", prompt.lower()))


def overlap(items: Mapping[str, str], against: Iterable[str] | PromptIndex) -> Overlap:
    """Which items (id -> prompt) match any of the other prompts.

    The relation is symmetric: an item matches a prompt exactly when that prompt matches the item.
    """
    index = against if isinstance(against, PromptIndex) else PromptIndex(against)
    return Overlap(
        n=len(items), ids=tuple(name for name, prompt in items.items() if index.matches(prompt))
    )


class ItemIndex:
    """Items to look for in a long stream of texts: memory follows the items, not the stream."""

    def __init__(self, items: Mapping[str, str]) -> None:
        self._whole: dict[str, set[str]] = {}
        self._parts: dict[str, set[str]] = {}
        for name, prompt in items.items():
            text = normalise(prompt)
            self._whole.setdefault(text, set()).add(name)
            for run in _runs(text):
                self._parts.setdefault(run, set()).add(name)

    def found_in(self, prompts: Iterable[str]) -> frozenset[str]:
        """The ids of the items that match any of the prompts, as `overlap` would name them."""
        found: set[str] = set()
        for prompt in prompts:
            text = normalise(prompt)
            found |= self._whole.get(text, set())
            if self._parts:
                found.update(*(self._parts[run] for run in _runs(text) if run in self._parts))
        return frozenset(found)


def duplicates(items: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Pairs of ids within one set whose prompts match, each later item with its first match."""
    whole: dict[str, str] = {}
    runs: dict[str, str] = {}
    found: list[tuple[str, str]] = []
    for name, prompt in items.items():
        text = normalise(prompt)
        parts = list(_runs(text))
        first = whole.get(text) or next((runs[run] for run in parts if run in runs), None)
        if first is not None:
            found.append((first, name))
        whole.setdefault(text, name)
        for run in parts:
            runs.setdefault(run, name)
    return tuple(found)


def _runs(text: str) -> Iterable[str]:
    words = text.split(" ")
    return (" ".join(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1))
