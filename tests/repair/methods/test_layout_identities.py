"""Streamed, sharded, fused, tied and adapter layouts give the tensors of the plain layout.

For the methods from weights alone that came with `lox`, `safe_lora` and `safemerge`; the older ones
are held to the same in tests/repair/test_layouts.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.adapter_support import load, tune, with_adapter
from support.layouts_support import make_family, respelled, split_phi3, stack_experts
from support.repair_support import Trio, make_trio, read_folder
from torch import Tensor

from realign.errors import EmptyEditError, NothingToDoError, UsageError
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest

METHODS: Mapping[str, Mapping[str, Any]] = {
    "lox": {"k": 2},
    "safe_lora": {"tau": 0.4},
    "safe_lora-number": {"selection": "number", "num_layers": 3},
    "safemerge": {"tau": 0.4},
    "resta": {"dare": "task", "safety_vector": "base"},
}
every_method = pytest.mark.parametrize("method", METHODS)


def run(
    out: Path, method: str, *, settings: Mapping[str, Any] | None = None, **request: Any
) -> RepairResult:
    return repair(
        RepairRequest(
            output=out,
            method=method.partition("-")[0],
            settings=METHODS[method] if settings is None else settings,
            device="cpu",
            **request,
        )
    )


def roles(trio: Trio) -> dict[str, Path]:
    return {"finetuned": trio.finetuned, "aligned": trio.aligned, "base": trio.base}


def edited(result: RepairResult) -> set[str]:
    return {row.key for row in result.rows if row.outcome == "edited"}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@every_method
def test_shards_do_not_matter(trio_of, tmp_path: Path, method: str) -> None:
    """Nor do tied embeddings: this family has them."""
    whole, shards = trio_of("llama"), trio_of("llama", torch.float32, "20KB")
    assert len(list(shards.finetuned.glob("*.safetensors"))) > 3
    one = run(tmp_path / "one", method, **roles(whole))
    two = run(tmp_path / "two", method, **roles(shards))
    assert edited(one) == edited(two) != set()
    same(read_folder(tmp_path / "one"), read_folder(tmp_path / "two"))


@pytest.mark.parametrize("scope", ["matrices", "all"])
def test_tied_embeddings_are_edited_once(tmp_path: Path, scope: str) -> None:
    trio = make_trio(tmp_path, "llama")
    method = "lox" if scope == "matrices" else "resta"
    run(tmp_path / "out", method, scope=scope, **roles(trio))
    out = read_folder(tmp_path / "out")
    before = read_folder(trio.finetuned)
    assert out.keys() == before.keys()
    assert "lm_head.weight" not in out
    assert not torch.equal(out["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_lox_over_matrices_edits_what_the_public_code_does_and_no_vector(tmp_path: Path) -> None:
    """Everything with more than one dimension, embeddings and head included."""
    trio = make_trio(tmp_path, "qwen2")
    run(tmp_path / "out", "lox", scope="matrices", **roles(trio))
    out = read_folder(tmp_path / "out")
    for name, tensor in read_folder(trio.finetuned).items():
        assert torch.equal(out[name], tensor) is (tensor.dim() == 1), name
    assert not torch.equal(out["lm_head.weight"], read_folder(trio.finetuned)["lm_head.weight"])
    with pytest.raises(UsageError, match="norms and biases"):
        run(tmp_path / "all", "lox", scope="all", **roles(trio))


def test_rows_of_a_larger_vocabulary_are_copied(tmp_path: Path) -> None:
    """The public code pairs without a look at shapes; only common rows have a difference."""
    trio = make_trio(tmp_path, "qwen2")
    model = load(trio.finetuned)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path / "larger")
    larger = {**roles(trio), "finetuned": tmp_path / "larger"}
    run(tmp_path / "out", "lox", scope="matrices", **larger)
    run(tmp_path / "plain", "lox", scope="matrices", **roles(trio))
    before, out = read_folder(tmp_path / "larger"), read_folder(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(out[name][64:], before[name][64:])
        assert torch.equal(out[name][:64], read_folder(tmp_path / "plain")[name])


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trio]:
    root = tmp_path_factory.mktemp("layouts")
    made = {arch: make_family(root / arch, arch) for arch in ("phi3", "mixtral")}
    made["phi3-split"] = respelled(made["phi3"], root / "split", split_phi3)
    made["mixtral-stacked"] = respelled(made["mixtral"], root / "stacked", stack_experts)
    return made


@pytest.mark.parametrize("arch", ["phi3", "mixtral"])
@pytest.mark.parametrize("method", ["lox", "safe_lora", "safe_lora-number", "safemerge"])
def test_fused_and_stacked_layouts_do_not_matter(
    families: dict[str, Trio], tmp_path: Path, arch: str, method: str
) -> None:
    """Every row block and every expert has scores of its own, and is chosen by itself."""
    other, respell = {
        "phi3": ("phi3-split", split_phi3),
        "mixtral": ("mixtral-stacked", stack_experts),
    }[arch]
    settings = dict(METHODS[method])
    if method.endswith("number"):  # by name, ties aside: no two scores are the same here
        settings["num_layers"] = 4
    one = run(tmp_path / "one", method, settings=settings, **roles(families[arch]))
    two = run(tmp_path / "two", method, settings=settings, **roles(families[other]))
    assert len(edited(one)) == len(edited(two)) > 0
    same(respell(read_folder(tmp_path / "one")), read_folder(tmp_path / "two"))


@every_method
def test_an_adapter_is_repaired_as_the_model_that_peft_merges(tmp_path: Path, method: str) -> None:
    trio = make_trio(tmp_path, "qwen2")
    adapter = tune(trio.aligned, tmp_path / "adapter", r=3, lora_alpha=5, target_modules=[
        "q_proj", "v_proj", "down_proj",
    ])  # fmt: skip
    merged = tmp_path / "merged"
    with_adapter(trio.aligned, adapter).merge_and_unload().save_pretrained(merged)
    settings = {**METHODS[method], **({"tau": 0.6} if "tau" in METHODS[method] else {})}
    others = {"aligned": trio.aligned, "base": trio.base}
    one = run(tmp_path / "one", method, settings=settings, finetuned=adapter, **others)
    two = run(tmp_path / "two", method, settings=settings, finetuned=merged, **others)
    assert edited(one) == edited(two)
    assert any(row.changed for row in one.rows)
    found, expected = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=0, atol=2e-7), name
    if method.startswith("safe"):
        assert {row.edit for row in one.rows if row.outcome == "edited"} == {"low-rank"}
        assert {row.edit for row in two.rows if row.outcome == "edited"} == {"dense"}
        untouched = [row for row in one.rows if row.module in ("k_proj", "up_proj")]
        assert {row.reason for row in untouched} == {"task vector is zero"}


def test_two_adapters_are_merged_without_forming_a_product(tmp_path: Path) -> None:
    """Of other ranks and scales; the patch is an adapter that peft runs."""
    trio = make_trio(tmp_path, "qwen2")
    targets = ["q_proj", "v_proj"]
    task = tune(trio.aligned, tmp_path / "task", r=2, lora_alpha=5, target_modules=targets)
    safe = tune(
        trio.aligned, tmp_path / "safe", r=3, lora_alpha=2, size=0.2, target_modules=targets
    )
    others = {"aligned": trio.aligned, "base": trio.base, "safety": safe}
    settings = {"tau": 2.0, "w": 0.8}
    result = run(tmp_path / "out", "safemerge", settings=settings, finetuned=task, **others)
    assert {row.edit for row in result.rows if row.outcome == "edited"} == {"low-rank"}
    mixed = read_folder(tmp_path / "out")
    states = [
        with_adapter(trio.aligned, each).merge_and_unload().state_dict() for each in (task, safe)
    ]
    for name, tensor in mixed.items():
        expected = 0.8 * states[0][name] + 0.2 * states[1][name]
        assert torch.allclose(tensor, expected, rtol=0, atol=2e-7), name
    patched = run(
        tmp_path / "patch", "safemerge", settings=settings, finetuned=task, patch=True, **others
    )
    running = with_adapter(trio.aligned, patched.output).merge_and_unload().state_dict()
    for name, tensor in mixed.items():
        assert torch.allclose(running[name], tensor, rtol=0, atol=2e-7), name


def test_a_safe_lora_patch_is_an_adapter(tmp_path: Path) -> None:
    trio = make_trio(tmp_path, "qwen2")
    adapter = tune(trio.aligned, tmp_path / "adapter", r=3, target_modules=["q_proj", "up_proj"])
    others = {"finetuned": adapter, "aligned": trio.aligned, "base": trio.base}
    settings = {"tau": 2.0}
    run(tmp_path / "out", "safe_lora", settings=settings, **others)
    patched = run(tmp_path / "patch", "safe_lora", settings=settings, patch=True, **others)
    running = with_adapter(trio.aligned, patched.output).merge_and_unload().state_dict()
    for name, tensor in read_folder(tmp_path / "out").items():
        assert torch.allclose(running[name], tensor, rtol=0, atol=2e-7), name


def test_targets_given_as_one_expression_are_not_taken_for_letters(tmp_path: Path) -> None:
    trio = make_trio(tmp_path, "qwen2")
    pattern = r".*\.(q|v)_proj"
    adapter = tune(trio.aligned, tmp_path / "adapter", r=2, target_modules=pattern)
    others = {"finetuned": adapter, "aligned": trio.aligned, "base": trio.base}
    result = run(tmp_path / "out", "safe_lora", settings={"tau": 2.0}, **others)
    assert {row.module for row in result.rows if row.outcome == "edited"} == {"q_proj", "v_proj"}
    assert load(tmp_path / "out") is not None


def test_biases_do_not_shift_the_pairs(tmp_path: Path) -> None:
    """Qwen2 stores biases between its weights; one side in another order of names."""
    trio = make_trio(tmp_path, "qwen2")
    assert any(name.endswith("q_proj.bias") for name in read_folder(trio.base))
    one = run(tmp_path / "one", "safe_lora", **roles(trio))
    turned = tmp_path / "turned"
    shutil.copytree(trio.base, turned)
    tensors = dict(reversed(read_folder(trio.base).items()))
    save_file(tensors, turned / "model.safetensors", metadata={"format": "pt"})
    two = run(tmp_path / "two", "safe_lora", **{**roles(trio), "base": turned})
    assert edited(one) == edited(two) != set()
    same(read_folder(tmp_path / "one"), read_folder(tmp_path / "two"))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lox"])
@pytest.mark.parametrize("case", ["same weights", "other type"])
def test_no_fine_tune_is_nothing_to_do(tmp_path: Path, trio_of, method: str, case: str) -> None:
    """Form B ends at Wa: exit 2 if a look at the files shows it, else 1; nothing is left behind."""
    trio = trio_of("llama")
    finetuned = trio.aligned
    if case == "other type":  # the same numbers, so a look at headers sees a difference
        finetuned = tmp_path / "copy"
        load(trio.aligned).double().save_pretrained(finetuned)
    settings = dict(METHODS[method])
    if method == "resta":
        settings["gamma"] = 0.0
    expected = NothingToDoError if case == "same weights" else EmptyEditError
    with pytest.raises(expected) as caught:
        run(tmp_path / "out", method, settings=settings, **{**roles(trio), "finetuned": finetuned})
    assert caught.value.exit_code == (2 if case == "same weights" else 1)
    assert not (tmp_path / "out").exists()


@every_method
def test_no_safety_vector_is_nothing_to_do(tmp_path: Path, trio_of, method: str) -> None:
    trio = trio_of("llama")
    with pytest.raises(NothingToDoError):
        run(tmp_path / "out", method, **{**roles(trio), "base": trio.aligned})


def test_hardening_writes_what_post_hoc_gives_on_a_fine_tune_that_has_not_moved(
    tmp_path: Path, trio_of
) -> None:
    trio = trio_of("llama")
    hard = run(
        tmp_path / "hard",
        "lox",
        settings={"mode": "harden", "k": 2, "alpha": 1.25},
        finetuned=trio.aligned,
        base=trio.base,
    )
    assert hard.plan.inputs.keys() == {"finetuned", "base"}
    # Post-hoc refuses a fine-tune that has not moved: one that did, by its own edit, is taken off.
    post = run(tmp_path / "post", "lox", settings={"k": 2, "alpha": 1.25}, **roles(trio))
    aligned, finetuned = read_folder(trio.aligned), read_folder(trio.finetuned)
    one, two = read_folder(tmp_path / "hard"), read_folder(tmp_path / "post")
    for name in aligned:
        edit, other = one[name] - aligned[name], two[name] - finetuned[name]
        assert torch.allclose(edit, other, rtol=0, atol=1e-7), name
    assert edited(hard) == edited(post) != set()


@pytest.mark.parametrize("method", ["lox", "safe_lora", "resta"])
def test_threads_and_strength(tmp_path: Path, trio_of, method: str) -> None:
    """The result does not depend on threads; at strength t it lies on the way to the method's."""
    trio = trio_of("llama")
    request = RepairRequest(
        method=method.partition("-")[0],
        settings=METHODS[method],
        device="cpu",
        output=tmp_path / "one",
        **roles(trio),
    )
    repair(request, in_flight=1)
    run(tmp_path / "two", method, **roles(trio))
    same(read_folder(tmp_path / "one"), read_folder(tmp_path / "two"))
    run(tmp_path / "half", method, strength=0.5, **roles(trio))
    before, whole = read_folder(trio.finetuned), read_folder(tmp_path / "two")
    for name, tensor in read_folder(tmp_path / "half").items():
        expected = 0.5 * (before[name] + whole[name])
        assert torch.allclose(tensor, expected, rtol=0, atol=2e-7), name
