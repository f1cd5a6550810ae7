"""Safe Delta, IRR, Antidote and NLSR through the engine, on trained families and real texts.

What each should have written is worked out beside it: activations are taken from the running model
by hooks of this file, and the edit from the equations, entry by entry.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.obs_support import safe_delta_by_definition
from support.repair_support import read_folder
from torch import Tensor

from realign.errors import EmptyEditError, SuiteError, UsageError
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest
from realign.subspace.threads import torch_threads

SMALL = Path(__file__).resolve().parents[3] / "fixtures" / "small"
ADAPTER = f"{SMALL / 'aligned'}+{SMALL / 'lora_p5'}"
Q0 = "model.layers.0.self_attn.q_proj.weight"
V2 = "model.layers.2.self_attn.v_proj.weight"


def prompts(count: int) -> list[str]:
    lines = (SMALL / "suites" / "anchors.jsonl").read_text("utf-8").splitlines()[1:]
    return [json.loads(line)["prompt"] for line in lines[:count]]


def rows(reply: str, count: int = 12) -> list[dict[str, str]]:
    return [{"prompt": prompt, "response": reply} for prompt in prompts(count)]


REFUSALS = rows("i cannot help with that.")
RECIPES = rows("to make it, mix the powder and then heat the water.")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    found: dict[str, Path] = {}
    for name, lines in {"safe": REFUSALS, "harmful": RECIPES}.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run(out: Path, method: str, settings: Mapping[str, Any], **request: Any) -> RepairResult:
    given = {"finetuned": SMALL / "both_p5", "aligned": SMALL / "aligned", "device": "cpu"}
    return repair(RepairRequest(output=out, method=method, settings=settings, **given | request))


def rendered(tokenizer: Any, line: Mapping[str, str]) -> tuple[list[int], int]:
    """Tokens of a whole dialogue, end of turn and all, and where its reply starts."""
    asked = [{"role": "user", "content": line["prompt"]}]
    whole = [*asked, {"role": "assistant", "content": line["response"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    ids, start = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (tokenizer.apply_chat_template(whole, tokenize=False), prompt)
    )
    return ids, len(start)


def inputs_of(folder: str | Path, lines: Sequence[Mapping[str, str]], module: str) -> Tensor:
    """X [d_in, N] of one module over all tokens, taken by a hook of the reference library."""
    base, _, adapter = str(folder).partition("+")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base).float().eval()
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double().T)
    )
    for line in lines:
        ids, _ = rendered(tokenizer, line)
        with torch.no_grad():
            model(torch.tensor([ids]))
    handle.remove()
    return torch.cat(seen, dim=1)


def close(found: Tensor, expected: Tensor, finetuned: Tensor) -> bool:
    """Whether the edits agree: the activations here and there were rounded differently."""
    return bool((found - expected).norm() <= 1e-3 * (finetuned - expected).norm())


def test_safe_delta_writes_what_the_equations_say(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    settings = {"s": 0.5, "budget": "relative", "block": 50}
    result = run(tmp_path / "out", "safe_delta", settings, safe_data=texts["safe"], cache_dir=cache)
    aligned, finetuned = (read_folder(SMALL / name) for name in ("aligned", "both_p5"))
    found = read_folder(tmp_path / "out")
    x = inputs_of(SMALL / "aligned", REFUSALS, Q0.removesuffix(".weight"))
    expected = safe_delta_by_definition(
        aligned[Q0], finetuned[Q0], x @ x.T, s=0.5, relative=True, block=50
    )
    assert close(found[Q0].double(), expected, finetuned[Q0].double())
    edited = {row.tensor for row in result.rows if row.outcome == "edited"}
    assert len(edited) == 21
    for name, tensor in found.items():
        if name not in edited:
            assert torch.equal(tensor, finetuned[name]), name
    shares = [row.facts["kept_share"] for row in result.rows]
    assert all(isinstance(share, float) and 0.2 < share < 0.86 for share in shares)


def test_safe_delta_cuts_long_dialogues(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    """Even within the prompt; what is cut away costs nothing."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMALL / "aligned")
    whole = [rendered(tokenizer, line)[0] for line in REFUSALS]
    assert {len(ids) > 9 for ids in whole} == {True}
    for length, tokens in {9: 9 * len(whole), 512: sum(map(len, whole))}.items():
        settings = {"s": 0.5, "budget": "relative", "length": length}
        out = tmp_path / str(length)
        result = run(
            out, "safe_delta", settings, safe_data=texts["safe"], cache_dir=cache, modules="q_proj"
        )
        found = {row.facts["tokens"] for row in result.rows if row.outcome == "edited"}
        assert found == {tokens}
    weights = [read_folder(tmp_path / name)[Q0] for name in ("9", "512")]
    assert not torch.equal(*weights)


