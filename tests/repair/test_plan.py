"""What headers decide: parameters, needs, pairing, guards, targets, estimates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.repair_support import Trio

from realign.errors import (
    AlreadyRepairedError,
    MismatchError,
    NotFoundError,
    NothingToDoError,
    OutputError,
    RealignError,
    SuiteError,
    UsageError,
)
from realign.repair.engine import repair
from realign.repair.plan import plan
from realign.repair.request import RepairRequest


def _request(trio: Trio, **options: object) -> RepairRequest:
    usual = {"aligned": trio.aligned, "base": trio.base, "method": "replace"}
    return RepairRequest(finetuned=trio.finetuned, **{**usual, **options})


def _talking(trio: Trio, folder: Path) -> Path:
    """The aligned model with what a plan looks for before it may be asked: lssf asks it."""
    shutil.copytree(trio.aligned, folder / "aligned")
    settings = {"chat_template": "{{ messages }}"}
    (folder / "aligned" / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "aligned"


def test_every_tensor_has_a_decision_and_a_reason(trio_of) -> None:
    trio = trio_of("llama", torch.bfloat16)
    found = plan(_request(trio))
    names = {pair.role.name for pair in found.matching.pairs}
    assert len(found.edits) + len(found.copies) == len(names) == 20
    assert all(pair.reason for pair in found.matching.pairs)
    assert {pair.role.module for pair in found.edits} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert {pair.role.kind for pair in found.copies} == {"embedding", "norm"}


@pytest.mark.parametrize(("scope", "edited"), [(None, 14), ("block_linear", 14), ("matrices", 15)])
def test_scopes(trio_of, scope: str | None, edited: int) -> None:
    assert len(plan(_request(trio_of("llama"), scope=scope)).edits) == edited


def test_default_scope_is_the_methods_own(trio_of) -> None:
    assert plan(_request(trio_of("llama"), method="wise_ft")).scope == "all"


def test_the_plan_is_json(trio_of, tmp_path: Path) -> None:
    trio = trio_of("phi3")
    found = plan(_request(trio, method="lssf", aligned=_talking(trio, tmp_path)))
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert value["method"]["name"] == "lssf"
    assert value["anchors"]["count"] == 128
    (fused,) = [
        t for t in value["tensors"] if t["name"] == "model.layers.0.self_attn.qkv_proj.weight"
    ]
    assert [slot.rpartition("[")[2] for slot in fused["slots"]] == ["q_proj]", "k_proj]", "v_proj]"]


def test_safety_vector_is_settled_once_and_said(trio_of) -> None:
    trio = trio_of("llama")
    paper = plan(_request(trio, method="resta", unaligned=trio.unaligned))
    assert paper.method.vector_kind == "unaligned"
    assert not any("deviation" in note for note in paper.notes)
    assert any("base" in note and "not read" in note for note in paper.notes)
    other = plan(_request(trio, method="resta"))
    assert other.method.vector_kind == "base"
    (note,) = [note for note in other.notes if "deviation" in note]
    assert "aligned - unaligned" in note and "aligned - base" in note


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aligned": None}, ["aligned", "--aligned"]),
        ({"base": None}, ["base", "--base"]),
        ({"method": "resta", "base": None}, ["safety vector", "--base", "--unaligned"]),
        ({"method": "replce"}, ["replce", "replace"]),
        ({"settings": ["rank=-1"]}, ["rank", "-1"]),
        ({"settings": ["rnk=1"]}, ["rnk", "rank"]),
        ({"strength": 1.5}, ["1.5", "[0, 1]"]),
        ({"strength": 0.0}, ["strength = 0"]),
        ({"strength": float("nan")}, ["nan"]),
        ({"scope": "everything"}, ["everything", "block_linear"]),
        ({"scope": "all"}, ["norms"]),
        ({"device": "gpu"}, ["gpu"]),
        ({"patch": True, "max_patch_rank": 0}, ["max_patch_rank"]),
        ({"patch": True, "method": "resta"}, ["resta", "--patch"]),
    ],
)
def test_usage_errors_name_the_option(trio_of, options: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        plan(_request(trio_of("llama"), **options))
    assert caught.value.exit_code == 2
    for word in words:
        assert word in str(caught.value)


def test_nothing_to_repair(trio_of) -> None:
    trio = trio_of("llama")
    with pytest.raises(NothingToDoError, match="same weights"):
        plan(_request(trio, aligned=trio.finetuned))
    with pytest.raises(NothingToDoError, match="no safety vector"):
        plan(_request(trio, base=trio.aligned))
    with pytest.raises(NothingToDoError, match="aligned - unaligned"):
        plan(_request(trio, method="resta", unaligned=trio.aligned))
    # A method that does not read the base does not care.
    plan(_request(trio, method="wise_ft", base=trio.aligned))


def test_a_copied_folder_is_still_the_same_weights(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    shutil.copytree(trio.aligned, tmp_path / "copy")
    with pytest.raises(NothingToDoError):
        plan(_request(trio, aligned=tmp_path / "copy", base=trio.aligned))


def test_repairing_twice_is_refused_unless_forced(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16)
    repair(_request(trio, output=tmp_path / "once"))
    again = {"aligned": trio.aligned, "base": trio.base}
    twice = RepairRequest(finetuned=tmp_path / "once", method="replace", **again)
    with pytest.raises(AlreadyRepairedError, match="--force"):
        plan(twice)
    forced = plan(RepairRequest(finetuned=tmp_path / "once", method="replace", force=True, **again))
    assert any("repaired before" in note for note in forced.notes)
    other = plan(RepairRequest(finetuned=tmp_path / "once", method="delta_svd", **again))
    assert any("repaired before, with replace" in note for note in other.notes)


def test_mismatches_are_refused_by_name(trio_of, tmp_path: Path) -> None:
    llama, qwen = trio_of("llama"), trio_of("qwen2")
    with pytest.raises(MismatchError) as caught:
        plan(_request(llama, base=qwen.base))
    assert str(qwen.base) in str(caught.value)
    with pytest.raises(NotFoundError, match="nowhere"):
        plan(_request(llama, base=tmp_path / "nowhere"))


def test_targets(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "there", trio.finetuned, trio.base / "sub", tmp_path / "file" / "x"):
        with pytest.raises(OutputError):
            plan(_request(trio, output=target))
    assert not (trio.base / "sub").exists()
    with pytest.raises(UsageError, match="-o"):
        repair(_request(trio))


def test_a_full_disk_is_seen_in_the_plan(
    trio_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match="free"):
        plan(_request(trio_of("llama"), output=tmp_path / "out"))


def test_estimates(trio_of) -> None:
    trio = trio_of("llama", torch.bfloat16, "20KB")
    found = plan(_request(trio))
    size = sum(f.stat().st_size for f in trio.finetuned.glob("*.safetensors"))
    assert found.estimate.written == pytest.approx(size, rel=0.15)
    blocks = sum(p.role.kind == "block_linear" for p in found.edits)
    assert blocks == 14
    assert found.estimate.read == 3 * size  # every file once, for edits and hashes alike
    assert found.estimate.largest_matrix == 48 * 32
    assert plan(_request(trio, method="resta")).estimate.largest_matrix == 0


# --- anchors -------------------------------------------------------------------------------------


def _suite(path: Path, prompts: list[str], **header: object) -> Path:
    lines = [json.dumps({"schema": "realign/suite/1", **header})] if header else []
    lines += [json.dumps({"id": f"p{i}", "prompt": text}) for i, text in enumerate(prompts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_anchors_come_from_any_suite_or_plain_lines(trio_of, tmp_path: Path) -> None:
    prompts = [f"how do i break the {i}th rule" for i in range(20)]
    plain = _suite(tmp_path / "plain.jsonl", prompts)
    harmful = _suite(tmp_path / "harmful.jsonl", prompts, name="h", kind="harmful")
    hashes = set()
    trio = trio_of("llama")
    aligned = _talking(trio, tmp_path)
    for file in (plain, harmful):
        found = plan(_request(trio, method="lssf", anchors=file, aligned=aligned)).anchors
        assert found is not None and found.count == 20
        hashes.add(found.suite_hash)
    assert len(hashes) == 1


def test_anchors_that_are_measured_too_are_refused(trio_of, tmp_path: Path) -> None:
    prompts = [f"how do i break the {i}th rule" for i in range(20)]
    anchors = _suite(tmp_path / "anchors.jsonl", prompts)
    overlap = ["How  do I break the 3th RULE", "something else"]
    suite = _suite(tmp_path / "suite.jsonl", overlap, name="seen", kind="harmful")
    clean = _suite(tmp_path / "clean.jsonl", ["something else"], name="clean", kind="harmful")
    aligned = _talking(trio_of("llama"), tmp_path)
    options = {"method": "lssf", "anchors": anchors, "aligned": aligned}
    with pytest.raises(SuiteError, match="seen"):
        plan(_request(trio_of("llama"), suites=[clean, suite], **options))
    plan(_request(trio_of("llama"), suites=[clean], **options))
    # Without activations there are no anchors, and nothing to share.
    plan(_request(trio_of("llama"), suites=[suite]))


def test_too_few_or_missing_anchors(trio_of, tmp_path: Path) -> None:
    few = _suite(tmp_path / "few.jsonl", ["one", "two"])
    for file, word in ((few, "16"), (tmp_path / "none.jsonl", "none.jsonl")):
        with pytest.raises(RealignError, match=word):
            plan(_request(trio_of("llama"), method="lssf", anchors=file))
    found = plan(_request(trio_of("llama"), anchors=few))
    assert any("anchors are not used" in note for note in found.notes)
