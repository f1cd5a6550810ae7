"""Room on a disk is told in units that a reader can compare."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from realign.checkpoint.space import require_space, size_text
from realign.errors import OutputError


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (4096, "4.1 kB"), (958_000, "958.0 kB"), (2_600_000, "2.6 MB"),
     (16_060_000_000, "16.1 GB"), (3 * 10**12, "3.0 TB")],
)  # fmt: skip
def test_units_go_with_the_size(count: int, text: str) -> None:
    assert size_text(count) == text


def test_both_sizes_are_said_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free, needed, says in (
        (4096, 1_200_000, "4.1 kB free, the output needs 1.2 MB"),
        (1_199_999, 1_200_000, "1,199,999 bytes free, the output needs 1,200,000 bytes"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        with pytest.raises(OutputError) as caught:
            require_space(tmp_path, needed)
        assert caught.value.message == f"{tmp_path} has {says}"
        require_space(tmp_path, free)