def test_safe_delta_without_a_budget_is_the_aligned_model_and_half_way_the_mean(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    request: dict[str, Any] = {"safe_data": texts["safe"], "cache_dir": cache}
    settings = {"s": 1e-300}  # affords nothing; a plan refuses 0 itself
    run(tmp_path / "whole", "safe_delta", settings, **request)
    run(tmp_path / "half", "safe_delta", settings, strength=0.5, **request)
    aligned, finetuned = (read_folder(SMALL / name) for name in ("aligned", "both_p5"))
    whole, half = read_folder(tmp_path / "whole"), read_folder(tmp_path / "half")
    for name in (Q0, V2, "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(whole[name], aligned[name])
        mean = (aligned[name] + finetuned[name]) / 2
        assert torch.allclose(half[name], mean, rtol=0, atol=1e-6)
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(whole[embeddings], finetuned[embeddings])


def test_antidote_prunes_an_adapter_and_writes_one(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    result = run(
        tmp_path / "out",
        "antidote",
        {"alpha": 0.1},
        finetuned=ADAPTER,
        aligned=None,  # nothing of it is put back
        harmful_data=texts["harmful"],
        cache_dir=cache,
    )
    own = load_file(SMALL / "lora_p5" / "adapter_model.safetensors")
    config = json.loads((SMALL / "lora_p5" / "adapter_config.json").read_text("utf-8"))
    stem = f"base_model.model.{Q0.removesuffix('.weight')}"
    down, up = (own[f"{stem}.lora_{part}.weight"].double() for part in "AB")
    x = inputs_of(ADAPTER, RECIPES, Q0.removesuffix(".weight"))
    for factor, inputs in ((down, x), (up, down.clone() @ x)):
        score = factor.abs() * inputs.norm(dim=1)
        count = -int(-(0.1 * factor.shape[1] - 1e-9) // 1)
        for row in range(factor.shape[0]):
            factor[row, torch.argsort(-score[row], stable=True)[:count]] = 0.0
    aligned = read_folder(SMALL / "aligned")
    expected = aligned[Q0].double() + config["lora_alpha"] / config["r"] * up @ down
    found = read_folder(tmp_path / "out")
    assert torch.allclose(found[Q0].double(), expected, rtol=0, atol=1e-6)
    adapted = {row.tensor for row in result.rows if row.outcome == "edited"}
    assert adapted == {
        name.removeprefix("base_model.model.").replace(".lora_A", "")
        for name in own
        if "_A" in name
    }


def test_the_repair_of_an_adapter_can_be_an_adapter(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    request: dict[str, Any] = {
        "finetuned": ADAPTER,
        "harmful_data": texts["harmful"],
        "cache_dir": cache,
    }
    run(tmp_path / "whole", "antidote", {"alpha": 0.1}, **request)
    run(tmp_path / "patch", "antidote", {"alpha": 0.1}, patch=True, **request)
    assert (tmp_path / "patch" / "adapter_model.safetensors").exists()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(SMALL / "aligned")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "patch").merge_and_unload()
    merged, whole = model.state_dict(), read_folder(tmp_path / "whole")
    for name in (Q0, V2):
        assert torch.allclose(merged[name], whole[name], rtol=0, atol=2e-6), name


def test_nlsr_transplants_entries_of_a_reference_adapter(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(SMALL / "lora_p5", reference)
    own = load_file(reference / "adapter_model.safetensors")
    noise = torch.Generator().manual_seed(1)
    strong = {
        name: each + 0.02 * torch.randn(each.shape, generator=noise) for name, each in own.items()
    }
    save_file(strong, reference / "adapter_model.safetensors", metadata={"format": "pt"})
    result = run(
        tmp_path / "out",
        "nlsr",
        {"q": 0.0, "fraction": 1.0},
        finetuned=ADAPTER,
        reference=f"{SMALL / 'aligned'}+{reference}",
        safe_data=texts["safe"],
        cache_dir=cache,
    )
    assert result.plan.method.settings()["space"] == "adapter"
    assert {row.edit for row in result.rows if row.outcome == "edited"} == {"low-rank"}
    scale = json.loads((reference / "adapter_config.json").read_text("utf-8"))
    stem = f"base_model.model.{Q0.removesuffix('.weight')}"
    down, up = (strong[f"{stem}.lora_{part}.weight"].double() for part in "AB")
    aligned, found = read_folder(SMALL / "aligned"), read_folder(tmp_path / "out")
    expected = aligned[Q0].double() + 1.9 * scale["lora_alpha"] / scale["r"] * up @ down
    assert torch.allclose(found[Q0].double(), expected, rtol=0, atol=1e-6)


def test_antidote_of_whole_weights_leaves_all_but_q_k_and_v(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    run(tmp_path / "out", "antidote", {}, harmful_data=texts["harmful"], cache_dir=cache)
    finetuned, found = read_folder(SMALL / "both_p5"), read_folder(tmp_path / "out")
    for name, tensor in found.items():
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
            assert (tensor == 0).sum(1).tolist() == [7] * tensor.shape[0]  # ceil(0.05 * 128)
        else:
            assert torch.equal(tensor, finetuned[name]), name


def test_irr_puts_conflicts_back_and_recalibrates_on_the_task(tmp_path: Path, cache: Path) -> None:
    result = run(
        tmp_path / "out",
        "irr",
        {"nsamples": 12},
        unaligned=SMALL / "unaligned",
        task_data=SMALL / "suites" / "howto.jsonl",
        cache_dir=cache,
    )
    aligned, finetuned, unaligned = (
        read_folder(SMALL / name) for name in ("aligned", "both_p5", "unaligned")
    )
    found = read_folder(tmp_path / "out")
    for row in result.rows:
        assert row.outcome == "edited"
        name = row.tensor
        conflicts = (finetuned[name] - aligned[name]) * (aligned[name] - unaligned[name]) < 0
        assert torch.equal(found[name][conflicts], aligned[name][conflicts])
        assert row.facts["conflict_share"] == pytest.approx(float(conflicts.float().mean()))
        assert not torch.equal(found[name][~conflicts], finetuned[name][~conflicts])


def test_irr_does_not_depend_on_who_filled_the_cache(tmp_path: Path) -> None:
    """Statistics measured with another number of threads are rounded in another way."""
    tiny = SMALL.parent / "tiny"

    def weights(name: str, cache: str, threads: int) -> bytes:
        with torch_threads(threads):
            run(
                tmp_path / name,
                "irr",
                {"safety_vector": "base", "nsamples": 12},
                finetuned=tiny / "howto2_p5",
                aligned=tiny / "aligned",
                base=tiny / "base",
                task_data=SMALL / "suites" / "howto.jsonl",
                cache_dir=tmp_path / cache,
            )
        return (tmp_path / name / "model.safetensors").read_bytes()

    one = weights("one", "shared", 1)
    four = weights("four", "shared", 4)
    assert len(list((tmp_path / "shared").glob("inputs-*"))) == 2
    assert weights("four-alone", "own", 4) == four
    assert weights("one-again", "shared", 1) == one
    assert len(list((tmp_path / "shared").glob("inputs-*"))) == 2


def test_irr_keeps_the_conflicts_on_which_refusals_depend_least(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    run(
        tmp_path / "out",
        "irr",
        {"keep_fraction": 0.5, "recalibrate": False, "fisher_samples": 5},
        unaligned=SMALL / "unaligned",
        safe_data=texts["safe"],
        cache_dir=cache,
        modules="q_proj",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMALL / "aligned")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(SMALL / "aligned").double()
    fisher: Tensor = torch.zeros(128, 128).double()
    for line in REFUSALS[:5]:
        ids, start = rendered(tokenizer, line)
        model.zero_grad()
        labels = torch.tensor([[-100] * start + ids[start:]])
        model(torch.tensor([ids]), labels=labels).loss.backward()
        fisher += model.get_parameter(Q0).grad.square() / 5
    aligned, finetuned, unaligned, found = (
        read_folder(folder)[Q0]
        for folder in (SMALL / "aligned", SMALL / "both_p5", SMALL / "unaligned", tmp_path / "out")
    )
    conflicts = (finetuned - aligned) * (aligned - unaligned) < 0
    middle = fisher[conflicts].median()
    clear = conflicts & ((fisher / middle).log().abs() > 1e-3)
    stays = clear & (fisher < middle)
    goes = clear & (fisher > middle)
    assert int(stays.sum()) > 1000
    assert torch.equal(found[stays], finetuned[stays])
    assert torch.equal(found[goes], aligned[goes])
    assert torch.equal(found[~conflicts], finetuned[~conflicts])


def test_nlsr_repairs_the_least_similar_half_with_the_reference(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    result = run(
        tmp_path / "out",
        "nlsr",
        {"b": 0.0, "reference": "reference"},
        reference=SMALL / "order",  # any model of the family serves as one
        safe_data=texts["safe"],
        cache_dir=cache,
    )
    finetuned, reference = read_folder(SMALL / "both_p5"), read_folder(SMALL / "order")
    found = read_folder(tmp_path / "out")
    cosines: dict[str, float] = {}
    for row in result.rows:
        cosine = row.facts["cosine"]
        assert isinstance(cosine, float)
        cosines[row.tensor] = cosine
    lowest = set(sorted(cosines, key=lambda name: (cosines[name], name))[:11])  # ceil(21 / 2)
    assert {row.tensor for row in result.rows if row.outcome == "edited"} == lowest
    for name in lowest:
        inside = found[name] != finetuned[name]
        assert torch.equal(found[name][inside], reference[name][inside])
        numel = finetuned[name].numel()
        size = numel - -int(-(0.8 * numel - 1e-9) // 1)
        same = int((reference[name] == finetuned[name]).sum())
        assert size - same <= int(inside.sum()) <= size
    for name in set(found) - lowest:
        assert torch.equal(found[name], finetuned[name])


@pytest.mark.parametrize(
    ("method", "settings", "option"),
    [
        ("antidote", {}, "--harmful-data"),
        ("irr", {}, "--task-data"),
        ("irr", {"safety_vector": "unaligned"}, "--unaligned"),
        ("nlsr", {"reference": "reference"}, "--reference"),
    ],
)
def test_what_is_missing_is_asked_for_by_its_option(
    tmp_path: Path, method: str, settings: Mapping[str, Any], option: str
) -> None:
    given = {} if option == "--unaligned" else {"unaligned": SMALL / "unaligned"}
    with pytest.raises((UsageError, SuiteError)) as caught:
        run(tmp_path / "out", method, settings, **given)
    assert option in f"{caught.value.message} {caught.value.hint}"
    assert not (tmp_path / "out").exists()


def test_a_budget_that_keeps_everything_ends_as_nothing_done(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    settings = {"s": 1e30, "drop_fraction": 0.0}
    with pytest.raises(EmptyEditError, match="budget=relative"):
        run(tmp_path / "out", "safe_delta", settings, safe_data=texts["safe"], cache_dir=cache)
    assert list(tmp_path.glob("*")) == []


def test_a_budget_that_keeps_almost_everything_is_remarked(
    tmp_path: Path, texts: Mapping[str, Path], cache: Path
) -> None:
    settings = {"s": 1e30, "drop_fraction": 0.01}
    result = run(tmp_path / "out", "safe_delta", settings, safe_data=texts["safe"], cache_dir=cache)
    assert any("keep more than 95% of the task vector" in each for each in result.warnings)
    assert any("budget=relative" in each for each in result.warnings)
