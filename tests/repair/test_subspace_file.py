from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.repair_support import read_folder

from realign.audit.subspace_file import read_subspace
from realign.checkpoint.manifest import content_digest
from realign.errors import CheckpointError, NothingToDoError, OutputError, UsageError
from realign.repair.subspace_file import SubspaceRequest, write_subspace


@pytest.mark.parametrize(("arch", "count"), [("llama", 14), ("gpt2", 12), ("phi3", 14)])
def test_the_file_holds_the_alignment_vectors_triples(
    trio_of, tmp_path: Path, arch: str, count: int
) -> None:
    trio = trio_of(arch)
    path = tmp_path / "safety.safetensors"
    request = SubspaceRequest(aligned=trio.aligned, base=trio.base, output=path, rank=2)
    write_subspace(request)
    found = read_subspace(path)
    assert found.rank_rule == "2"
    for family, folder in ((found.aligned, trio.aligned), (found.base, trio.base)):
        assert family.source == str(folder) and family.commit is None
        assert family.content_digest == content_digest(folder)
    base, aligned = read_folder(trio.base), read_folder(trio.aligned)
    assert len(found.rows) == count
    blocks = {"q_proj": (0, 32), "k_proj": (32, 48), "v_proj": (48, 64)}
    if arch == "gpt2":
        blocks = {"q_proj": (0, 32), "k_proj": (32, 64), "v_proj": (64, 96)}
    blocks |= {"gate_proj": (0, 48), "up_proj": (48, 96)}
    for key, row in found.rows.items():
        delta = (aligned[row.tensor].double() - base[row.tensor].double()).float().double()
        weight = aligned[row.tensor].double()
        if arch == "gpt2":
            delta, weight = delta.T, weight.T
        if key.endswith("]"):
            delta, weight = (each[slice(*blocks[row.module])] for each in (delta, weight))
        assert row.shape == tuple(delta.shape)
        u, s, vt = torch.linalg.svd(delta, full_matrices=False)
        triplets = found.triplets(key)
        assert triplets.u.dtype == torch.float32
        assert torch.allclose(triplets.s.double(), s[:2], rtol=1e-5)
        got = (triplets.u * triplets.s) @ triplets.v.T
        assert torch.allclose(got.double(), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
        assert bool((triplets.u.gather(0, triplets.u.abs().argmax(0, keepdim=True)) > 0).all())
        p = s.square() / s.square().sum()
        entropy = -(p * p.log()).sum()
        assert row.facts["entropy"] == pytest.approx(float(entropy), rel=1e-6)
        assert row.facts["kept_energy"] == pytest.approx(float(p[:2].sum()), rel=1e-6)
        cumulated = (-(p * p.log())).cumsum(0) / entropy
        assert row.entropy_rank == int((cumulated <= 0.85).sum()) + 1
        assert row.relative_norm == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-6)


def test_same_inputs_same_bytes(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama", torch.bfloat16)
    for name in ("one", "two"):
        request = SubspaceRequest(
            aligned=trio.aligned, base=trio.base, output=tmp_path / name, rank="entropy", eta=0.6
        )
        write_subspace(request)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = read_subspace(tmp_path / "one")
    assert found.rank_rule == "entropy 0.6"
    assert all(row.facts["rank"] == row.entropy_rank for row in found.rows.values())


def test_matrices_that_alignment_left_alone_have_no_triples(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = read_folder(trio.base) | {name: read_folder(trio.aligned)[name]}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_bytes((trio.base / "config.json").read_bytes())
    path = tmp_path / "s"
    found = write_subspace(
        SubspaceRequest(aligned=trio.aligned, base=tmp_path / "base", output=path)
    )
    assert found.rows[name].norm == 0.0 and found.rows[name].facts["rank"] == 0
    assert found.triplets(name).u.shape == (48, 0)


def test_refusals(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    usual = {"aligned": trio.aligned, "base": trio.base, "output": tmp_path / "s"}
    for bad in ({"rank": 0}, {"rank": "half"}, {"eta": 1.5}):
        with pytest.raises(UsageError):
            write_subspace(SubspaceRequest(**{**usual, **bad}))
    with pytest.raises(NothingToDoError):
        write_subspace(SubspaceRequest(**{**usual, "base": trio.aligned}))
    with pytest.raises(OutputError):
        write_subspace(SubspaceRequest(**{**usual, "output": trio.base}))
    with pytest.raises(OutputError):
        write_subspace(SubspaceRequest(**{**usual, "output": tmp_path / "no" / "s"}))
    assert list(tmp_path.iterdir()) == []
    for path in (tmp_path / "none", trio.base / "model.safetensors", trio.base / "config.json"):
        with pytest.raises(CheckpointError):
            read_subspace(path)
