"""The files that a repair writes, against dense float64 references, over real architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.repair_support import (
    Trio,
    assert_output,
    dense_replace,
    folder_bytes,
    read_folder,
)

from realign.checkpoint.chunks import Chunk, read_chunk
from realign.checkpoint.manifest import read_manifest, sha256_file
from realign.checkpoint.reader import Checkpoint
from realign.checkpoint.verification import verify_output
from realign.repair import stream
from realign.repair.engine import RepairResult, repair
from realign.repair.request import RepairRequest

LAYOUTS = [
    ("llama", torch.float32, "50GB"),
    ("llama", torch.bfloat16, "20KB"),
    ("qwen2", torch.float16, "50GB"),
    ("gpt2", torch.float32, "30KB"),
    ("phi3", torch.bfloat16, "50GB"),
]
LINEAR = ("_proj.weight", "c_attn.weight", "c_fc.weight")


def _repair(trio: Trio, output: Path, **options: object) -> RepairResult:
    roles = {"aligned": trio.aligned, "base": trio.base}
    return repair(RepairRequest(finetuned=trio.finetuned, output=output, **{**roles, **options}))


def _blocks(name: str, arch: str) -> list[slice]:
    """Row blocks of the tiny models' fused matrices; everything for other tensors."""
    if "c_attn.weight" in name:
        return [slice(0, 32), slice(32, 64), slice(64, 96)]
    if arch == "phi3" and "qkv_proj" in name:
        return [slice(0, 32), slice(32, 48), slice(48, 64)]
    if arch == "phi3" and "gate_up_proj" in name:
        return [slice(0, 48), slice(48, 96)]
    return [slice(None)]


@pytest.mark.parametrize(("arch", "dtype", "shards"), LAYOUTS)
def test_matrix_method_equals_the_dense_reference(
    trio_of, tmp_path: Path, arch: str, dtype: torch.dtype, shards: str
) -> None:
    trio = trio_of(arch, dtype, shards)
    result = _repair(
        trio, tmp_path / "out", method="replace", settings={"rank": 2}, strength=0.7, device="cpu"
    )
    base, aligned, finetuned = map(read_folder, (trio.base, trio.aligned, trio.finetuned))
    out = read_folder(tmp_path / "out")
    assert list(out) == list(finetuned)
    edited = 0
    for name, tensor in finetuned.items():
        if not name.endswith(LINEAR):
            assert torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8)), name
            continue
        matrices = [each[name] for each in (base, aligned, finetuned, out)]
        if arch == "gpt2":
            matrices = [each.T for each in matrices]
        for rows in _blocks(name, arch):
            w0, wa, wf, got = (each[rows] for each in matrices)
            assert_output(got, wf, 0.7 * dense_replace(w0, wa, wf, rank=2))
            edited += 1
    assert edited == result.totals.edited == len(result.rows)


def test_every_expert_of_a_stack_is_a_matrix_of_its_own(trio_of, tmp_path: Path) -> None:
    trio = trio_of("gpt_oss")
    result = _repair(trio, tmp_path / "out", method="replace", settings={"rank": 2})
    base, aligned, finetuned = map(read_folder, (trio.base, trio.aligned, trio.finetuned))
    out = read_folder(tmp_path / "out")
    stacks = [name for name, tensor in out.items() if tensor.dim() == 3]
    assert len(stacks) == 2
    for name in stacks:
        for expert in range(out[name].shape[0]):
            w0, wa, wf, got = (each[name][expert].T for each in (base, aligned, finetuned, out))
            assert_output(got, wf, dense_replace(w0, wa, wf, rank=2))
    assert sum("experts" in row.tensor for row in result.rows) == 6
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all())


def test_experts_larger_than_a_chunk_pass_in_parts(
    trio_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trio = trio_of("gpt_oss")
    whole = _repair(trio, tmp_path / "whole", method="resta")
    monkeypatch.setattr(stream, "STREAM_BYTES", 512)
    sizes: list[int] = []

    def read(checkpoint: Checkpoint, name: str, chunk: Chunk) -> torch.Tensor:
        found = read_chunk(checkpoint, name, chunk)
        if chunk.within is not None:
            sizes.append(found.nbytes)
        return found

    monkeypatch.setattr(stream, "read_chunk", read)
    parts = _repair(trio, tmp_path / "parts", method="resta")
    assert sizes and max(sizes) <= 512
    assert (
        folder_bytes(parts.output)["model.safetensors"]
        == (folder_bytes(whole.output)["model.safetensors"])
    )
    assert [(row.key, row.numel) for row in parts.rows] == [
        (row.key, row.numel) for row in whole.rows
    ]


@pytest.mark.parametrize(("arch", "dtype", "shards"), LAYOUTS)
def test_elementwise_method_equals_the_reference(
    trio_of, tmp_path: Path, arch: str, dtype: torch.dtype, shards: str
) -> None:
    trio = trio_of(arch, dtype, shards)
    settings = ["gamma=0.4", "safety_vector=base"]
    result = _repair(trio, tmp_path / "out", method="resta", settings=settings)
    base, aligned, finetuned = map(read_folder, (trio.base, trio.aligned, trio.finetuned))
    out = read_folder(tmp_path / "out")
    for name, tensor in finetuned.items():
        edit = 0.4 * (aligned[name].double() - base[name].double())
        assert_output(out[name], tensor, edit)
    assert {row.key for row in result.rows} == set(finetuned)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "phi3", "qwen2"])
