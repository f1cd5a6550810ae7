"""The public face: its names, its cost, and the example in its docstring."""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli_support import FAMILY, model, suite

import realign
from realign import api
from realign.repair.request import RepairRequest

FUNCTIONS = ["audit", "diff", "open_checkpoint", "plan", "repair", "repair_several"]
NAMES = {"RealignError", "__version__", *FUNCTIONS}


def test_all_is_exactly_the_public_names() -> None:
    assert set(realign.__all__) == NAMES
    assert realign.__all__ == sorted(realign.__all__, key=lambda name: (name[0].islower(), name))
    for name in NAMES:
        assert getattr(realign, name) is not None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_functions_with_documented_keyword_only_options(name: str) -> None:
    function = getattr(realign, name)
    assert inspect.isfunction(function), f"realign.{name} is the function, not the package"
    signature = inspect.signature(function)
    positional = [
        each.name
        for each in signature.parameters.values()
        if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert len(positional) == (2 if name == "diff" else 1)
    documentation = inspect.getdoc(function) or ""
    for parameter in signature.parameters:
        assert f"{parameter}:" in documentation, f"{name} does not explain {parameter}"
    assert "Raises:" in documentation


def test_rooms_stay_importable_beside_the_functions_of_their_names() -> None:
    code = (
        "import realign, realign.audit.suites\n"
        "from realign.audit.schema import Report\nfrom realign.repair.record import TensorRow\n"
        "from realign.diff.terms import Terms\n"
        "assert all(map(callable, (realign.audit, realign.diff, realign.repair)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_is_cheap() -> None:
    code = "import realign, sys; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_in_the_docstring_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The example names the family "family" and a fine-tune as the small one has it.
    family = tmp_path / "family"
    for name in ("aligned", "base", "suites"):
        shutil.copytree(FAMILY / name, family / name)
    shutil.copytree(model(), family / "both_p5")
    harmful = family / "suites" / "harmful.jsonl"
    lines = harmful.read_text().splitlines()
    harmful.write_text("\n".join([lines[0], *lines[1::5]]) + "\n")  # a fifth is enough here
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestFinder(recurse=False).find(realign, "realign")[0]
    assert len(example.examples) >= 8
    outcome = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example)
    assert outcome.failed == 0
    assert (tmp_path / "repaired" / "realign.json").is_file()
    assert (tmp_path / "audit" / "report.html").is_file()


def test_every_option_of_a_request_is_one_of_repair() -> None:
    """`in_flight` and the like belong to the engine; what a user words, the API takes."""
    taken = set(inspect.signature(api.repair).parameters)
    fields = {each.name for each in dataclasses.fields(RepairRequest)}
    own = {"output": "out", "suites": None, "cache_dir": None, "command": None}
    assert {own.get(name, name) for name in fields} - {None} <= taken


def test_a_part_of_a_model_and_several_of_them(tmp_path: Path) -> None:
    family = {"aligned": model("aligned"), "base": model("base")}
    options = {"method": "delta_svd", "layers": "0", "modules": "q_proj", **family}
    (outcome,) = realign.repair_several([model()], out=tmp_path / "all", **options)
    assert outcome.error is None and outcome.result is not None
    assert {(row.layer, row.module) for row in outcome.result.rows} == {(0, "q_proj")}
    alone = realign.repair(model(), out=tmp_path / "one", **options)
    assert [row.edit_norm for row in alone.rows] == [r.edit_norm for r in outcome.result.rows]
    with pytest.raises(realign.RealignError, match="no option"):
        realign.repair_several([model()], out=tmp_path / "x", stength=1.0, **family)


def test_plan_writes_nothing_and_is_plain_data(tmp_path: Path) -> None:
    planned = realign.plan(
        model(), aligned=model("aligned"), base=model("base"), method="replace", scope="matrices"
    )
    assert planned.scope == "matrices"
    assert json.dumps(planned.to_json())
    assert list(tmp_path.iterdir()) == []


def test_a_policy_decides_the_exit_code_of_a_report(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'schema = "realign/policy/1"\njudges = { primary = "oracle" }\ngate = [{ id = "harm", '
        'kind = "max_rate", role = "subject", suite = "harmful", metric = "asr", value = 0.1 }]\n'
    )
    report = realign.audit(
        model(), suites=[suite("harmful")], policy=policy, out=tmp_path / "a", limit=16
    )
    assert report.exit_code == 1
    assert report.gates[0].status == "fail"


def test_mistakes_raise_our_errors(tmp_path: Path) -> None:
    with pytest.raises(realign.RealignError, match="nowhere"):
        realign.open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(realign.RealignError, match="colour"):
        realign.plan(model(), aligned=model("aligned"), colour="red")


def test_the_api_takes_what_the_request_takes() -> None:
    from realign.repair.request import RepairRequest

    taken = set(inspect.signature(api.repair).parameters) - {"out", "progress"}
    fields = set(RepairRequest.__dataclass_fields__)
    assert taken <= fields
    assert fields - taken == {"output", "suites", "cache_dir", "command"}
