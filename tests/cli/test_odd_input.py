"""What is odd but no fault: remarks, links, names of any script, code that is copied and not run.

Also what a warning is for: models given in each other's place.
"""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import pytest
from support.checkpoint_support import raw_safetensors
from support.cli_support import damaged, family_options, model, realign
from support.refusal_support import repair, untouched

WEIGHTS = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj"


def test_what_is_only_unusual_is_printed_in_the_plan(tmp_path: Path) -> None:
    copy = damaged("howto2_p5", tmp_path)
    content = (copy / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[f"{Q}.weight"]["extra"] = 1
    (copy / WEIGHTS).write_bytes(raw_safetensors(header, content[8 + length :]))
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    result = repair(tmp_path / "out", copy, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    notes = result.json["notes"]
    assert isinstance(notes, list)
    for rule in ("RA009", "RA027"):
        assert [note for note in notes if note.startswith(f"{rule}: {copy}")], notes


@pytest.mark.parametrize("options", [[], ["--patch"]])
def test_an_edit_larger_than_the_weights_is_remarked_on(tmp_path: Path, options: list[str]) -> None:
    """`lox` adds to the weights whatever the strength; 8 times its edit is within bounds here."""
    command = ["repair", model(), *family_options(), "--method", "lox", "--device", "cpu"]
    said = "have an edit larger than the weights it edits, up to"
    for strength, remarked in (("1e9", 14), ("8", 0)):
        out = tmp_path / strength
        result = realign(*command, *options, "--strength", strength, "-o", out)
        assert result.exit_code == 0, result.stderr
        rows = json.loads((out / "realign.json").read_text("utf-8"))["tensors"]
        ratios = [row["relative_norm"] or 0.0 for row in rows]
        assert sum(ratio > 1.0 for ratio in ratios) == remarked
        assert (said in result.words) == (remarked > 0)
        if remarked:
            assert f"14 of 14 tensors {said} {max(ratios):.3g} times their norm" in result.words


def test_code_beside_the_weights_is_copied_and_never_run(tmp_path: Path) -> None:
    """`auto_map` names classes in a file that would leave a mark if anything imported it."""
    mark = tmp_path / "the code was run"
    poison = f"open({str(mark)!r}, 'w').close()\n"
    copies: dict[str, Path] = {}
    for role in ("howto2_p5", "aligned", "base"):
        copies[role] = damaged(role, tmp_path)
        for file in ("modeling_poison.py", "configuration_poison.py", "tokenization_poison.py"):
            (copies[role] / file).write_text(poison)
        auto_map = {
            "AutoConfig": "configuration_poison.PoisonConfig",
            "AutoModelForCausalLM": "modeling_poison.PoisonModel",
        }
        path = copies[role] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))
    out = tmp_path / "out"
    with untouched(*copies.values()):
        result = repair(out, copies["howto2_p5"], aligned=copies["aligned"], base=copies["base"])
    assert result.exit_code == 0, result.stderr
    assert (out / "modeling_poison.py").read_text() == poison
    assert not mark.exists()


def test_nothing_unpickles_and_nothing_trusts_remote_code() -> None:
    """In the whole source, read as syntax: no import of a pickle reader, no such call or value."""
    root = Path(__file__).resolve().parents[2]
    found: list[str] = []
    for file in [*(root / "realign").rglob("*.py"), *(root / "cli").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if _is_dangerous(node):
                found.append(f"{file.relative_to(root)}: {ast.unparse(node)[:80]}")
    assert found == []


PICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def _is_dangerous(node: ast.AST) -> bool:
    match node:
        case ast.Import(names=names):
            return any(each.name.partition(".")[0] in PICKLING for each in names)
        case ast.ImportFrom(module=str(module)):
            return module.partition(".")[0] in PICKLING
        case ast.Attribute(value=ast.Name(id="torch" | "numpy" | "np"), attr="load"):
            return True
        case ast.keyword(arg="trust_remote_code" | "allow_pickle", value=value):
            return not (isinstance(value, ast.Constant) and value.value is False)
        case ast.Dict(keys=keys, values=values):
            return any(
                isinstance(key, ast.Constant)
                and key.value == "trust_remote_code"
                and not (isinstance(value, ast.Constant) and value.value is False)
                for key, value in zip(keys, values, strict=True)
            )
    return False


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "torch.load(f)", "f(trust_remote_code=True)",
     "f(trust_remote_code=x)", "f(**{'trust_remote_code': True})", "np.load(f)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert any(_is_dangerous(node) for node in ast.walk(ast.parse(source)))


def test_paths_with_blanks_and_letters_of_any_script(tmp_path: Path) -> None:
    place = tmp_path / "mein Modell 模型 é"
    copies = {
        role: Path(shutil.copytree(model(role), place / f"{role} + ü"))
        for role in ("howto2_p5", "aligned", "base")
    }
    out = place / "das Ergebnis 結果"
    with untouched(*copies.values()):
        result = repair(out, copies["howto2_p5"], aligned=copies["aligned"], base=copies["base"])
    assert result.exit_code == 0, result.stderr
    repair(tmp_path / "plain")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


def test_a_cache_of_links(tmp_path: Path) -> None:
    """A folder as the Hub's client lays it out: every file a link to a blob, the folder a link."""
    copies: dict[str, Path] = {}
    for role in ("howto2_p5", "aligned", "base"):
        blobs, snapshot = tmp_path / role / "blobs", tmp_path / role / "snapshots" / "abc"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for i, file in enumerate(sorted(model(role).iterdir())):
            shutil.copy(file, blobs / str(i))
            (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
        copies[role] = tmp_path / f"{role} by link"
        copies[role].symlink_to(snapshot)
    out = tmp_path / "out"
    result = repair(out, copies["howto2_p5"], aligned=copies["aligned"], base=copies["base"])
    assert result.exit_code == 0, result.stderr
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    repair(tmp_path / "plain")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "plain" / WEIGHTS).read_bytes()


def test_a_missing_tokenizer_is_said_and_no_reason_to_stop(tmp_path: Path) -> None:
    copy = damaged("howto2_p5", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (copy / name).unlink()
    result = repair(tmp_path / "out", copy, "--dry-run", "--json")
    assert result.exit_code == 0, result.stderr
    assert any("no tokenizer" in str(note) for note in result.json["notes"])  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_models_given_in_each_others_place(tmp_path: Path, options: tuple[str, ...]) -> None:
    """It is said on standard error, also under --quiet, and nothing is refused."""
    swapped = {"aligned": model("base"), "base": model("aligned")}
    result = repair(tmp_path / "out", None, *options, **swapped)
    assert result.exit_code == 0, result.stderr
    assert "warning: the fine-tune is nearer to the base model" in result.words
    assert "are --aligned and --base swapped?" in result.words
    right = repair(tmp_path / "right", None, *options)
    assert "swapped" not in right.stderr
