"""Integers beside a de-quantised repair: the same numbers, loadable, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.model_support import gpt2, llama
from support.quantise_support import TEXTS, save_pair
from support.repair_support import ulp
from torch import Tensor

from realign.checkpoint.int8 import int8_matrix, read_int8
from realign.checkpoint.reader import open_checkpoint
from realign.checkpoint.verification import verify_output
from realign.errors import CheckpointError, EmptyEditError, OutputError, SuiteError, UsageError
from realign.progress import SilentProgress
from realign.repair.engine import RepairResult, repair
from realign.repair.plan import plan
from realign.repair.request import RepairRequest

SHAPE: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}


def gemma() -> Any:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(**SHAPE, head_dim=6, initializer_range=0.3)
    return transformers.GemmaForCausalLM(config).eval()


def phi3() -> Any:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        **SHAPE, max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False
    )
    return transformers.Phi3ForCausalLM(config).eval()


MODELS = {"llama": llama, "gemma": gemma, "phi3": phi3}


def write_texts(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, prompts in TEXTS.items():
        files[name] = folder / f"{name}.jsonl"
        rows = [{"id": f"{name}{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return files


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 llama pair; the cache beside it keeps the training for the next test."""
    folder = tmp_path_factory.mktemp("shared")
    save_pair(folder, llama())
    write_texts(folder)
    return folder


def asked(folder: Path, out: Path, **options: Any) -> RepairRequest:
    settings = {"prompts": 16, "epochs_first": 1, "epochs_rest": 1, **options.pop("settings", {})}
    fixed: dict[str, Any] = {
        "method": "q_realign",
        "encode": "compressed-tensors",
        "anchors": folder / "anchors.jsonl",
        "keep_data": folder / "keep.jsonl",
        "settings": settings,
    }
    return RepairRequest(
        finetuned=folder / "finetuned",
        aligned=folder / "aligned",
        output=out,
        cache_dir=folder / "cache",
        device="cpu",
        **{**fixed, **options},
    )


