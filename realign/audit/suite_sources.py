"""What a user types after `--suite`, read: a file of ours, or a published file by its name.

Here: which reader a source goes to. Not here: the readers (`suites`, `loaders`).
"""

from __future__ import annotations

from pathlib import Path

from realign.audit.loaders import PUBLIC_SUITES, load_public
from realign.audit.suites import Suite, load_suite, parse_suite_argument
from realign.errors import UsageError


def read_suites(argument: str | Path) -> tuple[Suite, ...]:
    """Read one `--suite` argument.

    Args:
        argument: `FILE`, `KIND=FILE` (JSON lines of realign) or `NAME=FILE` (a published file).

    Returns:
        One suite; XSTest gives two.

    Raises:
        UsageError: no such kind or name, or a file that needs one.
        SuiteError: the file cannot be read as what it is said to be.
    """
    text = str(argument)
    head, separator, tail = text.partition("=")
    if separator and head in PUBLIC_SUITES:
        return load_public(head, tail)
    kind, path = parse_suite_argument(text, known=tuple(PUBLIC_SUITES))
    if path.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        raise UsageError(
            f"--suite {text}: realign's own suites are JSON lines (.jsonl)",
            f"for a published file write NAME={path} with a name of: {', '.join(PUBLIC_SUITES)}",
        )
    return (load_suite(path, kind=kind),)
