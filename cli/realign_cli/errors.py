"""One table from exception to message, next step and exit code.

    0  done, and within policy
    1  findings: a gate failed or is inconclusive, an edit that changed nothing
    2  could not complete: usage, input, environment, interruption, a fault of ours

No command catches exceptions by itself; `command.py` sends them all here. REALIGN_DEBUG=1 shows the
traceback of any of them.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace

from realign.errors import MissingExtraError, RealignError

DEBUG_VARIABLE = "REALIGN_DEBUG"
_EXTRA_OF_PACKAGE = {"peft": "train", "accelerate": "train", "optuna": "tune"}


@dataclass(frozen=True)
class Failure:
    """What is shown and returned for one exception."""

    message: str
    hint: str
    exit_code: int


def explain(error: BaseException) -> Failure:
    """Return what to tell the user about `error`."""
    for kind, describe in _TABLE:
        if isinstance(error, kind):
            failure = describe(error)
            if failure is not None:
                # What a room below knows about the way out: an audit says where answers are kept.
                notes: list[str] = getattr(error, "__notes__", [])
                hint = "\n".join(filter(None, (failure.hint, *notes)))
                return replace(failure, hint=hint)
    return _unexpected(error)


def report(error: BaseException, write: Callable[[str], None]) -> int:
    """Write the lines for `error` and return the exit code."""
    failure = explain(error)
    if not failure.message:
        return failure.exit_code
    if os.environ.get(DEBUG_VARIABLE):
        write("".join(traceback.format_exception(error)).rstrip())
    write(f"error: {_printable(failure.message)}")
    for line in failure.hint.splitlines():
        write(f"  {_printable(line)}")
    return failure.exit_code


def _printable(text: str) -> str:
    """One line that no name of a file or tensor can break or colour."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in text
    )


def _from_realign(error: BaseException) -> Failure | None:
    assert isinstance(error, RealignError)
    return Failure(error.message, error.hint, error.exit_code)


def _interrupted(_error: BaseException) -> Failure | None:
    return Failure(
        "interrupted", "nothing was committed; the same command resumes finished work", 2
    )


def _out_of_memory(error: BaseException) -> Failure | None:
    detail = str(error).splitlines()[0] if str(error) else "the machine has no memory left"
    return Failure(
        f"out of memory: {detail}",
        "try --device cpu, a smaller --batch-size, or a machine with more memory",
        2,
    )


def _device_memory(error: BaseException) -> Failure | None:
    # torch.OutOfMemoryError, by name: this module must not import torch.
    if type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower():
        return _out_of_memory(error)
    return None


def _missing_package(error: BaseException) -> Failure | None:
    assert isinstance(error, ModuleNotFoundError)
    package = (error.name or "").partition(".")[0]
    if package in _EXTRA_OF_PACKAGE:
        return _from_realign(MissingExtraError(package, _EXTRA_OF_PACKAGE[package]))
    return None


def _operating_system(error: BaseException) -> Failure | None:
    assert isinstance(error, OSError)
    where = f": {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Failure(
            f"the disk is full{where}",
            "free some space or choose another -o; nothing was committed",
            2,
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return Failure(f"permission denied{where}", "choose a folder you may read and write", 2)
    if error.errno is not None:
        return Failure(f"{error.strerror}{where}", "", 2)
    return None


def _usage(error: BaseException) -> Failure | None:
    """What the parser refuses; known by its shape, because typer's class has moved before."""
    describe = getattr(error, "format_message", None)
    if describe is None:
        return None
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has been shown
        return Failure("", "", 2)
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "realign"
    return Failure(" ".join(str(describe()).split()).rstrip("."), f"see: {path} --help", 2)


def _unexpected(error: BaseException) -> Failure:
    detail = " ".join(str(error).split()) or "no further detail"
    return Failure(
        f"{type(error).__name__}: {detail}",
        f"this is a fault in realign; run again with {DEBUG_VARIABLE}=1 for the traceback",
        2,
    )


_TABLE: tuple[tuple[type[BaseException], Callable[[BaseException], Failure | None]], ...] = (
    (RealignError, _from_realign),
    (KeyboardInterrupt, _interrupted),
    (MemoryError, _out_of_memory),
    (ModuleNotFoundError, _missing_package),
    (OSError, _operating_system),
    (RuntimeError, _device_memory),
    (Exception, _usage),
)
