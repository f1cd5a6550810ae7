from __future__ import annotations

import io

import pytest
from rich.console import Console

from realign_cli.progress import RichProgress, count_text


def terminal(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=is_terminal, width=100), stream


def test_bars_are_drawn_on_a_terminal_with_the_count_in_its_unit() -> None:
    console, stream = terminal(is_terminal=True)
    progress = RichProgress(console)
    with progress.task("editing", total=4, unit="matrices") as outer:
        outer.advance()
        with progress.task("hashing", total=2e6, unit="B") as inner:
            inner.advance(1e6)
            progress.note("resumed one shard")
            assert progress._bars is not None
            progress._bars.refresh()
    text = stream.getvalue()
    assert "editing" in text
    assert "1/4 matrices" in text
    assert "1.0/2.0 MB" in text
    assert "resumed one shard" in text
    assert progress._bars is None, "the display closes with its last task"


def test_a_failing_task_closes_the_display() -> None:
    console, _ = terminal(is_terminal=True)
    progress = RichProgress(console)
    with pytest.raises(KeyboardInterrupt), progress.task("editing", total=None):
        raise KeyboardInterrupt
    assert progress._bars is None


def test_a_log_gets_remarks_and_no_control_characters() -> None:
    console, stream = terminal(is_terminal=False)
    progress = RichProgress(console)
    with progress.task("short", total=1) as task:
        task.advance()
    progress.note("one remark")
    assert stream.getvalue() == "one remark\n"


def test_quiet_shows_nothing() -> None:
    console, stream = terminal(is_terminal=True)
    progress = RichProgress(console, quiet=True)
    with progress.task("editing", total=1) as task:
        task.advance()
    progress.note("one remark")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("done", "total", "unit", "text"),
    [
        (3, 12, "prompts", "3/12 prompts"),
        (3, None, "", "3"),
        (512, 1000, "B", "0.5/1.0 kB"),
        (0, 0, "B", "0.0/0.0 B"),
        (2.5e9, None, "B", "2.5 GB"),
    ],
)
def test_counts(done: float, total: float | None, unit: str, text: str) -> None:
    assert count_text(done, total=total, unit=unit) == text
