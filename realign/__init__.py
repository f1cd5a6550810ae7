"""realign: repair and audit fine-tuned language models that lost their safety training.

Repair a fine-tune, then measure what it cost and what it brought:

    >>> import realign
    >>> result = realign.repair(
    ...     "family/both_p5",
    ...     aligned="family/aligned",
    ...     base="family/base",
    ...     method="replace",
    ...     settings={"rank": 4},
    ...     out="repaired",
    ... )
    >>> result.totals.edited > 0
    True
    >>> report = realign.audit(
    ...     "family/both_p5",
    ...     reference="family/aligned",
    ...     repaired="repaired",
    ...     suites=["family/suites/harmful.jsonl"],
    ...     out="audit",
    ... )
    >>> before = report.rate(role="subject", suite="harmful", metric="asr").rate
    >>> after = report.rate(role="repaired", suite="harmful", metric="asr").rate
    >>> after < before
    True
    >>> with realign.open_checkpoint("repaired") as checkpoint:
    ...     checkpoint.read("model.norm.weight").shape
    torch.Size([128])

Everything that can go wrong on purpose is a `realign.errors.RealignError`: one message, one hint.
"""

from __future__ import annotations

# `realign.repair`, `realign.audit` and `realign.diff` are rooms of the library and also functions.
# The packages (docstrings only) are imported first, which binds them here; the functions of `api`
# then take the names over. Later imports of `realign.audit.x` find the package in `sys.modules` and
# do not touch these names again. So `from realign.audit.schema import Report` works as ever, and
# `realign.audit` is the function.
import realign.audit  # pyright: ignore[reportUnusedImport]
import realign.diff  # pyright: ignore[reportUnusedImport]
import realign.repair  # noqa: F401 # pyright: ignore[reportUnusedImport]
from realign._version import __version__
from realign.api import audit, diff, open_checkpoint, plan, repair, repair_several
from realign.errors import RealignError

__all__ = [
    "RealignError",
    "__version__",
    "audit",
    "diff",
    "open_checkpoint",
    "plan",
    "repair",
    "repair_several",
]
