from __future__ import annotations

import errno

import pytest

from realign import errors
from realign_cli.errors import explain, report


def all_errors() -> list[type[errors.RealignError]]:
    found: list[type[errors.RealignError]] = []
    queue = [errors.RealignError]
    while queue:
        kind = queue.pop()
        found.append(kind)
        queue += kind.__subclasses__()
    return found


@pytest.mark.parametrize("kind", all_errors())
def test_every_error_of_ours_keeps_its_message_hint_and_code(
    kind: type[errors.RealignError],
) -> None:
    if kind is errors.MissingExtraError:
        error: errors.RealignError = errors.MissingExtraError("peft", "train")
    else:
        error = kind("model.safetensors is truncated", "download it again")
    failure = explain(error)
    assert (failure.message, failure.hint) == (error.message, error.hint)
    assert failure.exit_code == kind.exit_code


def test_only_findings_exit_with_1() -> None:
    ones = {kind.__name__ for kind in all_errors() if kind.exit_code == 1}
    assert ones == {"EmptyEditError", "GateFailedError"}
    assert all(kind.exit_code in (1, 2) for kind in all_errors())


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (MemoryError(), "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), "the disk is full: /out/x"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "permission denied: /out"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), "/x"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "peft is not installed"),
    ],
)
def test_the_environments_faults_have_words(error: BaseException, says: str) -> None:
    failure = explain(error)
    assert says in failure.message
    assert failure.exit_code == 2
    assert "fault in realign" not in failure.hint


def test_a_fault_of_ours_is_one_line_and_names_the_way_to_the_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("REALIGN_DEBUG", raising=False)
    lines: list[str] = []
    assert report(ValueError("two\nlines"), lines.append) == 2
    assert lines[0] == "error: ValueError: two lines"
    assert "REALIGN_DEBUG=1" in lines[1]
    assert len(lines) == 2


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALIGN_DEBUG", "1")
    lines: list[str] = []
    try:
        raise errors.UsageError("wrong", "do this")
    except errors.UsageError as error:
        report(error, lines.append)
    assert "Traceback" in lines[0]
    assert "test_error_table.py" in lines[0]
