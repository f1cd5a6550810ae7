"""Imports of large libraries: cheap for the collector, without an effect on anything else."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from realign_cli.imports import swift_imports


def test_what_was_imported_is_left_out_of_later_collections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "never_imported_before.py").write_text("things = [[] for _ in range(1000)]\n")
    code = (
        "import gc, sys\n"
        "from realign_cli.imports import swift_imports\n"
        "assert gc.get_freeze_count() == 0\n"
        "with swift_imports():\n"
        "    assert not gc.isenabled()\n"
        "    import never_imported_before\n"
        "assert gc.isenabled()\n"
        "assert gc.get_freeze_count() > 1000\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_kept_where_nothing_was_imported() -> None:
    before = gc.get_freeze_count()
    with swift_imports():
        import json  # noqa: F401
    assert gc.get_freeze_count() == before
    assert gc.isenabled()


def test_the_collector_works_again_after_an_error() -> None:
    with pytest.raises(ImportError), swift_imports():
        import there_is_no_such_module  # pyright: ignore[reportMissingImports]  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with swift_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
