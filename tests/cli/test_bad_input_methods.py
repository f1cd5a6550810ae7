"""Bad input of methods, texts and subsets, end to end: one message, exit code 2, nothing left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.cli_support import FAMILY, family_options, model, realign, suite
from support.refusal_support import nothing_left, refused
from support.refusal_support import repair_at_work as repair
from support.repair_support import make_trio

from realign.repair.parameters import Choice, Domain, Either, Integer, Nothing, Real
from realign.repair.registry import METHODS

PARAMETERS = [(name, each.name) for name, method in METHODS.items() for each in method.parameters()]
ROW = {"prompt": "a question", "response": "an answer"}
PAIR = {"prompt": "a question", "chosen": "no", "rejected": "yes"}


@pytest.fixture(autouse=True)
def nothing_changes_and_nothing_stays(tmp_path: Path) -> Iterator[None]:
    with nothing_left(tmp_path / "work"):
        yield


def _file(tmp_path: Path, *rows: Mapping[str, object] | str) -> Path:
    file = tmp_path / "texts.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return file


def _illegal(domain: Domain) -> str:
    """A value that the domain does not admit: just outside of its bounds where it has some."""
    if isinstance(domain, Either):
        bounded = [each for each in domain.domains if not isinstance(each, Choice | Nothing)]
        return _illegal(bounded[0]) if bounded else "nonsense"
    if isinstance(domain, Integer):
        return str(domain.low - 1)
    if isinstance(domain, Real):
        if domain.low > float("-inf"):
            return str(domain.low - 0.5)
        return "nan" if domain.high == float("inf") else str(domain.high + 0.5)
    return "nonsense"


@pytest.mark.parametrize(("method", "name"), PARAMETERS)
def test_a_parameter_out_of_range(tmp_path: Path, method: str, name: str) -> None:
    spec = next(each for each in METHODS[method].parameters() if each.name == name)
    value = _illegal(spec.domain)
    result = repair(tmp_path, None, "--method", method, "--set", f"{name}={value}")
    refused(result, name, value, "must be")


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("delta_svd", ["rank=5000"], "rank = 5000 is above the rank of every matrix"),
        ("replace", ["rank=5000"], "rank = 5000 is above the rank of every matrix"),
        ("lox", ["k=5000"], "k = 5000 is above the rank of every matrix"),
        ("lssf", ["rank_rule=5000"], "rank_rule = 5000 is above the rank of every matrix"),
        ("lssf", ["eta=1"], "eta = 1 keeps every direction"),
        ("lssf", ["eta=0"], "eta = 0 keeps one direction"),
        ("delta_svd", ["rank=energy", "eta=1"], "eta = 1 keeps every direction"),
        ("replace", ["rank=entropy", "eta=0"], "eta = 0 keeps one direction"),
        ("antidote", ["alpha=0"], "alpha = 0 prunes nothing"),
        ("antidote", ["alpha=1"], "alpha = 1 prunes every entry"),
        ("wise_ft", ["a=0"], "a = 0 is the fine-tune itself"),
        ("safe_delta", ["s=0"], "s = 0 keeps nothing of the task vector"),
        ("safe_delta", ["drop_fraction=1"], "drop_fraction = 1 rejects every entry"),
        ("irr", ["keep_fraction=1"], "keep_fraction = 1 keeps every conflict"),
        ("nlsr", ["fraction=0"], "fraction = 0 leaves nothing to repair"),
        ("nlsr", ["q=1"], "q = 1 leaves nothing to repair"),
        ("safemerge", ["w=1"], "w = 1 keeps the fine-tune whole"),
        ("safe_lora", ["tau=0"], "tau = 0 selects no matrix"),
        ("one_shot", ["k=5000"], "k = 5000 is above the rank of every matrix"),
        ("somf", ["threshold=0"], "threshold = 0 keeps everything"),
        ("somf", ["threshold=1"], "threshold = 1 keeps nothing"),
        ("safe_patching", ["p=0"], "p = 0 keeps nothing of the patches"),
        ("q_realign", ["quantise=false", "smooth=false"], "leave nothing to do"),
    ],
)
def test_settings_that_choose_everything_or_nothing(
    tmp_path: Path, method: str, settings: list[str], words: str
) -> None:
    options = [part for each in settings for part in ("--set", each)]
    refused(repair(tmp_path, None, "--method", method, *options), words)


def test_a_rank_above_some_matrices_is_remarked_on(tmp_path: Path) -> None:
    """Keys and values of the tiny Llama have 16 rows, its other matrices at least 32."""
    trio = make_trio(tmp_path, "llama")
    models = ["--aligned", trio.aligned, "--base", trio.base, "--method", "delta_svd"]
    options = [*models, "--set", "rank=20", "--dry-run", "--json"]
    found = realign("repair", trio.finetuned, *options)
    (note,) = (note for note in found.json["notes"] if "rank = 20" in note)
    assert "4 of 14 matrices" in note and "k_proj.weight with 16" in note
    assert "all of their directions are kept" in note


@pytest.mark.parametrize(("count", "remarked"), [(500, True), (15, True), (14, False)])
def test_more_matrices_than_there_are_is_remarked_on(
    tmp_path: Path, count: int, remarked: bool
) -> None:
    trio = make_trio(tmp_path, "llama")
    models = ["--aligned", trio.aligned, "--base", trio.base, "--method", "safe_lora"]
    options = [*models, "--set", "selection=number", "--set", f"num_layers={count}", "--dry-run"]
    notes = realign("repair", trio.finetuned, *options, "--json").json["notes"]
    said = f"num_layers = {count}: there are only 14 matrices, all are selected"
    assert (said in notes) == remarked
    by_threshold = [*models, "--set", f"num_layers={count}", "--dry-run", "--json"]
    assert said not in realign("repair", trio.finetuned, *by_threshold).json["notes"]


@pytest.mark.parametrize(("rank", "remarked"), [(500, True), (32, True), (31, False)])
def test_a_patch_rank_that_truncates_nothing_is_remarked_on(
    tmp_path: Path, rank: int, remarked: bool
) -> None:
    """Of the tiny Llama's matrices none has more than 32 directions."""
    trio = make_trio(tmp_path, "llama")
    models = ["--aligned", trio.aligned, "--base", trio.base, "--method", "resta"]
    options = [*models, "--patch", "--max-patch-rank", str(rank), "--dry-run", "--json"]
    notes = realign("repair", trio.finetuned, *options).json["notes"]
    said = f"--max-patch-rank {rank} truncates nothing: no matrix has more than 32 directions"
    assert (said in notes) == remarked


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "without", "option"),
    [
        ("irr", "aligned", "--aligned"),
        ("safe_delta", "aligned", "--aligned"),
        ("somf", "aligned", "--aligned"),
        ("safe_lora", "base", "--base"),
        ("safemerge", "base", "--base"),
        ("lox", "base", "--base"),
    ],
)
def test_a_checkpoint_that_a_method_needs(
    tmp_path: Path, method: str, without: str, option: str
) -> None:
    refused(repair(tmp_path, None, "--method", method, **{without: None}), method, option)


