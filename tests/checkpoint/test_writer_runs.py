"""The output folder as runs see it: whole or absent, exclusive, resumed by content."""

from __future__ import annotations

import errno
import fcntl
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.checkpoint_support import Notes, load_folder
from support.writer_support import TENSORS, copy_of, fill, leftovers, sharded_model

from realign.checkpoint.claim import Claim
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.writer import (
    OutputFolder,
    plan_layout,
)
from realign.errors import OutputError


@pytest.fixture
def model(tmp_path: Path) -> Checkpoint:
    return sharded_model(tmp_path / "in" / "model")


def test_targets_that_are_refused(model: Checkpoint, tmp_path: Path) -> None:
    inputs = [model.folder]
    inside = model.folder / "out"
    taken = tmp_path / "taken"
    taken.mkdir()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    through = tmp_path / "through"
    through.symlink_to(model.folder)
    file = tmp_path / "file"
    file.write_text("")
    before = sorted(model.folder.iterdir())
    for target, message in (
        (taken, "exists already"),
        (dangling, "exists already"),
        (file, "exists already"),
        (inside, "lies inside the input"),
        (through / "out", "lies inside the input"),
        (model.folder, "is the input"),
        (through, "is the input"),
        (file / "out", "cannot be written"),
    ):
        with (
            pytest.raises(OutputError, match=message),
            OutputFolder(target, fingerprint="f", inputs=inputs),
        ):
            pass
    assert sorted(model.folder.iterdir()) == before
    assert leftovers(tmp_path) == {"in", "taken", "dangling", "through", "file"}


def test_an_error_leaves_nothing(model: Checkpoint, tmp_path: Path) -> None:
    layout = plan_layout(model)
    place = tmp_path / "new" / "place"
    with (
        pytest.raises(ZeroDivisionError),
        OutputFolder(place / "out", fingerprint="f", layout=layout) as output,
    ):
        fill(output, layout[0], model)
        raise ZeroDivisionError
    assert not place.parent.exists()
    with OutputFolder(place / "out", fingerprint="f", layout=layout) as output:
        fill(output, layout[0], model)  # left without commit
    assert not place.parent.exists()


def test_two_runs_on_one_target(model: Checkpoint, tmp_path: Path) -> None:
    layout = plan_layout(model)
    target = tmp_path / "out"
    with OutputFolder(target, fingerprint="f", layout=layout) as first:
        fill(first, layout[0], model)
        with (
            pytest.raises(OutputError, match="another run is writing"),
            OutputFolder(target, fingerprint="f", layout=layout),
        ):
            pass
        assert first.is_done(layout[0])
        for each in layout[1:]:
            fill(first, each, model)
        first.write_index(layout)
        first.commit()
    assert set(load_folder(target)) == set(TENSORS)


def test_a_target_that_appears_meanwhile_keeps_the_work(model: Checkpoint, tmp_path: Path) -> None:
    layout = plan_layout(model)
    target = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="exists already"),
        OutputFolder(target, fingerprint="f", layout=layout) as output,
    ):
        for each in layout:
            fill(output, each, model)
        target.mkdir()
        output.commit()
    target.rmdir()
    notes = Notes()
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        assert all(output.is_done(each) for each in layout)
        output.write_index(layout)
        output.commit()
    assert "3 weight files" in notes.notes[0]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def interrupt(model: Checkpoint, target: Path, notes: Notes) -> None:
    layout = plan_layout(model)
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        fill(output, layout[0], model)
        fill(output, layout[1], model)
        with output.shard(layout[2]) as writer:
            name = layout[2].tensors[0].name
            writer.write(name, model.read(name))
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_keeps_finished_files_and_a_rerun_goes_on(model: Checkpoint, tmp_path: Path) -> None:
    target, notes = tmp_path / "out", Notes()
    with pytest.raises(KeyboardInterrupt):
        interrupt(model, target, notes)
    assert not target.exists() and ".out.realign-partial" in notes.notes[-1]
    partial = tmp_path / ".out.realign-partial"
    times = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    layout, notes = plan_layout(model), Notes()
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        assert [output.is_done(each) for each in layout] == [True, True, False]
        assert output.finished(layout[0]) == {"tensors": 4}
        assert output.finished(layout[2]) is None
        fill(output, layout[2], model)
        output.copy_sidecars(model)
        output.write_index(layout)
        output.commit()
    assert "resuming" in notes.notes[0]
    kept = layout[0].filename
    assert (target / kept).stat().st_mtime_ns == times[kept]
    assert tree(target) == tree(copy_of(model, tmp_path / "straight"))
    assert leftovers(tmp_path) == {"in", "out", "straight"}


