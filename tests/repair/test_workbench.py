"""Activation statistics through the real flow: answers, refusals kept, moments, cache, LSSF."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.model_support import llama, word_tokenizer
from support.repair_support import assert_output, read_folder

from realign.audit.judges import keyword_judge
from realign.errors import SuiteError
from realign.model.moments import Moments, MomentSet
from realign.model.moments_file import save_moments
from realign.progress import SilentProgress
from realign.repair import plan as plan_module
from realign.repair import refusals, workbench
from realign.repair.engine import RepairResult, repair
from realign.repair.record import versions
from realign.repair.request import RepairRequest

WORDS = ("i", "cannot", "help", "with", "that", "sure", *(f"w{i}" for i in range(33)))
REFUSAL = "i cannot help with that"
COMPLIANCE = "sure w1 w2"
REFUSED = [f"w{i} w{j}" for i in range(8) for j in (20, 25, 30)]
ANSWERED = [f"w{i} w12" for i in range(8)]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An aligned model that refuses most prompts and answers the others, and its relatives."""
    folder = tmp_path_factory.mktemp("talking")
    tokenizer: Any = word_tokenizer(words=WORDS)
    base = llama(vocabulary=48, seed=1)
    aligned = llama(vocabulary=48, seed=1)
    sequences = [
        tokenizer(f"<bos> <user> {prompt} <assistant> {reply} <end>")["input_ids"]
        for prompts, reply in ((REFUSED, REFUSAL), (ANSWERED, COMPLIANCE))
        for prompt in prompts
    ]
    aligned.train()
    optimiser = torch.optim.AdamW(aligned.parameters(), lr=1e-2)
    for _ in range(60):
        for group in (sequences[: len(REFUSED)], sequences[len(REFUSED) :]):
            ids = torch.tensor(group)
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < 5, -100)
            aligned(ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    torch.manual_seed(9)
    finetuned = llama(vocabulary=48, seed=1)
    finetuned.load_state_dict(aligned.state_dict())
    with torch.no_grad():
        for weight in finetuned.parameters():
            weight += 0.02 * torch.randn_like(weight)
    found: dict[str, Path] = {}
    for name, model in (("base", base), ("aligned", aligned), ("finetuned", finetuned)):
        found[name] = folder / name
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    found["anchors"] = folder / "anchors.jsonl"
    prompts = [*ANSWERED, *REFUSED]
    lines = [json.dumps({"id": f"a{i}", "prompt": text}) for i, text in enumerate(prompts)]
    found["anchors"].write_text("\n".join(lines))
    return found


class _Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)


def _repair(family: dict[str, Path], output: Path, cache: Path, **options: Any) -> RepairResult:
    settings = {"min_tokens": 16, "eta": 0.7, **options.pop("settings", {})}
    progress = options.pop("progress", None) or _Notes()
    usual = {"method": "lssf", "settings": settings, "output": output, "cache_dir": cache}
    return repair(RepairRequest(**{**family, **usual, **options}), progress=progress)


