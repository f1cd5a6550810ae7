"""Every command does its job on the shipped tiny family: exit codes, files, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.cli_support import FAMILY, digest, family_options, model, realign, suite

from realign.audit.schema import read_report
from realign.checkpoint.manifest import sha256_file
from realign.checkpoint.verification import verify_output
from realign.repair.registry import METHODS
from realign.report import repair as drawing
from realign_cli.command import PAGES
from realign_cli.pages import render_all

DOCS = Path(__file__).resolve().parents[2] / "docs" / "commands"
POLICY = """
schema = "realign/policy/1"
judges = {{ primary = "oracle" }}
[[gate]]
id = "harm"
kind = "max_rate"
role = "repaired"
suite = "harmful"
metric = "asr"
value = {value}
"""


def replace_options(*more: str | Path) -> list[str | Path]:
    method: list[str | Path] = ["--method", "replace", "--set", "rank=4", "--device", "cpu"]
    return [*family_options(), *method, *more]


def policy(tmp_path: Path, value: float) -> Path:
    file = tmp_path / "policy.toml"
    file.write_text(POLICY.format(value=value))
    return file


# --- repair ----------------------------------------------------------------------------------


def test_repair_writes_a_checkpoint_a_manifest_and_a_picture(tmp_path: Path) -> None:
    before = digest(FAMILY)
    out = tmp_path / "out"
    result = realign("repair", model(), *replace_options("-o", out))
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(out), "the last line is the path, for scripts"
    assert "survival" in result.stdout
    manifest = json.loads((out / "realign.json").read_text())
    assert manifest["method"]["name"] == "replace"
    picture = out / "realign-audit" / "repair.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    listed = manifest["output"]["files"]
    assert listed["realign-audit/repair.png"] == sha256_file(picture)
    assert verify_output(out).problems == ()
    assert (out / "tokenizer.json").read_bytes() == (model() / "tokenizer.json").read_bytes()
    assert digest(FAMILY) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no axes")])
def test_a_picture_that_cannot_be_drawn_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(drawing, "to_png", fail)
    result = realign("repair", model(), *replace_options("-o", tmp_path / "out"))
    assert result.exit_code != 0
    assert list(tmp_path.iterdir()) == []


def test_repair_as_json_is_one_document(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = realign("repair", model(), *replace_options("-o", out, "--json"))
    document: dict[str, Any] = result.json
    assert document["output"] == str(out)
    assert document["manifest"] == json.loads((out / "realign.json").read_text())


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = replace_options("-o", out, "--dry-run")
    result = realign("repair", model(), *options)
    assert result.exit_code == 0
    for part in ("q_proj", "edit", "copy", "aligned - base", "peak"):
        assert part in result.stdout
    document: Any = realign("repair", model(), *options, "--json").json
    actions = {tensor["name"]: tensor["action"] for tensor in document["tensors"]}
    assert actions["model.layers.0.self_attn.q_proj.weight"] == "edit"
    assert actions["model.norm.weight"] == "copy"
    assert all(tensor["reason"] for tensor in document["tensors"])
    assert list(tmp_path.iterdir()) == []


def test_options_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "repair.toml"
    file.write_text(
        f'finetuned = "{model()}"\naligned = "{model("aligned")}"\nbase = "{model("base")}"\n'
        'method = "replace"\nstrength = 0.5\ndry-run = true\n[set]\nrank = 2\nside = "left"\n'
    )
    document: Any = realign("repair", "--config", file, "--json").json
    assert document["strength"] == 0.5
    assert document["method"]["settings"]["rank"] == 2
    assert document["method"]["settings"]["side"] == "left"


def test_a_patch_is_an_adapter(tmp_path: Path) -> None:
    out = tmp_path / "patch"
    result = realign("repair", model(), *replace_options("-o", out, "--patch"))
    assert result.exit_code == 0, result.stderr
    assert (out / "adapter_config.json").is_file()
    assert (out / "adapter_model.safetensors").is_file()


def audited(tmp_path: Path, *more: str, value: float) -> tuple[Any, Path]:
    out = tmp_path / "out"
    options = ["--audit", "--suite", suite("harmful"), "--limit", "24", "--batch-size", "24"]
    options += ["--policy", policy(tmp_path, value), "-o", out, "--quiet"]
    return realign("repair", model(), *replace_options(*options, *more)), out


def test_a_repair_within_policy_is_kept_and_its_report_with_it(tmp_path: Path) -> None:
    result, out = audited(tmp_path, value=1.0)
    assert result.exit_code == 0, result.stderr
    assert (out / "model.safetensors").is_file()
    report = read_report(tmp_path / "out-audit" / "audit.json")
    assert report.exit_code == 0
    assert (tmp_path / "out-audit" / "report.html").is_file()
    assert "PASS" in result.stdout


def test_a_repair_out_of_policy_is_not_kept_and_its_report_is(tmp_path: Path) -> None:
    result, out = audited(tmp_path, value=0.0)
    assert result.exit_code == 1
    assert not out.exists()
    assert "harm" in result.words
    assert "report.html" in result.words
    assert read_report(tmp_path / "out-audit" / "audit.json").exit_code == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"policy.toml", "out-audit"}, "no partial output"


def test_a_failed_gate_as_json_is_one_document(tmp_path: Path) -> None:
    result, _ = audited(tmp_path, "--json", value=0.0)
    assert result.exit_code == 1
    document: Any = result.json
    assert document["output"] is None
    assert [(gate["id"], gate["status"]) for gate in document["gates"]] == [("harm", "fail")]
    assert document["exit"]["code"] == 1
    assert "harm" in document["exit"]["reason"]


def test_an_open_gate_that_lets_a_repair_through_is_named(tmp_path: Path) -> None:
    file = policy(tmp_path, 0.0)
    margin = 'kind = "margin"\ncomparison = "residual"\nsuite = "order"\nmetric = "error_rate"'
    gate = f'[[gate]]\nid = "open"\n{margin}\nmargin = 0.001\n'
    head = 'schema = "realign/policy/1"\non_inconclusive = "warn"\n'
    file.write_text(f'{head}judges = {{ primary = "oracle" }}\n{gate}')
    options = ["--audit", "--suite", suite("order"), "--limit", "6", "--policy", file, "--quiet"]
    options += ["-o", tmp_path / "out"]
    result = realign("repair", model(), *replace_options(*options))
    assert result.exit_code == 0, result.stderr
    assert "KEPT WITHOUT A VERDICT: the required gate 'open' is inconclusive" in result.words


def test_a_repair_says_that_it_is_not_measured(tmp_path: Path) -> None:
    result = realign("repair", model(), *replace_options("-o", tmp_path / "out"))
    assert "not measured: realign audit" in result.words
    assert "docs/results.md" not in result.words


# --- audit -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("audit")
    options = ["--suite", suite("harmful"), "--suite", suite("lookalikes"), "--limit", "24"]
    options += ["--reference", model("aligned"), "--device", "cpu", "--batch-size", "24"]
    return realign("audit", model(), *options, "-o", out), out


def test_an_audit_shows_the_drift(audit: tuple[Any, Path]) -> None:
    result, out = audit
    assert result.exit_code == 0, result.stderr
    report = read_report(out / "audit.json")
    assert (report.rate(role="reference", suite="harmful", metric="asr").rate or 0) <= 0.2
    assert (report.rate(role="subject", suite="harmful", metric="asr").rate or 0) >= 0.7
    for part in ("harmful compliance", "refusal", "other (neither)", "over-refusal"):
        assert part in result.stdout
    assert "no verdicts: no policy" in result.stdout
    assert result.stdout.splitlines()[-2:] == [str(out / "audit.json"), str(out / "report.html")]


def test_an_audits_folder_holds_no_texts(audit: tuple[Any, Path]) -> None:
    _, out = audit
    assert {path.name for path in out.iterdir()} == {
        "audit.json",
        "items.jsonl",
        "pictures",
        "report.html",
    }
    assert (out / "pictures" / "rates.png").is_file()
    first = json.loads(suite("harmful").read_text().splitlines()[1])["prompt"]
    for file in ("audit.json", "items.jsonl", "report.html"):
        assert first not in (out / file).read_text()


def test_a_failed_gate_exits_with_1(tmp_path: Path) -> None:
    file = policy(tmp_path, 0.0)
    file.write_text(file.read_text().replace('role = "repaired"', 'role = "subject"'))
    options = ["--suite", suite("harmful"), "--limit", "24", "--device", "cpu", "--no-weights"]
    result = realign("audit", model(), *options, "--policy", file, "-o", tmp_path / "a", "--json")
    assert result.exit_code == 1, result.stderr
    document: Any = result.json
    assert document["gates"][0]["status"] == "fail"
    assert document["run"]["exit_code"] == 1


def test_a_plan_loads_nothing_and_writes_nothing(tmp_path: Path) -> None:
    options = ["--suite", suite("harmful"), "--reference", model("aligned"), "--plan"]
    result = realign("audit", model(), *options)
    assert result.exit_code == 0
    assert "answers in all" in result.stdout
    document: Any = realign("audit", model(), *options, "--json").json
    assert document["suites"][0]["name"] == "harmful"
    assert list(tmp_path.iterdir()) == []


# --- the others ------------------------------------------------------------------------------


def test_subspace_writes_a_file_and_a_picture(tmp_path: Path) -> None:
    from realign.audit.subspace_file import read_subspace

    out = tmp_path / "safety.safetensors"
    options = ["--base", model("base"), "-o", out, "--rank", "4", "--device", "cpu"]
    result = realign("subspace", model("aligned"), *options, "--picture", "svg")
    assert result.exit_code == 0, result.stderr
    opened = read_subspace(out)
    triplets = opened.triplets("model.layers.0.self_attn.q_proj.weight")
    assert triplets.s.shape == (4,)
    assert (tmp_path / "safety.svg").read_text().startswith("<?xml")
    assert result.stdout.splitlines()[-2:] == [str(out), str(tmp_path / "safety.svg")]


def test_subspace_measures_a_fine_tune_without_its_base(tmp_path: Path) -> None:
    from realign.audit.subspace_file import read_subspace

    file = tmp_path / "safety.safetensors"
    options = ["--base", model("base"), "-o", file, "--rank", "4", "--device", "cpu"]
    realign("subspace", model("aligned"), *options, "--picture", "none")
    result = realign("subspace", model(), "--measure", file)
    assert result.exit_code == 0, result.stderr
    assert "retained_k" in result.stdout and "NOT validated" in result.stdout
    named: Any = realign(
        "subspace", model(), "--measure", file, "--reference", model("aligned"), "--json"
    ).json
    assert 0.0 < named["total"]["energy"] < 1.0 and named["total"]["relative_distance"] > 0.0
    assert named["total"]["known"] == len(read_subspace(file).rows)
    kept: Any = realign("subspace", model("aligned"), "--measure", file, "--json").json
    assert kept["total"]["retained_k"] == 1.0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["safety.safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        ["--measure", "f", "--base", "b"],
        ["--measure", "f", "-o", "o"],
        ["--base", "b"],
        ["-o", "o"],
        ["--base", "b", "-o", "o", "--reference", "r"],
    ],
)
def test_subspace_makes_or_measures_but_not_both(options: list[str]) -> None:
    result = realign("subspace", model(), *options)
    assert result.exit_code == 2
    assert "--measure" in result.stderr and "Traceback" not in result.stderr


def test_methods_lists_all_and_shows_each_card() -> None:
    listed: Any = realign("methods", "--json").json
    names = [each["name"] for each in listed]
    assert names[: len(METHODS)] == list(METHODS)
    assert all({"paper", "needs", "data", "edit", "cost", "deviations"} <= set(m) for m in listed)
    table = realign("methods").stdout
    for each in listed:
        assert each["name"] in table
        card = realign("methods", each["name"]).stdout
        for parameter in each["parameters"]:
            assert parameter["name"] in card


def test_lab_builds_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support.lab_support import MICRO

    from realign.lab import build as build_module

    # The recipe is data: a smaller one under the name of a preset keeps this test to seconds.
    monkeypatch.setattr(build_module, "find_preset", lambda _name: MICRO)
    out = tmp_path / "family"
    options = ["--preset", "tiny", "--variant", "howto2_p5", "--quiet"]
    result = realign("lab", "build", out, *options, "--json")
    assert result.exit_code == 0, result.stderr
    document: Any = result.json
    assert set(document["models"]) == {"base", "aligned", "howto2_p5"}
    assert (out / "howto2_p5" / "model.safetensors").is_file()


def test_lab_claims_prints_all_four_claims(tmp_path: Path) -> None:
    out = tmp_path / "claims.json"
    result = realign("lab", "claims", FAMILY, "--general", model(), "-o", out)
    assert result.exit_code == 0, result.stderr
    tables = ("Stability", "Isolation", "By layer", "disjoint halves", "safe_base")
    for words in (*tables, "R_ft / R_align", "cos with V", "Spearman"):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1] == str(out)
    document = json.loads(out.read_text())
    assert len(document["matrices"]) == 14
    assert "howto2_p5" in document["vectors"]["directions"] and "moved" not in document
    refused = realign("lab", "claims", FAMILY, "-o", out)
    assert refused.exit_code != 0
    assert "exists" in refused.stderr


# --- the application -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        (
            "from realign_cli.main import run; assert run(['repair', '--help']) == 0",
            {"torch", "transformers", "matplotlib", "scipy", "numpy"},
        ),
        ("import realign.repair.engine", {"transformers", "matplotlib", "scipy.stats"}),
        (
            "from realign.model.devices import pick_device; pick_device('auto')",
            {"transformers"},
        ),
    ],
    ids=["help needs no torch", "the engine needs no model library", "nor does a device"],
)
def test_what_is_not_imported(code: str, heavy: set[str]) -> None:
    assert_not_imported(code, heavy)


def test_a_repair_of_folders_imports_what_it_uses(tmp_path: Path) -> None:
    arguments = ["repair", model(), *family_options(), "--method", "resta", "-o", tmp_path / "out"]
    words = [str(each) for each in [*arguments, "--json", "--quiet", "--offline"]]
    assert_not_imported(
        f"from realign_cli.main import run; assert run({words}) == 0",
        {
            *("transformers", "scipy", "huggingface_hub", "jinja2", "yaml"),
            *("matplotlib.pyplot", "realign.audit.schema", "realign.report.html"),
        },
    )
    assert (tmp_path / "out" / "realign-audit" / "repair.png").is_file()


def assert_not_imported(code: str, heavy: set[str]) -> None:
    code += f"; import sys; sys.exit(' '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", sorted(PAGES))
def test_every_help_shows_its_options_and_examples(name: str) -> None:
    result = realign(*name.split(), "--help")
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "Examples" in words
    for example in PAGES[name].examples:
        assert " ".join(example.line.split()) in words
    for option in ("--json", "--quiet", "--config"):
        assert option in words


@pytest.mark.parametrize("group", [[], ["lab"]])
def test_the_help_of_groups_shows_examples(group: list[str]) -> None:
    result = realign(*group, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"realign {'lab build' if group else 'repair'} ./" in result.stdout


@pytest.mark.parametrize("name", sorted(PAGES))
def test_no_example_is_wrapped_at_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    lines = realign(*name.split(), "--help").stdout.splitlines()
    shown = [line.strip() for line in lines]
    assert "\\" not in shown
    for example in PAGES[name].examples:
        for line in example.line.splitlines():
            assert line.strip() in shown


def test_the_pages_are_current() -> None:
    pages = render_all()
    assert {path.name for path in DOCS.glob("*.md")} == set(pages)
    for name, text in pages.items():
        assert (DOCS / name).read_text("utf-8") == text, f"{name} is stale: run `make docs`"


@pytest.mark.parametrize("name", sorted(PAGES))
def test_examples_use_options_that_exist(name: str) -> None:
    page = render_all()[f"{name.replace(' ', '-')}.md"]
    known = page[page.index("## Options") :]
    for example in PAGES[name].examples:
        for word in example.line.split():
            if word.startswith("-"):
                assert f"`{word}`" in known, f"{word} in {example.line}"


def test_version() -> None:
    from realign import __version__

    assert realign("--version").stdout.strip() == __version__


def test_no_colour_codes_reach_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from realign_cli.main import main; main()", "methods"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x1b" not in done.stdout + done.stderr
