"""`realign diff`: what it prints at both widths, its files, its exit codes, its refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from support.cli_support import damaged, model, realign
from support.diff_support import difference

SMALL = Path(__file__).resolve().parents[2] / "fixtures" / "small"
A, B = SMALL / "aligned", SMALL / "howto"


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_and_say_what_the_figures_are(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    result = realign("diff", A, B, "--reference", SMALL / "base", "--top", "5")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= width
    found = difference(A, B, reference=SMALL / "base")
    relative = found.total.figures.relative
    assert relative is not None
    assert f"relative change {100 * relative:.3g} %" in result.stdout
    worst = max(found.rows, key=lambda row: row.figures.relative or 0 if row.figures else 0)
    after = lines[next(i for i, line in enumerate(lines) if line.startswith("tensor")) + 2]
    assert after.startswith(worst.name)
    assert "By layer" in lines[lines.index("") :][0] or any(x.startswith("By layer") for x in lines)


def test_json_is_the_comparison() -> None:
    result = realign("diff", A, B, "--json", "--directions", "3")
    assert result.exit_code == 0 and result.json == difference(A, B, directions=3).to_json()
    assert result.json["schema"] == "realign/diff/1"


def test_identical_models() -> None:
    result = realign("diff", A, A, "--exit-code")
    assert result.exit_code == 0
    assert "identical: every tensor, config and tokenizer file" in result.stdout


def test_exit_code_is_1_where_anything_differs(tmp_path: Path) -> None:
    assert realign("diff", A, B, "--exit-code", "--quiet").exit_code == 1
    other = damaged("base", tmp_path, config=lambda c: c.update(rope_theta=7.0))
    result = realign("diff", model("base"), other, "--exit-code")
    assert result.exit_code == 1
    assert "the weights are identical, bit by bit" in result.stdout
    assert "rope_theta" in result.stdout and "-> 7.0" in result.stdout


def test_quiet_is_one_line(tmp_path: Path) -> None:
    found = realign("diff", A, B, "--exit-code", "--quiet")
    assert found.exit_code == 1 and not found.stderr
    (line,) = found.stdout.splitlines()
    assert line.startswith("29 tensors: 28 changed, 1 identical; relative change 4.69 %")
    same = realign("diff", A, A, "--exit-code", "-q")
    assert same.exit_code == 0
    assert same.stdout == "identical: every tensor, config and tokenizer file\n"
    other = damaged("base", tmp_path, config=lambda c: c.update(rope_theta=7.0))
    (line,) = realign("diff", model("base"), other, "-q").stdout.splitlines()
    assert line == "the weights are identical, bit by bit; 1 small file differs"


def test_the_files_of_a_comparison(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = realign("diff", A, B, "-o", out)
    assert result.exit_code == 0, result.stderr
    names = ["diff.html", "diff.json", "diff.png", "diff.svg"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "diff.json").read_text())["total"]["changed"] == 28
    page = (out / "diff.html").read_text()
    assert "<svg" in page and "<script" not in page and "http-equiv" in page
    again = realign("diff", A, B, "-o", out)
    assert again.exit_code == 2 and "exists already" in again.words
    inside = realign("diff", A, B, "-o", A / "x")
    assert inside.exit_code == 2 and "lies inside the input" in inside.words


def test_names_from_a_checkpoint_are_escaped(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "<b>[red]x</b>": tensors["model.norm.weight"].clone()}

    other = damaged("base", tmp_path, tensors=rename)
    out = tmp_path / "out"
    result = realign("diff", model("base"), other, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert "<b>[red]x</b>" in result.stdout and "only in B" in result.stdout
    page = (out / "diff.html").read_text()
    assert "&lt;b&gt;[red]x" in page and "<b>[red]" not in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--sort", "size"], "--sort knows no 'size'"),
        (["--top", "-1"], "--top -1"),
        (["--only", "nothing"], "no tensor of"),
    ],
)
def test_options_that_make_no_sense(arguments: list[str], says: str) -> None:
    result = realign("diff", A, B, *arguments)
    assert result.exit_code == 2 and says in result.words and not result.stdout


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    result = realign("diff", A, model("base"))
    assert result.exit_code == 2 and "different architectures" in result.words
    assert "tensor by tensor" in result.words
    assert realign("diff", A, tmp_path / "nowhere").exit_code == 2


def test_an_adapter_and_its_base(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(SMALL / "lora_p5", adapter)
    result = realign("diff", A, f"{A}+{adapter}", "--json", "--spectra")
    assert result.exit_code == 0, result.stderr
    side = cast(dict[str, object], result.json["b"])
    assert side["kind"] == "adapter"
    assert cast(dict[str, object], result.json["counts"]).keys() == {"identical", "changed"}