def test_a_safety_model_that_is_asked_for(tmp_path: Path) -> None:
    options = ["--method", "safemerge", "--set", "safety_model=safety"]
    refused(repair(tmp_path, None, *options), "safety", "--safety-model")


@pytest.mark.parametrize("option", ["--safety-model", "--reference", "--also"])
def test_another_checkpoint_that_is_not_there(tmp_path: Path, option: str) -> None:
    missing = tmp_path / "nowhere"
    refused(repair(tmp_path, None, "--method", "wise_ft", option, missing), str(missing))


def test_fine_tunes_to_fuse_with_a_method_that_does_not(tmp_path: Path) -> None:
    options = ["--method", "wise_ft", "--also", model("base")]
    refused(repair(tmp_path, None, *options), "cannot fuse others", "somf")


@pytest.mark.parametrize("method", ["antidote", "nlsr", "somf"])
def test_the_factors_of_a_fine_tune_that_has_none(tmp_path: Path, method: str) -> None:
    texts = _file(tmp_path, ROW)
    options = ["--method", method, "--set", "space=adapter", "--harmful-data", texts]
    result = repair(tmp_path, None, *options, "--safe-data", texts, "--keep-data", texts)
    refused(result, f"{method} with space = adapter needs", "LoRA adapter", "--set space=merged")


