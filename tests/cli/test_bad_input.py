"""Bad input, end to end: one clear message, the exit code, inputs untouched, nothing written.

One row per kind of mistake. Each runs the real command on a real (tiny) model family with one thing
wrong, and checks that the message names it and that a next step follows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from support.cli_support import (
    FAMILY,
    Outcome,
    damaged,
    digest,
    family_options,
    model,
    realign,
    suite,
)
from support.refusal_support import nothing_left, refused
from support.refusal_support import repair_at_work as repair
from torch import Tensor

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def nothing_changes_and_nothing_stays(tmp_path: Path) -> Iterator[None]:
    with nothing_left(tmp_path / "work"):
        yield


def audit(tmp_path: Path, *options: str | Path, subject: Path | None = None) -> Outcome:
    where = tmp_path / "audit.allowed"
    return realign(
        *("audit", subject or model(), "--reference", model("aligned"), "--device", "cpu"),
        *("--quiet", "-o", where, *options),
    )


# --- paths and folders -----------------------------------------------------------------------


@pytest.mark.parametrize("role", ["finetuned", "aligned", "base"])
def test_a_path_that_is_not_there(tmp_path: Path, role: str) -> None:
    missing = tmp_path / "nowhere" / "model"
    if role == "finetuned":
        result = repair(tmp_path, missing)
    else:
        result = repair(tmp_path, **{role: missing})
    refused(result, str(missing))


def test_a_mistyped_path_gets_a_suggestion(tmp_path: Path) -> None:
    refused(repair(tmp_path, aligned=FAMILY / "alinged"), "alinged", "aligned")


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    refused(repair(tmp_path, folder), str(folder))


def test_a_file_where_a_folder_must_be(tmp_path: Path) -> None:
    refused(repair(tmp_path, model() / "config.json"), "config.json")


# --- damaged files ---------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    with file.open("rb+") as stream:
        stream.truncate(file.stat().st_size // 2)


def _header_length(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[:8] = (2**60).to_bytes(8, "little")
    file.write_bytes(data)


def _not_json(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xfe{["
    file.write_bytes(data)


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _header_length, _not_json, _empty])
@pytest.mark.parametrize("role", ["howto2_p5", "aligned"])
def test_truncated_or_corrupt_weights(
    tmp_path: Path, role: str, damage: Callable[[Path], None]
) -> None:
    copy = damaged(role, tmp_path)
    damage(copy / "model.safetensors")
    before = digest(copy)
    result = repair(tmp_path, copy) if role == "howto2_p5" else repair(tmp_path, aligned=copy)
    refused(result, "model.safetensors")
    assert digest(copy) == before


# --- checkpoints that do not fit each other --------------------------------------------------


def _narrower(tensors: Tensors) -> Tensors:
    return tensors | {Q_PROJ: tensors[Q_PROJ][:64].contiguous()}


def _without_one(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != Q_PROJ}


def _integers(tensors: Tensors) -> Tensors:
    return tensors | {Q_PROJ: (tensors[Q_PROJ] * 100).to(torch.int8)}


@pytest.mark.parametrize("change", [_narrower, _without_one, _integers])
def test_other_shapes_names_or_dtypes(tmp_path: Path, change: Callable[[Tensors], Tensors]) -> None:
    refused(repair(tmp_path, base=damaged("base", tmp_path, tensors=change)), Q_PROJ)


def test_another_architecture(tmp_path: Path) -> None:
    def other(config: dict[str, object]) -> None:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}

    refused(repair(tmp_path, aligned=damaged("aligned", tmp_path, config=other)), "mistral")


# --- nothing to do ---------------------------------------------------------------------------


def test_aligned_equal_to_base(tmp_path: Path) -> None:
    refused(repair(tmp_path, base=model("aligned")), "aligned - base is zero")


def test_aligned_equal_to_a_copy_of_base(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model("aligned"), copy)
    refused(repair(tmp_path, base=copy), "same weights")


def test_finetuned_equal_to_aligned(tmp_path: Path) -> None:
    refused(repair(tmp_path, model("aligned")), "same weights", "fine-tune")


# --- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["howto2_p5", "aligned", "base"])
def test_non_finite_tensors(tmp_path: Path, role: str, value: float) -> None:
    def poison(tensors: Tensors) -> Tensors:
        tensors[Q_PROJ][3, 5] = value
        return tensors

    copy = damaged(role, tmp_path, tensors=poison)
    result = repair(tmp_path, copy) if role == "howto2_p5" else repair(tmp_path, **{role: copy})
    refused(result, Q_PROJ)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--set", "rank=-1"], "rank = -1"),
        (["--set", "rank=many"], "rank = many"),
        (["--set", "rnak=4"], "rnak"),
        (["--set", "rank"], "rank"),
        (["--strength", "-1"], "strength = -1"),
        (["--strength", "nan"], "strength"),
        (["--method", "lsff"], "lsff"),
        (["--scope", "everything"], "everything"),
        (["--device", "tpu"], "tpu"),
        (["--patch", "--max-patch-rank", "0"], "0"),
        (["--policy", "p.toml"], "--audit"),
        (["--audit", "--suite", "s.jsonl"], "give --policy FILE"),
    ],
)
def test_parameters_out_of_range(tmp_path: Path, options: list[str], says: str) -> None:
    refused(repair(tmp_path, None, *options), says)


def test_a_run_that_changes_nothing_exits_with_1_and_leaves_nothing(tmp_path: Path) -> None:
    refused(repair(tmp_path, None, "--set", "rank=0"), "changed nothing", code=1)


def test_a_missing_model_is_asked_for(tmp_path: Path) -> None:
    refused(repair(tmp_path, base=None), "--base")
    refused(repair(tmp_path, aligned=None), "--aligned")


def test_a_missing_output_is_asked_for() -> None:
    refused(realign("repair", model(), *family_options(), "--quiet"), "-o DIR")


@pytest.mark.parametrize("option", ["--limit", "--batch-size", "--max-new-tokens"])
def test_an_audits_numbers_out_of_range(tmp_path: Path, option: str) -> None:
    refused(audit(tmp_path, "--suite", suite("harmful"), option, "0"), option, hint=False)


# --- suites and policies ---------------------------------------------------------------------

HEADER = '{"schema":"realign/suite/1","name":"mine","kind":"harmful"}'
ITEM = '{"id":"a","prompt":"how to make a zorb"}'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (HEADER, "no items"),
        (f"{HEADER}\n{ITEM}\n{{", "mine.jsonl:3"),
        (f"{HEADER}\n{ITEM}\n[1]", "mine.jsonl:3"),
        (f'{HEADER}\n{{"id":"a"}}', "prompt"),
        (f"{HEADER}\n{ITEM}\n{ITEM}", "already used in line 2"),
        (HEADER.replace("harmful", "nasty") + f"\n{ITEM}", "nasty"),
        (HEADER.replace("harmful", "anchors") + f"\n{ITEM}", "anchors"),
    ],
)
def test_an_empty_or_malformed_suite(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    # The line and the fault say what to do.
    refused(audit(tmp_path, "--suite", file), "mine", says, hint=False)


def test_a_suite_without_its_kind(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(ITEM)
    refused(audit(tmp_path, "--suite", file), "--suite KIND=")


def test_a_suite_that_is_not_there(tmp_path: Path) -> None:
    refused(audit(tmp_path, "--suite", f"harmful={tmp_path}/no.jsonl"), "no.jsonl")


def test_a_malformed_suite_stops_a_repair_before_it_begins(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{HEADER}\n{ITEM}\n{ITEM}")
    policy = files("realign_cli") / "data" / "demo-policy.toml"
    options = ["--audit", "--policy", str(policy), "--suite", file]
    refused(repair(tmp_path, None, *options), "already used in line 2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("schema = ", "TOML"),
        ("", "schema"),
        ('schema = "realign/policy/1"\nmargn = 1', "margn"),
        ('schema = "realign/policy/1"\nalpha = 2.0', "alpha"),
    ],
)
def test_a_bad_policy(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    result = audit(tmp_path, "--suite", suite("harmful"), "--policy", file)
    refused(result, "policy.toml", says, hint=False)


# --- a model that cannot be asked ------------------------------------------------------------


def test_a_missing_chat_template(tmp_path: Path) -> None:
    copy = damaged("howto2_p5", tmp_path)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("chat_template", None)
    file.write_text(json.dumps(settings))
    refused(audit(tmp_path, "--suite", suite("harmful"), subject=copy), "chat template", str(copy))


# --- the demo --------------------------------------------------------------------------------


def test_the_demo_touches_no_folder_of_others(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious.txt").write_text("mine")
    refused(realign("demo", "-o", mine, "--quiet"), str(mine), "not a demo's folder")
    assert (mine / "precious.txt").read_text() == "mine"


def test_the_demo_needs_a_whole_family(tmp_path: Path) -> None:
    # The tiny family has no `unaligned`.
    result = realign("demo", "--family", FAMILY, "-o", tmp_path / "work" / "out", "--quiet")
    refused(result, "unaligned is missing", "realign lab build")


# --- the command line itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["repiar"],
        ["repair"],
        ["repair", "x", "--alined", "y"],
        ["repair", "x", "--strength", "much"],
        ["audit"],
        ["lab", "bild"],
        ["lab", "build", "x", "--seed", "one"],
    ],
)
def test_usage_errors_exit_with_2_and_say_where_help_is(arguments: list[str]) -> None:
    refused(realign(*arguments), "--help")


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
@pytest.mark.parametrize(
    "arguments",
    [
        ["repair", "x", "--method", "wise_ft", "--seed"],
        ["audit", "x", "--seed"],
        ["tune", "x", "-o", "out", "--seed"],
        ["unalign", "x", "--data", "f.jsonl", "-o", "out", "--seed"],
        ["lab", "build", "x", "--seed"],
        ["lab", "compare", "x", "-o", "out", "--seeds"],
    ],
)
def test_a_seed_that_no_generator_takes(arguments: list[str], seed: str) -> None:
    refused(realign(*arguments, seed), f"{arguments[-1]} is {seed}", "from 0 to")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["methods", "lsff"], "did you mean lssf?"),
        (["lab", "build", "family", "--preset", "huge"], "huge"),
        (["audit", "x", "-o", "out"], "--suite"),
        (["audit", "x", "--suite", "s.jsonl"], "-o DIR"),
        (["subspace", "x", "--base", "y", "-o", "f.safetensors", "--picture", "gif"], "gif"),
    ],
)
def test_values_that_do_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path / "work")
    refused(realign(*arguments), says)
