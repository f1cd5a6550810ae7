"""Every error realign raises on purpose.

    RealignError                      exit 2 unless said otherwise; message + hint, for people
    |-- UsageError                    a missing, unknown or out-of-range option or parameter
    |   `-- MissingExtraError         an optional dependency is not installed
    |-- CheckpointError               something is wrong with a checkpoint
    |   |-- NotFoundError             the path or Hub id does not lead to a checkpoint
    |   |-- HeaderError               truncated, corrupt or hostile safetensors or index
    |   |-- InputChangedError         a file was written to while it was being read
    |   |-- MismatchError             checkpoints do not fit each other: names, shapes, dtypes
    |   `-- NonFiniteError            NaN or infinity where numbers must be finite
    |-- NothingToDoError              visible before any tensor is read: aligned = base, ...
    |-- AlreadyRepairedError          the manifest shows the same repair
    |-- OutputError                   target exists, disk full, not writable, locked
    |-- SuiteError                    an empty or malformed suite, duplicate ids
    |-- PolicyError                   an unreadable policy, an unknown key
    |-- ModelError                    a checkpoint that cannot run: no chat template, unknown class
    |-- EmptyEditError                exit 1: the run changed nothing
    `-- GateFailedError               exit 1: the policy's gates did not pass

Raise these for what the user can cause, and `assert` for what only we can cause.
"""

from __future__ import annotations

from typing import ClassVar


class RealignError(Exception):
    """An error with one clear message and, where there is one, the next step.

    Attributes:
        message: what is wrong, naming the file or tensor.
        hint: what to do about it; may be empty.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UsageError(RealignError):
    """A missing, unknown or out-of-range option or parameter."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed", f"install it with: pip install 'realign-llm[{extra}]'"
        )


class CheckpointError(RealignError):
    """Something is wrong with a checkpoint."""


class NotFoundError(CheckpointError):
    """The path or Hub id does not lead to a checkpoint."""


class HeaderError(CheckpointError):
    """A safetensors file or index that is truncated, corrupt or hostile."""


class InputChangedError(CheckpointError):
    """An input file was written to, replaced or removed while a run was reading it."""


class MismatchError(CheckpointError):
    """Checkpoints that do not fit each other: names, shapes or dtypes."""


class NonFiniteError(CheckpointError):
    """NaN or infinity where numbers must be finite."""


class NothingToDoError(RealignError):
    """There is nothing to repair, visible before any tensor is read or written."""


class AlreadyRepairedError(RealignError):
    """The subject's manifest shows the same repair."""


class OutputError(RealignError):
    """The output cannot be written: it exists, the disk is full, another run holds it."""


class SuiteError(RealignError):
    """A suite that is empty or malformed."""


class PolicyError(RealignError):
    """A policy that cannot be read or names what does not exist."""


class ModelError(RealignError):
    """A checkpoint that cannot be run."""


class EmptyEditError(RealignError):
    """The run ended without changing anything."""

    exit_code = 1


class GateFailedError(RealignError):
    """A required gate of the policy failed or is inconclusive; nothing was committed."""

    exit_code = 1
