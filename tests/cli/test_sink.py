from __future__ import annotations

import json

import pytest

from realign_cli.sink import Sink


def test_data_goes_to_stdout_and_remarks_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink()
    sink.line("out/model")
    sink.show("a table")
    sink.note("a remark")
    sink.warning("take care")
    captured = capsys.readouterr()
    assert captured.out == "out/model\na table\n"
    assert captured.err == "a remark\nwarning: take care\n"


def test_json_is_the_only_thing_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink(as_json=True)
    sink.line("for people")
    sink.show("for people")
    sink.document({"answer": 42, "name": "käse"})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"answer": 42, "name": "käse"}
    assert "käse" in captured.out


def test_quiet_keeps_data_warnings_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink(quiet=True)
    sink.line("data")
    sink.note("a remark")
    sink.warning("take care")
    sink.fail("error: it broke")
    captured = capsys.readouterr()
    assert captured.out == "data\n"
    assert captured.err == "warning: take care\nerror: it broke\n"


def test_markup_in_names_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Sink().line("[bold]model[/bold]/x")
    assert capsys.readouterr().out == "[bold]model[/bold]/x\n"


def test_a_long_path_is_never_broken(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/".join(["folder"] * 60)
    Sink().line(path)
    assert capsys.readouterr().out == path + "\n"


def test_no_nan_reaches_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Sink(as_json=True).document({"x": float("nan")})


def test_paths_in_remarks_and_text_stay_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.text import Text

    monkeypatch.setenv("COLUMNS", "80")
    path = "/cache/" + "a-long-folder-name/" * 8 + "moments-0123456789abcdef.safetensors"
    sink = Sink()
    sink.warning(f"kept at {path}")
    sink.note(f"kept at {path}")
    sink.progress.note(f"kept at {path}")
    sink.show(f"note: kept at {path} and used again", Text(f"output  {path}"))
    sink.show("some words " * 20)
    captured = capsys.readouterr()
    assert captured.err.count(path) == 3 and captured.out.count(path) == 2
    assert all(len(line.rstrip()) <= 80 for line in captured.out.splitlines() if path not in line)
