"""What every refusal must be: one short message with a next step, nothing changed, nothing left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.cli_support import FAMILY, Outcome, digest, family_options, model, realign

LONGEST = 3
"""Lines of a message with its hint."""


def refused(result: Outcome, *says: str | Path, code: int = 2, hint: bool = True) -> None:
    """One message on standard error that names the fault, and a next step; no data."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "fault in realign" not in result.stderr, result.stderr
    for part in says:
        assert str(part) in result.words, result.stderr
    message, _, step = result.stderr[result.stderr.index("error: ") :].partition("\n")
    assert len(message) > len("error: ")
    assert step.strip() or not hint, "a message without a next step"
    assert len(step.splitlines()) < LONGEST, result.stderr


@contextmanager
def untouched(*inputs: Path) -> Iterator[None]:
    """No file of these folders, nor of the family, is changed, made or removed inside."""
    before = [digest(folder) for folder in (FAMILY, *inputs)]
    yield
    assert [digest(folder) for folder in (FAMILY, *inputs)] == before, "an input was changed"


def repair(
    output: str | Path,
    finetuned: str | Path | None = None,
    *options: str | Path,
    **family: str | Path | None,
) -> Outcome:
    """`realign repair` with the quickest method on the tiny family, or on what is given."""
    return realign(
        "repair",
        finetuned or model(),
        *family_options(**family),
        *("--method", "replace", "--device", "cpu", "--quiet", "-o", output),
        *options,
    )


def repair_at_work(
    tmp_path: Path,
    finetuned: str | Path | None = None,
    *options: str | Path,
    **family: str | Path | None,
) -> Outcome:
    """The same into `tmp_path/work/out`."""
    return repair(tmp_path / "work" / "out", finetuned, *options, **family)


@contextmanager
def nothing_left(work: Path) -> Iterator[None]:
    """A new folder in which tests write `out`: it ends up empty, and the family untouched."""
    work.mkdir()
    with untouched():
        yield
    left = [path.name for path in work.iterdir()]
    assert not left, f"left behind: {left}"
