"""Families whose alignment moved few weights by one unit in the last place of bfloat16.

Such safety vectors have hundreds of equal singular values. Whatever decomposes them must come to
an end, and what it gives is checked against the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from support.checkpoint_support import LLAMA, write_model
from support.repair_support import Trio, assert_output, dense_replace, read_folder
from torch import Tensor

from realign.audit.subspace_file import read_subspace
from realign.audit.weights import measure_weights
from realign.checkpoint.reader import open_checkpoint
from realign.repair.engine import repair
from realign.repair.request import RepairRequest
from realign.repair.subspace_file import SubspaceRequest, write_subspace

WIDTH = 256
MATRICES = (
    *(f"self_attn.{each}_proj" for each in "qkvo"),
    *(f"mlp.{each}_proj" for each in ("gate", "up", "down")),
)
CONFIG = {**LLAMA, "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_key_value_heads": 2}
UNIT = 2.0**-10
SHARE = 0.003
RANK = 54
"""About half of the directions: here the fast routine gives up most often."""


def moved(
    tensors: Mapping[str, Tensor], share: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """A share of the entries of every matrix, one unit up or down."""

    def step(value: Tensor) -> Tensor:
        chosen = torch.rand(value.shape, generator=generator) < share
        signs = torch.sign(torch.randn(value.shape, generator=generator))
        return (value.float() + chosen * signs * UNIT).bfloat16()

    return {name: step(each) if each.dim() == 2 else each for name, each in tensors.items()}


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    generator = torch.Generator().manual_seed(18)  # the fast routine gives up in each test

    def weight(rows: int) -> Tensor:
        units = torch.randint(65, 127, (rows, WIDTH), generator=generator)
        return (
            units * torch.sign(torch.randn(rows, WIDTH, generator=generator)) * 2 * UNIT
        ).bfloat16()

    block = "model.layers.0."
    norms = [f"{block}{each}_layernorm" for each in ("input", "post_attention")]
    base = {f"{block}{each}.weight": weight(WIDTH) for each in MATRICES}
    base |= {f"{each}.weight": torch.ones(WIDTH).bfloat16() for each in (*norms, "model.norm")}
    base |= {name: weight(10) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    aligned = moved(base, SHARE, generator)
    unaligned, finetuned = moved(aligned, SHARE, generator), moved(aligned, 0.01, generator)
    folder = tmp_path_factory.mktemp("units")
    states = {"base": base, "aligned": aligned, "unaligned": unaligned, "finetuned": finetuned}
    return Trio(**{n: write_model(folder / n, each, config=CONFIG) for n, each in states.items()})


def request(trio: Trio, output: Path, method: str, **options: object) -> RepairRequest:
    roles = {"finetuned": trio.finetuned, "aligned": trio.aligned, "base": trio.base}
    return RepairRequest(**roles, output=output, method=method, **options)  # pyright: ignore[reportArgumentType]


def deltas(trio: Trio) -> dict[str, Tensor]:
    base, aligned = read_folder(trio.base), read_folder(trio.aligned)
    names = [f"model.layers.0.{each}.weight" for each in MATRICES]
    return {name: aligned[name].double() - base[name].double() for name in names}


@pytest.mark.parametrize("rank", [WIDTH, RANK])
def test_replace(trio: Trio, tmp_path: Path, rank: int) -> None:
    found = repair(request(trio, tmp_path / "out", "replace", settings={"rank": rank}))
    assert [row.outcome for row in found.rows] == ["edited"] * len(MATRICES)
    base, aligned = read_folder(trio.base), read_folder(trio.aligned)
    finetuned, after = read_folder(trio.finetuned), read_folder(tmp_path / "out")
    for name, delta in deltas(trio).items():
        if rank == WIDTH:  # no choice among equal directions: all of them
            whole = int(torch.linalg.matrix_rank(delta))
            edit = dense_replace(base[name], aligned[name], finetuned[name], rank=whole)
            assert_output(after[name], finetuned[name], edit)
        distances = [
            float((each[name] - aligned[name]).double().norm()) for each in (after, finetuned)
        ]
        assert 0.0 < distances[0] < distances[1]


def test_delta_svd_as_a_patch(trio: Trio, tmp_path: Path) -> None:
    options = {"settings": {"rank": WIDTH}, "patch": True, "max_patch_rank": RANK}
    found = repair(request(trio, tmp_path / "out", "delta_svd", **options))
    expected = deltas(trio)
    assert {row.key for row in found.rows} == set(expected)
    for row in found.rows:
        energies = torch.linalg.svdvals(expected[row.key]).square()
        share = float(energies[RANK:].sum() / energies.sum())
        assert row.patch_error == pytest.approx(share**0.5, rel=1e-4)


def test_the_subspace_file(trio: Trio, tmp_path: Path) -> None:
    path = tmp_path / "safety.safetensors"
    write_subspace(SubspaceRequest(aligned=trio.aligned, base=trio.base, output=path, rank=RANK))
    found = read_subspace(path)
    for key, delta in deltas(trio).items():
        triplets, s = found.triplets(key), torch.linalg.svdvals(delta)
        assert torch.allclose(triplets.s.double(), s[:RANK], rtol=1e-5)
        for side in (triplets.u.double(), triplets.v.double()):
            assert torch.allclose(side.T @ side, torch.eye(RANK).double(), atol=1e-5)
        rest = delta - (triplets.u * triplets.s).double() @ triplets.v.double().T
        assert float(rest.norm()) == pytest.approx(float(s[RANK:].norm()), rel=1e-4)


def test_the_drift_of_weights(trio: Trio) -> None:
    with (
        open_checkpoint(trio.aligned) as aligned,
        open_checkpoint(trio.finetuned) as finetuned,
        open_checkpoint(trio.base) as base,
    ):
        found = measure_weights(reference=aligned, subjects={"subject": finetuned}, base=base)
    rows = [row for row in found.groups[0].per_matrix if ".layers." in row.key]
    assert len(rows) == len(MATRICES)
    assert all(row.lox_published is not None and row.entropy is not None for row in rows)