def run(folder: Path, out: Path, **options: Any) -> RepairResult:
    return repair(asked(folder, out, **options))


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.filterwarnings("ignore::UserWarning:compressed_tensors.*")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma", torch.bfloat16),
        ("phi3", torch.float16),
    ],
)
def test_the_integers_are_the_export(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_pair(tmp_path, MODELS[name](), dtype=dtype)
    write_texts(tmp_path)
    run(tmp_path, tmp_path / "out")
    out, packed = tmp_path / "out", tmp_path / "out" / "compressed-tensors"
    plain, coded = stored(out), stored(packed)
    modules = [key.removesuffix("_scale") for key in coded if key.endswith(".weight_scale")]
    assert len(modules) == {"llama": 14, "gemma": 14, "phi3": 8}[name]
    before = stored(tmp_path / "finetuned")
    for weight in modules:
        matrix = read_int8(coded, weight.removesuffix(".weight"))
        assert matrix.weight.dtype == torch.int8 and matrix.scale.dtype == dtype
        decoded = matrix.decode()
        norm = norm_before(weight)
        if norm is not None:  # the norm carries 1 / v in this folder: put v back
            shift = 1.0 if name == "gemma" else 0.0
            v = (before[norm].float() + shift) / (coded[norm].float() + shift)
            assert not torch.allclose(v, torch.ones_like(v))
            decoded = decoded / v
        error = (decoded.double() - plain[weight].double()).abs()
        # float32 arithmetic on the way counts where the file is float32 itself
        assert (error <= ulp(plain[weight], dtype) * (1 if dtype != torch.float32 else 4)).all()
    model, integers = (
        transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (out, packed)
    )
    ids = torch.tensor([[2, 4, 7, 8, 9, 5]])
    with torch.no_grad():
        a, b = model(ids).logits.float(), integers(ids).logits.float()
        bound = 2e-4 if dtype == torch.float32 else 0.06
        assert (a - b).abs().max() <= bound * a.abs().max()
        made = integers.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape[1] > ids.shape[1]


def norm_before(weight: str) -> str | None:
    head, module = weight.removesuffix(".weight").rsplit(".", 1)
    block = head.rpartition(".")[0]
    if module in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        return f"{block}.input_layernorm.weight"
    if module in ("gate_proj", "up_proj", "gate_up_proj"):
        return f"{block}.post_attention_layernorm.weight"
    return None


def test_both_folders_are_verified_and_the_integers_are_refused_as_input(
    shared: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(shared, out)
    for folder in (out, out / "compressed-tensors"):
        report = verify_output(folder)
        assert report.intact and report.tensors > 0, report.problems
    with pytest.raises(CheckpointError, match="compressed-tensors"):
        open_checkpoint(out / "compressed-tensors")
    with open_checkpoint(out) as checkpoint:  # the folder inside does not disturb its reader
        assert not any("weight_scale" in name for name in checkpoint.tensors)
    file = out / "compressed-tensors" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    for folder, where in ((out, f"{file.parent.name}/{file.name}"), (file.parent, file.name)):
        (problem,) = verify_output(folder).problems
        assert problem.where == where and "differs" in problem.what
    file.unlink()
    assert any("missing" in each.what for each in verify_output(out).problems)


def test_the_plan_counts_the_bytes_of_both_folders(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alone = plan(asked(shared, out, encode=None)).estimate.written
    both = plan(asked(shared, out)).estimate.written
    run(shared, out)
    tensors = stored(out / "compressed-tensors").values()
    assert both - alone == sum(each.nbytes for each in tensors)


def test_an_interrupted_run_takes_up_both_folders(shared: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(SilentProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    def stop(_folder: Path) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        repair(asked(shared, out), before_commit=stop)
    assert not out.exists()
    repair(asked(shared, out), progress=Notes())
    assert any("resuming: 2 weight files" in note for note in notes), notes
    for folder in (out, out / "compressed-tensors"):
        assert verify_output(folder).intact


def test_without_the_option_nothing_else_is_written(shared: Path, tmp_path: Path) -> None:
    run(shared, tmp_path / "plain", encode=None)
    run(shared, tmp_path / "both")
    assert not (tmp_path / "plain" / "compressed-tensors").exists()
    a, b = stored(tmp_path / "plain"), stored(tmp_path / "both")
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_an_output_of_several_files_has_an_index(tmp_path: Path) -> None:
    paths = save_pair(tmp_path, llama())
    write_texts(tmp_path)
    for path in paths.values():
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        (path / "model.safetensors").unlink()
        model.save_pretrained(path, max_shard_size="20KB")
    run(tmp_path, tmp_path / "out", settings={"clip": False, "smooth": False})
    folder = tmp_path / "out" / "compressed-tensors"
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == set(stored(folder))
    assert len(set(index["weight_map"].values())) > 1
    assert verify_output(folder).intact and verify_output(tmp_path / "out").intact


def test_a_failure_at_the_end_leaves_nothing(shared: Path, tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        assert (folder / "compressed-tensors" / "model.safetensors").is_file()
        raise OutputError("the disk is full")

    with pytest.raises(OutputError, match="full"):
        repair(asked(shared, tmp_path / "out"), before_commit=full)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"settings": {"bits": 4}}, "8 bits"),
        ({"settings": {"quantise": False}}, "8 bits"),
        ({"strength": 0.5}, "strength 1"),
        ({"patch": True}, "--patch"),
        ({"encode": "gguf"}, "gguf"),
    ],
)
def test_what_has_no_integers_is_refused(
    options: dict[str, Any], what: str, shared: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=what):
        plan(asked(shared, tmp_path / "out", **options))  # before any work


def test_other_methods_have_no_integers(shared: Path, tmp_path: Path) -> None:
    request = RepairRequest(
        finetuned=shared / "finetuned",
        aligned=shared / "aligned",
        method="wise_ft",
        encode="compressed-tensors",
        output=tmp_path / "out",
    )
    with pytest.raises(UsageError, match="wise_ft"):
        plan(request)


def test_transposed_weights_have_no_integers(tmp_path: Path) -> None:
    save_pair(tmp_path, gpt2())
    write_texts(tmp_path)
    with pytest.raises(UsageError, match="no plain linear layer"):
        plan(asked(tmp_path, tmp_path / "out"))
    run(tmp_path, tmp_path / "out", encode=None)  # the de-quantised one is written all the same
    assert verify_output(tmp_path / "out").intact


def test_the_codes_of_a_row_by_hand() -> None:
    # codes 0 1 2 3 of the row (-1, 0, 1, 2) with step 1 and zero 1
    codes = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    found = int8_matrix(codes, zero=torch.ones(1, 1), step=torch.ones(1, 1), dtype=torch.bfloat16)
    assert found.weight.tolist() == [[-128, -127, -126, -125]]
    assert found.zero_point.tolist() == [[-127]] and found.scale.dtype == torch.bfloat16
    assert found.decode().tolist() == [[-1.0, 0.0, 1.0, 2.0]]
    assert read_int8(found.tensors("m"), "m").decode().tolist() == found.decode().tolist()


def test_the_control_through_the_engine_ends_as_an_empty_edit(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(EmptyEditError, match="this run is the control"):
        run(shared, tmp_path / "out", encode=None, settings={"quantise": False})
    assert not list(tmp_path.iterdir())


def test_calibration_on_what_is_measured_is_refused(shared: Path, tmp_path: Path) -> None:
    # The trap of the published code: calibrated and evaluated on the same prompts.
    for name in ("anchors", "keep"):
        rows = [{"id": f"m{i}", "prompt": p} for i, p in enumerate(TEXTS[name])]
        header = {"schema": "realign/suite/1", "name": "measured", "kind": "harmful"}
        suite = tmp_path / f"measured-{name}.jsonl"
        lines = [json.dumps(row) for row in (header, *rows[:3])]
        suite.write_text("\n".join(lines) + "\n", "utf-8")
        with pytest.raises(SuiteError, match=r"shares? 3 prompts"):
            plan(asked(shared, tmp_path / "out", suites=(suite,)))
