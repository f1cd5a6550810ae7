"""Where every character of output goes.

Data (tables, JSON, paths) goes to standard output; progress, remarks and errors go to standard
error, so that `realign audit --json | jq` always sees JSON and nothing else. Commands never print
by themselves. What does not live here: what a table looks like (`realign.report`) and which message
an exception gets (`errors.py`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from realign_cli.progress import RichProgress

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from realign.progress import Progress


@dataclass
class Sink:
    """The output of one command run.

    Attributes:
        as_json: standard output carries one JSON document and nothing for people.
        quiet: no progress, no remarks; data, warnings and errors remain.
    """

    as_json: bool = False
    quiet: bool = False
    _documents: int = field(default=0, repr=False)

    @cached_property
    def out(self) -> Console:
        """The console on standard output."""
        return make_console(stderr=False)

    @cached_property
    def err(self) -> Console:
        """The console on standard error."""
        return make_console(stderr=True)

    @cached_property
    def progress(self) -> Progress:
        """What library functions report to: bars on a terminal, one line per task elsewhere."""
        return RichProgress(self.err, quiet=self.quiet)

    def document(self, value: Mapping[str, object] | Sequence[object]) -> None:
        """Write the command's one JSON document, if `--json` was given."""
        if not self.as_json:
            return
        assert self._documents == 0, "a command writes one JSON document"
        self._documents += 1
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        sys.stdout.flush()

    def show(self, *renderables: RenderableType) -> None:
        """Write tables or text for people to standard output; silent under `--json`."""
        if not self.as_json:
            for renderable in renderables:
                self.out.print(renderable, soft_wrap=_has_long_word(renderable, self.out.width))

    def line(self, text: str) -> None:
        """Write one unstyled, unwrapped line of data for people to standard output."""
        if not self.as_json:
            self.out.print(text, markup=False, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Write a passing remark to standard error, unless `--quiet`."""
        if not self.quiet:
            # Unwrapped: a hint is a command to be copied.
            self.err.print(text, markup=False, highlight=False, style="dim", soft_wrap=True)

    def fail(self, text: str) -> None:
        """Write one line of an error to standard error."""
        self.err.print(text, markup=False, highlight=False, style="red", soft_wrap=True)

    def warning(self, text: str) -> None:
        """Write a warning to standard error, also under `--quiet`."""
        self.err.print(
            f"warning: {text}", markup=False, highlight=False, style="yellow", soft_wrap=True
        )


def _has_long_word(renderable: RenderableType, width: int) -> bool:
    """Whether wrapping would break a name or a path: such a line is left to the terminal."""
    from rich.text import Text

    if not isinstance(renderable, str | Text):
        return False  # tables decide for themselves
    return any(len(word) > width for word in str(renderable).split())


def make_console(*, stderr: bool) -> Console:
    """Return a console that respects NO_COLOR, TERM=dumb and the width of a pipe.

    A pipe has no width: 120 columns keep tables whole in a log. COLUMNS overrides it.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else 120
    return Console(stderr=stderr, width=width, highlight=False)
