"""The same edits on an accelerator; runs where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.subspace_support import edit_of, given, input_moments, layer_of, matrix, output_moments

from realign.repair.edit import Layer
from realign.repair.method import Method
from realign.repair.methods.antidote import Antidote
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.irr import Irr
from realign.repair.methods.lox import Lox
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.nlsr import Nlsr
from realign.repair.methods.null_control import DeltaSvdNull, ReplaceNull
from realign.repair.methods.replace import Replace
from realign.repair.methods.resta import Resta
from realign.repair.methods.safe_delta import SafeDelta
from realign.repair.methods.safe_lora import SafeLora
from realign.repair.methods.safemerge import Safemerge
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.preparation import Statistics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROLES = ("finetuned", "aligned", "base", "unaligned", "reference")
SHAPES = [(64, 64), (48, 96), (96, 48)]
CLOSE = 4e-6


def moved(layer: Layer) -> Layer:
    given = {role: getattr(layer, role) for role in ROLES}
    return dataclasses.replace(
        layer, **{role: each.cuda() for role, each in given.items() if each is not None}
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [
        Lssf(safety_vector="unaligned", min_tokens=1),
        Lssf(safety_vector="unaligned", min_tokens=1, standardize="none", alpha1=2.0),
        DeltaSvd(safety_vector="base"),
        Resta(safety_vector="base"),
        WiseFt(),
        Replace(rank=4),
        Replace(rank="energy", side="left"),
        ReplaceNull(rank=4),
        DeltaSvdNull(safety_vector="base"),
        Lox(),
        Lox(svd="randomised", k=3),
        Resta(safety_vector="base", dare="task"),
        SafeLora(tau=2.0),
        SafeLora(tau=2.0, projector="unit"),
        Safemerge(tau=2.0, safety_model="aligned"),
    ],
    ids=lambda m: m.name,
)
def test_accelerator_equals_cpu(method: Method, shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer, x = layer_of(shape, dtype=dtype), matrix(shape[1], 400, seed=7)
    assert layer.aligned is not None
    sources: list[Statistics] = [given(input_moments(x))]
    sources.append(given(output_moments(layer.aligned.double() @ x)))
    for statistics in sources:
        on_cpu = edit_of(method, layer, statistics)
        on_gpu = edit_of(method, moved(layer), statistics)
        assert on_gpu.is_cuda
        assert float((on_gpu.cpu() - on_cpu).abs().max()) <= 1e-6 * float(on_cpu.abs().max()) * 4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method",
    [
        SafeDelta(s=0.4, budget="relative"),
        SafeDelta(s=1e5, block=40, sub_block=4),
        Irr(safety_vector="unaligned"),
        Irr(safety_vector="unaligned", keep_fraction=0.5, recalibrate=False),
        Antidote(space="merged", alpha=0.1),
        Antidote(space="merged", alpha=0.1, prune_to="aligned"),
        Nlsr(reference="unaligned", space="merged"),
        Nlsr(reference="reference", space="merged", b=0.0),
    ],
    ids=lambda m: m.name,
)
def test_methods_that_read_input_moments(
    method: Method, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """They choose entries, and a sum of another order may choose another one at the edge."""
    layer, x = layer_of(shape, dtype=dtype), matrix(shape[1], 400, seed=7)
    assert layer.aligned is not None
    other = layer.aligned + matrix(*shape, seed=9, scale=0.1).to(dtype)
    layer = dataclasses.replace(layer, reference=other)
    fisher = {layer.key: matrix(*shape, seed=8).square().float()}
    statistics = dataclasses.replace(given(input_moments(x)), tables={"fisher": fisher})
    on_cpu = edit_of(method, layer, statistics)
    on_gpu = edit_of(method, moved(layer), statistics)
    assert on_gpu.is_cuda
    apart = (on_gpu.cpu() - on_cpu).abs() > CLOSE * float(on_cpu.abs().max())
    assert int(apart.sum()) <= 1