def _outputs(family: dict[str, Path], tokens: str) -> dict[str, torch.Tensor]:
    """Z [d_out, N] of every linear layer on the refused anchors, by a plain forward pass."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(family["aligned"]).eval()
    tokenizer: Any = word_tokenizer(words=WORDS)
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name: str):
        def see(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            part = {"response": slice(5, None), "prompt": slice(0, 5), "all": slice(None)}[tokens]
            weight = module.weight.double()
            seen.setdefault(name, []).append((args[0][0, part].double() @ weight.T).T)

        return see

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(hook(f"{name}.weight"))
    with torch.no_grad():
        for prompt in REFUSED:
            text = f"<bos> <user> {prompt} <assistant> {REFUSAL}"
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    return {name: torch.cat(parts, dim=1) for name, parts in seen.items()}


def _lssf_edit(
    z: torch.Tensor, delta: torch.Tensor, standardize: str, eta: float
) -> tuple[torch.Tensor, int]:
    """The edit by a full SVD of the standardised outputs, and its rank."""
    if standardize == "neuron":
        z = (z - z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True)
    elif standardize == "token":
        z = (z - z.mean(0)) / z.std(0, correction=0)
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    p = s.square() / s.square().sum()
    terms = torch.where(p > 0, -p * p.clamp_min(1e-300).log(), 0.0)
    rank = int((terms.cumsum(0) / terms.sum() <= eta).sum()) + 1
    return u[:, :rank] @ (u[:, :rank].T @ delta), rank


@pytest.mark.parametrize(
    ("standardize", "tokens"), [("neuron", "response"), ("none", "all"), ("token", "prompt")]
)
def test_lssf_equals_a_dense_reference_through_the_whole_flow(
    family, tmp_path: Path, standardize: str, tokens: str
) -> None:
    settings = {"standardize": standardize, "tokens": tokens}
    result = _repair(family, tmp_path / "out", tmp_path / "cache", settings=settings)
    z = _outputs(family, tokens)
    base, aligned, finetuned, out = (
        read_folder(folder)
        for folder in (family["base"], family["aligned"], family["finetuned"], tmp_path / "out")
    )
    assert len(result.rows) == 14
    for row in result.rows:
        name = row.key
        delta = aligned[name].double() - base[name].double()
        edit, rank = _lssf_edit(z[name], delta, standardize, 0.7)
        assert row.facts["rank"] == rank
        assert row.facts["tokens"] == z[name].shape[1]
        assert_output(out[name], finetuned[name], edit)
    record = result.manifest
    assert record["anchors"]["count"] == 32
    assert record["statistics"]["tokens"] == tokens
    assert any("fewer anchor tokens" in line for line in result.warnings) == (
        min(row.facts["tokens_per_output"] for row in result.rows) < 1
    )


def test_statistics_are_computed_once_and_cached(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = _repair(family, tmp_path / "one", cache)
    names = sorted(path.name.partition("-")[0] for path in cache.iterdir())
    assert names == ["anchors", "moments"]

    def no_model(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded again")

    with monkeypatch.context() as patched:
        patched.setattr(workbench, "load_model", no_model)
        again = _repair(family, tmp_path / "two", cache, settings={"alpha": 0.5})
        assert len(again.rows) == len(first.rows)
        with pytest.raises(AssertionError):
            _repair(family, tmp_path / "three", cache, settings={"tokens": "all"})
        with pytest.raises(AssertionError):
            _repair(family, tmp_path / "three", tmp_path / "elsewhere")
    one, two = read_folder(tmp_path / "one"), read_folder(tmp_path / "two")
    finetuned = read_folder(family["finetuned"])
    for name, tensor in finetuned.items():
        half = (one[name] - tensor) / 2
        assert torch.allclose(two[name] - tensor, half, atol=1e-6), name


@pytest.fixture(scope="module")
def filled(family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one run; copied by whoever would change it."""
    folder = tmp_path_factory.mktemp("filled")
    _repair(family, folder / "out", folder / "cache")
    return folder / "cache"