def test_an_early_ctrl_c_has_nothing_to_keep(model: Checkpoint, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        OutputFolder(tmp_path / "out", fingerprint="f", layout=plan_layout(model)),
    ):
        signal.raise_signal(signal.SIGINT)
    assert leftovers(tmp_path) == {"in"}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "journal", "journal gone"])
def test_damaged_leftovers_are_written_again(
    model: Checkpoint, tmp_path: Path, damage: str
) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt(model, target, Notes())
    partial = tmp_path / ".out.realign-partial"
    victim = partial / plan_layout(model)[1].filename
    if damage == "flip":
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(bytes(content))
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif damage == "gone":
        victim.unlink()
    elif damage == "journal":
        (partial / "journal.json").write_text('{"schema":')
    else:
        (partial / "journal.json").unlink()
    (partial / "tokenizer.json").write_text("stale")
    assert tree(copy_of(model, target)) == tree(copy_of(model, tmp_path / "straight"))


def test_another_fingerprint_starts_afresh(model: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        interrupt(model, target, Notes())
    layout, notes = plan_layout(model), Notes()
    with OutputFolder(target, fingerprint="other", layout=layout, progress=notes) as output:
        assert not any(output.is_done(each) for each in layout)
        assert leftovers(output.partial) == {"journal.json"}
    assert "discarding" in notes.notes[0]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.writer import OutputFolder, plan_layout
model = open_checkpoint(sys.argv[1])
layout = plan_layout(model)
with OutputFolder(sys.argv[2], fingerprint="f", layout=layout) as output:
    for each in layout[:2]:
        with output.shard(each) as writer:
            for spec in each.tensors:
                writer.write(spec.name, model.read(spec.name))
                if each is layout[1]:
                    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_is_resumed(model: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "out"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(model.folder), str(target), root], check=False
    )
    assert done.returncode == -signal.SIGKILL and not target.exists()
    layout, notes = plan_layout(model), Notes()
    with OutputFolder(target, fingerprint="f", layout=layout, progress=notes) as output:
        assert [output.is_done(each) for each in layout] == [True, False, False]
    assert "1 weight files" in notes.notes[0]


def test_nothing_is_written_once_the_lock_is_given_back(model: Checkpoint, tmp_path: Path) -> None:
    """What a thread of a run that has ended still tries must not reach the next run's files."""
    target, (layout, *_) = tmp_path / "out", plan_layout(model)
    with pytest.raises(AssertionError, match="was not written"), ExitStack() as thread:
        with OutputFolder(target, fingerprint="f") as late:
            writer = thread.enter_context(late.shard(layout))
            writer.write(layout.tensors[0].name, model.read(layout.tensors[0].name))
        with OutputFolder(target, fingerprint="f", layout=plan_layout(model)) as output:
            fill(output, layout, model)
            before = tree(output.partial)
            name = layout.tensors[1].name
            for attempt in (
                lambda: writer.write(name, model.read(name)),
                lambda: late.write_bytes("config.json", b"{}"),
                lambda: fill(late, layout, model),
                late.commit,
            ):
                with pytest.raises(OutputError, match="its run has ended"):
                    attempt()
            assert tree(output.partial) == before
    assert leftovers(tmp_path) == {"in"}


def test_the_lock_is_kept_while_a_file_is_changed(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "out")
    claim.acquire(needed=0)
    inside, order = threading.Event(), list[str]()

    def write() -> None:
        with claim.writing():
            inside.set()
            time.sleep(0.05)
            order.append("written")

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()
    claim.release()
    order.append("released")
    thread.join()
    assert order == ["written", "released"]


def test_a_folder_made_for_nothing_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run commits just before ours makes its folder; a disk that knows no locks."""
    target = tmp_path / "new" / "out"
    target.mkdir(parents=True)
    with pytest.raises(OutputError, match="exists already"):
        Claim(target).acquire(needed=0)
    assert leftovers(target.parent) == {"out"}
    shutil.rmtree(target.parent)

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(OutputError, match="No locks available"):
            Claim(target).acquire(needed=0)
    assert leftovers(tmp_path) == set()


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    first, second = Claim(tmp_path / "out"), Claim(tmp_path / "out")
    first.acquire(needed=0)  # its folder is still empty
    with pytest.raises(OutputError, match="another run"):
        second.acquire(needed=0)
    assert leftovers(tmp_path) == {first.folder.name}
    first.release()
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        second.acquire(needed=0)
    assert leftovers(tmp_path) == {first.folder.name, "out"}
