"""What must be true before a repair is committed, and what must be true of its numbers.

Post-conditions: every planned edit was carried out, once; the output holds exactly the planned
tensors; something changed; everything is finite. The checks that depend on files reread the
headers of what was written, not what we meant to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from realign.checkpoint.headers import read_header
from realign.checkpoint.writer import TensorSpec
from realign.errors import EmptyEditError, NonFiniteError
from realign.repair.apply import all_finite
from realign.repair.record import TensorRow


def check_input(tensor: Tensor, *, name: str, role: str, source: str) -> None:
    """Refuse NaN and infinity in what was read.

    Raises:
        NonFiniteError: names the tensor and the checkpoint.
    """
    if not all_finite(tensor):
        raise NonFiniteError(
            f"{name} of the {role} checkpoint {source} holds NaN or infinity",
            "that checkpoint is damaged: download, copy or train it again",
        )


def check_output(tensor: Tensor, *, name: str, dtype: str) -> None:
    """Refuse NaN and infinity in what is about to be written.

    Raises:
        NonFiniteError: names the tensor.
    """
    if not all_finite(tensor):
        raise NonFiniteError(
            f"the repaired {name} overflows {dtype}",
            "use a smaller strength, or a fine-tune in a wider dtype",
        )


def check_changed(rows: Sequence[TensorRow], *, patch: bool) -> None:
    """Refuse a run that changed nothing.

    Raises:
        EmptyEditError: every edit is zero, or was rounded away by the output's dtype.
    """
    if any(row.changed for row in rows):
        return
    tried = [row for row in rows if row.outcome == "edited" and row.edit_norm]
    if tried and patch:
        return  # a patch is added in the forward pass: rounding does not touch it
    if tried:
        raise EmptyEditError(
            f"the repair changed nothing: all {len(tried)} edits are smaller than what the "
            "output's dtype can tell apart",
            "raise the strength, write a patch (--patch), or repair a float32 fine-tune",
        )
    reasons = sorted({row.reason for row in rows if row.reason}) or ["every edit is zero"]
    raise EmptyEditError(
        f"the repair changed nothing: {'; '.join(reasons)}",
        "check the parameters and that the checkpoints are the ones you mean",
    )


def check_complete(planned: Sequence[str], rows: Sequence[TensorRow]) -> None:
    """Assert that every planned edit was carried out exactly once, and no other."""
    done = [row.key for row in rows]
    assert len(set(done)) == len(done), "an edit was carried out twice"
    missing, extra = set(planned) - set(done), set(done) - set(planned)
    assert not missing and not extra, f"not carried out: {missing}; not planned: {extra}"


def check_written(folder: Path, expected: Sequence[TensorSpec]) -> None:
    """Assert that a folder's weight files hold exactly the expected tensors."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, info in read_header(file).tensors.items():
            assert name not in found, f"{name} was written twice"
            found[name] = (info.dtype, info.shape)
    wanted = {spec.name: (spec.dtype, spec.shape) for spec in expected}
    wrong = {name for name in wanted | found if wanted.get(name) != found.get(name)}
    assert not wrong, f"not as planned: {sorted(wrong)}"