# --- texts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("antidote", "--harmful-data"),
        ("irr", "--task-data"),
        ("safe_patching", "--harmful-data"),
        ("q_realign", "--keep-data"),
        ("somf", "--keep-data"),
    ],
)
def test_texts_that_a_method_needs(tmp_path: Path, method: str, option: str) -> None:
    vector = {"unaligned": model("base")} if method == "irr" else {}
    refused(repair(tmp_path, None, "--method", method, **vector), method, option)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("not JSON", "texts.jsonl:2"),
        (PAIR, "texts.jsonl:2"),
        ({"prompt": "a question"}, "texts.jsonl:2"),
        ({"prompt": 7, "response": "an answer"}, "texts.jsonl:2"),
        ({"messages": []}, "texts.jsonl:2"),
        ([], "texts.jsonl:2"),
    ],
)
def test_texts_of_another_shape(tmp_path: Path, row: object, says: str) -> None:
    line = row if isinstance(row, str) else json.dumps(row)
    texts = _file(tmp_path, ROW, line)
    refused(repair(tmp_path, None, "--method", "antidote", "--harmful-data", texts), says)


def test_texts_that_are_not_there_or_empty(tmp_path: Path) -> None:
    for texts in (tmp_path / "nowhere.jsonl", _file(tmp_path)):
        result = repair(tmp_path, None, "--method", "antidote", "--harmful-data", texts)
        refused(result, str(texts))


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("antidote", "--harmful-data"),
        ("safe_delta", "--safe-data"),
        ("nlsr", "--safe-data"),
        ("safe_patching", "--harmful-data"),
        ("one_shot", "--safe-data"),
    ],
)
def test_texts_that_the_audit_asks_too(tmp_path: Path, method: str, option: str) -> None:
    lines = suite("harmful").read_text("utf-8").splitlines()
    asked = [json.loads(line)["prompt"] for line in lines if "prompt" in json.loads(line)]
    rows = [{**ROW, "prompt": prompt} for prompt in (*asked[:3], "a question of its own")]
    texts = _file(tmp_path, *rows)
    result = repair(tmp_path, None, "--method", method, option, texts, "--suite", suite("harmful"))
    refused(result, option, "shares 3 prompts with the suite")


def test_texts_that_no_one_reads_are_remarked_on(tmp_path: Path) -> None:
    texts = _file(tmp_path, ROW)
    options = ["--method", "wise_ft", "--keep-data", texts, "--dry-run", "--json"]
    found = realign("repair", model(), *family_options(), *options)
    assert found.exit_code == 0
    assert any("--keep-data is not used" in note for note in found.json["notes"])
    assert found.json["texts"] == {}


@pytest.mark.parametrize("method", ["safe_delta", "wise_ft", "q_realign"])
def test_a_dense_method_says_at_once_that_it_makes_no_patch(tmp_path: Path, method: str) -> None:
    options = ["--method", method, "--patch", "--keep-data", _file(tmp_path, ROW)]
    refused(repair(tmp_path, None, *options), f"{method} edits every entry", "--max-patch-rank")


# --- parts of a model, several models, encodings -------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "97"], "--layers names 97"),
        (["--layers", "3-1"], "--layers takes"),
        (["--modules", "q_prj"], "--modules names q_prj"),
        (["--encode", "zip"], "there is no encoding 'zip'"),
        (["--encode", "compressed-tensors", "--patch"], "do not go together"),
    ],
)
def test_parts_and_encodings_that_are_not_there(
    tmp_path: Path, options: list[str], words: str
) -> None:
    refused(repair(tmp_path, None, "--method", "delta_svd", *options), words)


def test_two_fine_tunes_of_one_name(tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    twice = realign(
        "repair", model(), FAMILY / "suites" / ".." / model().name, *family_options(), "-o", out
    )
    refused(twice, "would both be written to the folder", model().name)
