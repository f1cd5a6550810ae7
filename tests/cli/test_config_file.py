from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from support.cli_support import model, realign
from typer.testing import CliRunner

from realign.errors import UsageError
from realign_cli.command import Example, command
from realign_cli.config import Key, read_config
from realign_cli.sink import Sink

KEYS = (
    Key("aligned", "aligned", False),
    Key("set", "settings", True),
    Key("suite", "suites", True),
    Key("dry-run", "dry_run", False),
    Key("strength", "strength", False),
)


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "options.toml"
    file.write_text(text)
    return file


def test_values_take_the_form_of_options(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'aligned = "org/model"\nstrength = 1\ndry_run = true\nsuite = ["a.jsonl", "b.jsonl"]\n'
        "[set]\neta = 0.85\nstandardise = false\n",
    )
    assert read_config(file, KEYS) == {
        "aligned": "org/model",
        "strength": "1",
        "dry_run": True,
        "suites": ["a.jsonl", "b.jsonl"],
        "settings": ["eta=0.85", "standardise=false"],
    }


def test_one_value_of_a_repeatable_option_needs_no_list(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, 'suite = "a.jsonl"'), KEYS) == {"suites": ["a.jsonl"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("strenght = 1", "strenght"),
        ("strength = [1, 2]", "one value"),
        ("strength = 2020-01-01", "no option takes"),
        ("strength = ", "cannot read configuration"),
        ("config = 'x'", "unknown key"),
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_config(write(tmp_path, text), KEYS)


def test_a_mistyped_key_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        read_config(write(tmp_path, "strenght = 1"), KEYS)
    assert caught.value.hint == "did you mean 'strength'?"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        read_config(tmp_path / "nowhere.toml", KEYS)


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer(add_completion=False)

    @application.callback()
    def root() -> None:
        """Keep `go` a command and not the whole application."""

    def go(
        sink: Sink,
        subject: Annotated[str, typer.Argument(metavar="SUBJECT")],
        *,
        strength: Annotated[float, typer.Option("--strength")] = 1.0,
        settings: Annotated[list[str] | None, typer.Option("--set")] = None,
    ) -> int | None:
        """Go."""
        sink.document({"subject": subject, "strength": strength, "settings": settings or []})
        return 1 if strength > 5 else None

    command(application, "go", examples=[Example("realign go x", "go")])(go)
    return application


def test_the_command_line_wins_over_the_file(tmp_path: Path, app: typer.Typer) -> None:
    file = write(tmp_path, 'subject = "s"\nstrength = 3\n[set]\neta = 0.5\n')
    runner = CliRunner()
    from_file = runner.invoke(app, ["go", "--config", str(file), "--json"])
    assert '"strength": 3.0' in from_file.stdout
    assert '"subject": "s"' in from_file.stdout
    assert '"eta=0.5"' in from_file.stdout
    both = runner.invoke(app, ["go", "--strength", "6", "--config", str(file), "--json"])
    assert '"strength": 6.0' in both.stdout
    assert both.exit_code == 1, "a command's return value is the exit code"


def test_an_unknown_key_exits_with_2(tmp_path: Path, app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["go", "x", "--config", str(write(tmp_path, "stregth = 3"))])
    assert result.exit_code == 2
    assert "stregth" in result.stderr
    assert result.stdout == ""


def test_several_fine_tunes_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "repair.toml"
    family = f'aligned = "{model("aligned")}"\nbase = "{model("base")}"\ndry-run = true\n'
    file.write_text(f'finetuned = ["{model()}", "{model("base")}"]\nmethod = "wise_ft"\n{family}')
    document = realign("repair", "--config", file, "--json").json
    assert list(document["plans"]) == [model().name, "base"]
    file.write_text(f'finetuned = "{model()}"\nmethod = "wise_ft"\n{family}')
    assert "tensors" in realign("repair", "--config", file, "--json").json