def test_the_output_is_a_checkpoint_like_the_fine_tune(trio_of, tmp_path: Path, arch: str) -> None:
    trio = trio_of(arch, torch.bfloat16, "20KB")
    _repair(trio, tmp_path / "out", method="delta_svd", settings={"rank": 2})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [p.name for p in trio.finetuned.iterdir()] + ["realign.json"]
    )
    same = {"config.json", "generation_config.json"}
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (trio.finetuned / name).read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert bool(torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all())
    assert verify_output(tmp_path / "out").problems == ()


def test_two_runs_write_the_same_bytes(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16, "20KB")
    for name in ("one", "two"):
        _repair(trio, tmp_path / name, method="replace")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_fused_and_split_projections_get_the_same_edit(trio_of, tmp_path: Path) -> None:
    """The Phi-3 family rewritten with one tensor per projection: the same numbers come out."""
    fused = trio_of("phi3")
    _repair(fused, tmp_path / "fused", method="replace", settings={"rank": 2})
    split: dict[str, Path] = {}
    for role in ("base", "aligned", "finetuned"):
        source: Path = getattr(fused, role)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in read_folder(source).items():
            blocks = _blocks(name, "phi3")
            for index, rows in enumerate(blocks):
                part = name if len(blocks) == 1 else name.replace("_proj.", f"_{index}_proj.")
                tensors[part] = tensor[rows].contiguous()
        split[role] = tmp_path / f"split_{role}"
        split[role].mkdir()
        save_file(tensors, split[role] / "model.safetensors")
        (split[role] / "config.json").write_bytes((source / "config.json").read_bytes())
    repair(
        RepairRequest(output=tmp_path / "split", method="replace", settings={"rank": 2}, **split)
    )
    parts = read_folder(tmp_path / "split")
    for name, tensor in read_folder(tmp_path / "fused").items():
        blocks = _blocks(name, "phi3")
        for index, rows in enumerate(blocks):
            part = name if len(blocks) == 1 else name.replace("_proj.", f"_{index}_proj.")
            assert torch.equal(tensor[rows], parts[part]), part


def test_wise_ft_at_one_gives_the_aligned_weights(trio_of, tmp_path: Path) -> None:
    trio = trio_of("qwen2", torch.bfloat16)
    _repair(trio, tmp_path / "out", method="wise_ft", settings={"a": 1.0})
    aligned = read_folder(trio.aligned)
    for name, tensor in read_folder(tmp_path / "out").items():
        assert torch.equal(tensor, aligned[name]), name


def test_strength_is_a_straight_line(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    finetuned = read_folder(trio.finetuned)
    moved = {}
    for t in (0.25, 0.5):
        _repair(trio, tmp_path / f"t{t}", method="replace", strength=t)
        moved[t] = read_folder(tmp_path / f"t{t}")
    for name, tensor in finetuned.items():
        half, quarter = moved[0.5][name] - tensor, moved[0.25][name] - tensor
        assert torch.allclose(half, 2 * quarter, atol=2e-7), name


def test_manifest_records_what_was_done(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16, "20KB")
    result = _repair(
        trio,
        tmp_path / "out",
        method="delta_svd",
        settings={"rank": "entropy", "eta": 0.8},
        command=["realign", "repair", "--token", "letmein"],
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest == result.manifest
    assert manifest is not None
    assert manifest["method"]["name"] == "delta_svd"
    assert manifest["method"]["settings"]["eta"] == 0.8
    assert manifest["safety_vector"] == "base"
    assert manifest["command"] == ["realign", "repair", "--token", "***"]
    for role in ("finetuned", "aligned", "base"):
        folder: Path = getattr(trio, role)
        files = manifest["inputs"][role]["files"]
        for file in folder.glob("*.safetensors"):
            assert files[file.name] == sha256_file(file)
    (row,) = [r for r in manifest["tensors"] if r["key"] == "model.layers.1.mlp.up_proj.weight"]
    base, aligned, out, fine = (
        read_folder(folder)[row["key"]].double()
        for folder in (trio.base, trio.aligned, tmp_path / "out", trio.finetuned)
    )
    s2 = torch.linalg.svdvals(aligned - base).square()
    p = s2 / s2.sum()
    assert row["facts"]["entropy"] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-6)
    rank = row["facts"]["rank"]
    assert row["facts"]["kept_energy"] == pytest.approx(float(p[:rank].sum()), rel=1e-6)
    u, s, vt = torch.linalg.svd(aligned - base, full_matrices=False)
    e = (u[:, :rank] * s[:rank]) @ vt[:rank]
    r = out - fine
    assert row["edit_norm"] == pytest.approx(float(e.norm()), rel=1e-4)
    assert row["relative_norm"] == pytest.approx(float(e.norm() / fine.norm()), rel=1e-4)
    assert row["survival"] == pytest.approx(float((r * e).sum() / e.square().sum()), rel=1e-4)
    task = fine - aligned
    cosine = float((e * task).sum() / e.norm() / task.norm())
    assert row["cos_task"] == pytest.approx(cosine, rel=1e-3)
    assert row["changed"] == int((r != 0).sum())