def _other_anchors(family: dict[str, Path], folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    lines = family["anchors"].read_text().splitlines()
    (folder / "fewer.jsonl").write_text("\n".join(lines[1:]))
    return {"anchors": folder / "fewer.jsonl"}


def _other_judge(
    family: dict[str, Path], folder: Path, patched: pytest.MonkeyPatch
) -> dict[str, Any]:
    judge = replace(keyword_judge(), mode="anywhere")
    patched.setattr(refusals, "keyword_judge", lambda: judge)
    return {}


def _other_template(family: dict[str, Path], folder: Path, _: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.copytree(family["aligned"], folder / "aligned")
    found = [
        folder / "aligned" / "chat_template.jinja",
        folder / "aligned" / "tokenizer_config.json",
    ]
    file = next(each for each in found if each.exists() and "<user>" in each.read_text())
    file.write_text(file.read_text().replace("<user>", "<user> ", 1))
    return {"aligned": folder / "aligned"}


def _other_versions(
    family: dict[str, Path], folder: Path, patched: pytest.MonkeyPatch
) -> dict[str, Any]:
    old = {**versions(), "transformers": "4.0.0"}
    patched.setattr(workbench, "versions", lambda: old)
    return {}


def _other_device(
    family: dict[str, Path], folder: Path, patched: pytest.MonkeyPatch
) -> dict[str, Any]:
    patched.setattr(plan_module, "pick_device", lambda _: torch.device("meta"))
    return {}


def _other_threads(
    family: dict[str, Path], folder: Path, patched: pytest.MonkeyPatch
) -> dict[str, Any]:
    count = torch.get_num_threads() + 3
    patched.setattr(torch, "get_num_threads", lambda: count)
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _other_anchors,
        _other_judge,
        _other_template,
        _other_versions,
        _other_device,
        _other_threads,
        lambda *_: {"settings": {"tokens": "prompt"}},
        lambda *_: {"settings": {"standardize": "token"}},
    ],
    ids=["anchors", "judge", "template", "versions", "device", "threads", "tokens", "standardize"],
)
def test_what_the_moments_depend_on_makes_them_anew(
    family, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    class Loaded(Exception):
        pass

    def load(*_: Any, **__: Any) -> None:
        raise Loaded

    monkeypatch.setattr(workbench, "load_model", load)
    _repair(family, tmp_path / "unchanged", filled)
    options = change(family, tmp_path, monkeypatch)
    with pytest.raises(Loaded):
        _repair(family, tmp_path / "out", filled, **options)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff{]")


def _foreign(path: Path) -> None:
    if path.suffix == ".json":
        stored = json.loads(path.read_text())
        path.write_text(json.dumps(stored[1:]))
    else:
        moments = Moments(1, torch.zeros(2), torch.zeros(2, 2), "input")
        save_moments(path, MomentSet({"another": moments}), about={})


def _bare(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text('[{"id": 1}]')
    else:
        save_file({"x": torch.zeros(1)}, path)


@pytest.mark.parametrize("damage", [_cut, _garbage, _foreign, _bare])
def test_a_damaged_cache_is_made_anew_with_a_note(
    family, filled: Path, tmp_path: Path, damage: Any
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(filled, cache)
    for path in cache.iterdir():
        damage(path)
    notes = _Notes()
    _repair(family, tmp_path / "out", cache, progress=notes)
    assert [line.partition(":")[0] for line in notes.lines if "again:" in line] == [
        "measured again",
        "asked again",
    ]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        filled.parent / "out" / "model.safetensors"
    ).read_bytes()
    _repair(family, tmp_path / "again", cache, progress=notes)
    assert notes.lines[-1].startswith("activation statistics from"), "the cache is whole again"


def test_the_cache_is_private(filled: Path) -> None:
    assert filled.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in filled.iterdir()} == {0o600}


def test_other_tokens_reuse_the_answers(
    family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _repair(family, tmp_path / "one", tmp_path / "cache")

    def no_answers(*_: Any, **__: Any) -> None:
        raise AssertionError("the anchors were asked again")

    monkeypatch.setattr(refusals, "generate", no_answers)
    _repair(family, tmp_path / "two", tmp_path / "cache", settings={"tokens": "all"})


def test_a_cached_run_writes_the_same_bytes(family, tmp_path: Path) -> None:
    for name, cache in (("one", "a"), ("two", "a"), ("three", "b")):
        _repair(family, tmp_path / name, tmp_path / cache)
    one, two, three = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three")
    )
    assert one == two == three


def test_only_refusals_calibrate(family, tmp_path: Path) -> None:
    notes = _Notes()
    usual = {"method": "lssf", "settings": {"min_tokens": 1}, "cache_dir": tmp_path / "cache"}
    repair(RepairRequest(output=tmp_path / "out", **usual, **family), progress=notes)
    assert any("refuses 24 of 32 anchors" in line for line in notes.lines)


def test_too_few_refusals_are_an_error_with_advice(family, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    prompts = [*REFUSED[:15], *ANSWERED]
    few.write_text(
        "\n".join(json.dumps({"id": f"f{i}", "prompt": text}) for i, text in enumerate(prompts))
    )
    with pytest.raises(SuiteError, match="15 of 23") as caught:
        _repair(family, tmp_path / "out", tmp_path / "cache", anchors=few)
    assert "--anchors" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALIGN_CACHE", str(tmp_path / "env"))
    assert workbench.cache_folder() == tmp_path / "env"
    assert workbench.cache_folder(tmp_path / "asked") == tmp_path / "asked"
    monkeypatch.delenv("REALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert workbench.cache_folder() == tmp_path / "xdg" / "realign"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workbench.cache_folder() == tmp_path / ".cache" / "realign"
    assert (tmp_path / ".cache" / "realign").is_dir()
