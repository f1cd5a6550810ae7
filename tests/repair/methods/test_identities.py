"""Identities across methods: they catch most errors of sign, scale and transposition.

One table of equations, held on square, wide and tall matrices in float64; then what holds for every
method. Layouts (shards, fused projections, ties, adapters) are in test_layout_identities.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.alignment_support import adapter_layer, orthogonal, safe_adapter, selected
from support.subspace_support import (
    KEY,
    dense_svd_edit,
    edit_of,
    error,
    given,
    input_moments,
    layer_of,
    matrix,
    output_moments,
    repaired,
)
from torch import Tensor

from realign.repair.apply import apply_edit
from realign.repair.edit import Dense, Layer, LowRank, Unchanged
from realign.repair.method import Method
from realign.repair.methods.antidote import Antidote
from realign.repair.methods.cosine import CosineMethod
from realign.repair.methods.delta_svd import DeltaSvd
from realign.repair.methods.irr import Irr
from realign.repair.methods.lox import Lox
from realign.repair.methods.lssf import Lssf
from realign.repair.methods.nlsr import Nlsr
from realign.repair.methods.one_shot import OneShot
from realign.repair.methods.replace import Replace
from realign.repair.methods.resta import Resta
from realign.repair.methods.safe_delta import SafeDelta
from realign.repair.methods.safe_lora import SafeLora
from realign.repair.methods.safe_patching import SafePatching
from realign.repair.methods.safemerge import Safemerge
from realign.repair.methods.somf import Somf
from realign.repair.methods.wise_ft import WiseFt
from realign.repair.preparation import Statistics
from realign.repair.registry import METHODS

SHAPES = [(8, 8), (5, 12), (12, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES)
BASE: Any = {"safety_vector": "base"}


def anchors(shape: tuple[int, int], seed: int = 7) -> Statistics:
    return given(input_moments(matrix(shape[1], 60, seed=seed)))


def prepared(method: Method, layer: Layer) -> Statistics:
    """The statistics that `edit` gets: the same inputs for every method, and a selection."""
    rows, columns = layer.finetuned.shape
    found = anchors((rows, columns))
    if isinstance(method, CosineMethod):
        chosen = selected(method, [layer])
        return dataclasses.replace(found, scores=chosen.scores, selection=chosen.selection)
    if isinstance(method, Somf):  # logits of both signs, as training leaves them
        logits = matrix(rows, 1 if method.granularity == "row" else columns, seed=21)
        return Statistics(tables={"logits": {layer.key: logits}})
    if isinstance(method, SafePatching):
        delta = matrix(rows, columns, seed=24, scale=0.1).to(layer.task_vector())
        return Statistics(tables={"delta": {layer.key: delta}})
    if isinstance(method, OneShot):
        left, right = matrix(rows, 2, seed=22, scale=0.1), matrix(2, columns, seed=23, scale=0.1)
        return Statistics(tables={"left": {layer.key: left}, "right": {layer.key: right}})
    if isinstance(method, Nlsr):
        cosine = method.score(layer, found)
        if isinstance(cosine, float):
            scores = {layer.key: {"cosine": cosine, "draw": 0.0}}
            return dataclasses.replace(found, scores=scores, selection=method.select(scores))
    return found


def of(method: Method) -> Callable[[Layer], Tensor]:
    """W' of a method."""
    return lambda layer: repaired(method, layer, prepared(method, layer))


def post_hoc_lox(layer: Layer) -> Tensor:
    """As published (arXiv 2506.15606), dense: Wf + alpha trunc_k(Wa - W0)."""
    delta = layer.require("aligned") - layer.require("base")
    return layer.finetuned + 1.25 * dense_svd_edit(delta, 3)


def constant_mask(method: Somf, layer: Layer, *, sign: float = 1.0) -> Tensor:
    """W' of SOMF with one logit for all entries."""
    logits = torch.full_like(layer.finetuned, 0.3 * sign)
    return repaired(method, layer, Statistics(tables={"logits": {layer.key: logits}}))


def three(layer: Layer) -> Layer:
    """The layer with two further fine-tunes."""
    more = (matrix(*layer.finetuned.shape, seed=seed, scale=0.1) for seed in (51, 52))
    return dataclasses.replace(layer, also=tuple(wa(layer) + each for each in more))


def wa(layer: Layer) -> Tensor:
    return layer.require("aligned")


def wf(layer: Layer) -> Tensor:
    return layer.finetuned


def unmoved(method: Method) -> Callable[[Layer], Tensor]:
    """W' of a method on a fine-tune that has not moved."""
    return lambda layer: of(method)(dataclasses.replace(layer, finetuned=layer.require("aligned")))


def after(first: Method, second: Method) -> Callable[[Layer], Tensor]:
    """W' of one method after another."""
    return lambda layer: of(second)(dataclasses.replace(layer, finetuned=of(first)(layer)))


def at_full_rank(layer: Layer) -> Replace:
    return Replace(rank=min(layer.finetuned.shape))


SOMF = Somf(space="merged", granularity="element")

IDENTITIES: dict[str, tuple[Callable[[Layer], Tensor], Callable[[Layer], Tensor]]] = {
    "delta_svd rank k = lox post-hoc k": (
        of(DeltaSvd(rank=3, alpha=1.25, **BASE)),
        of(Lox(k=3, alpha=1.25)),
    ),
    "lox post-hoc k = its definition": (of(Lox(k=3, alpha=1.25)), post_hoc_lox),
    "lox post-hoc, full rank = resta base": (
        of(Lox(k=12, alpha=0.4)),
        of(Resta(gamma=0.4, **BASE)),
    ),
    "lox post-hoc, k = none = resta base": (
        of(Lox(k=None, alpha=0.4)),
        of(Resta(gamma=0.4, **BASE)),
    ),
    "lox harden = lox post-hoc with Wf = Wa": (
        lambda layer: of(Lox(mode="harden", k=3))(
            dataclasses.replace(layer, finetuned=wa(layer), aligned=None)
        ),
        unmoved(Lox(k=3, alpha=1.25)),
    ),
    "resta with DARE at rate 0 = resta": (
        of(Resta(gamma=0.4, dare="task", drop_rate=0.0, **BASE)),
        of(Resta(gamma=0.4, **BASE)),
    ),
    "somf of one model, constant mask = Wf": (
        lambda layer: constant_mask(SOMF, layer),
        wf,
    ),
    "somf of one model, constant soft mask, rescaled = Wf": (
        lambda layer: constant_mask(dataclasses.replace(SOMF, mode="soft"), layer, sign=-1.0),
        wf,
    ),
    "somf of several models, constant mask, TA = Wa + lambda sum of task vectors": (
        lambda layer: constant_mask(dataclasses.replace(SOMF, merge_lambda=0.3), three(layer)),
        lambda layer: (
            wa(layer)
            + 0.3 * sum(each - wa(layer) for each in (layer.finetuned, *three(layer).also))
        ),
    ),
    "safemerge Ws = Wa, tau > 1 = wise_ft a = 1 - w": (
        of(Safemerge(tau=1.01, w=0.7, safety_model="aligned")),
        of(WiseFt(a=0.3)),
    ),
    "safe_delta s = 0 = Wa": (of(SafeDelta(s=0.0)), wa),
    "safe_delta s large, drop 0 = Wf": (of(SafeDelta(s=1e12, drop_fraction=0.0)), wf),
    "irr without conflicts = Wf": (
        lambda layer: of(Irr(**BASE))(
            dataclasses.replace(
                layer, finetuned=wa(layer) + 0.5 * (wa(layer) - layer.require("base"))
            )
        ),
        lambda layer: wa(layer) + 0.5 * (wa(layer) - layer.require("base")),
    ),
    "antidote alpha = 0 = Wf": (of(Antidote(alpha=0.0, space="merged")), wf),
    "resta gamma = 0 = Wf": (of(Resta(gamma=0.0, **BASE)), wf),
    "wise_ft a = 0 = Wf": (of(WiseFt(a=0.0)), wf),
    "safe_lora tau = 0 = Wf": (of(SafeLora(tau=0.0)), wf),
    "safemerge w = 1 = Wf": (of(Safemerge(tau=2.0, w=1.0, safety_model="aligned")), wf),
    "replace k = 0 = Wf": (of(Replace(rank=0)), wf),
    "antidote to aligned, alpha = 1 = Wa": (
        of(Antidote(alpha=1.0, prune_to="aligned", space="merged")),
        wa,
    ),
    "wise_ft a = 1 = Wa": (of(WiseFt(a=1.0)), wa),
    "nlsr We = Wa, all entries, all modules = Wa": (
        of(Nlsr(reference="aligned", space="merged", q=0.0, fraction=1.0)),
        wa,
    ),
    "replace of full rank = Wa": (lambda layer: of(at_full_rank(layer))(layer), wa),
    "replace of full rank at t = wise_ft a = t": (
        lambda layer: layer.finetuned + 0.25 * edit_of(at_full_rank(layer), layer),
        of(WiseFt(a=0.25)),
    ),
    "replace left, then right = both": (
        after(Replace(side="left", rank=3), Replace(side="right", rank=3)),
        of(Replace(side="both", rank=3)),
    ),
    "replace right, then left = both": (
        after(Replace(side="right", rank=3), Replace(side="left", rank=3)),
        of(Replace(side="both", rank=3)),
    ),
    "replace twice = once": (after(Replace(rank=3), Replace(rank=3)), of(Replace(rank=3))),
    "nlsr twice = once": (
        after(
            Nlsr(reference="aligned", space="merged", fraction=1.0),
            Nlsr(reference="aligned", space="merged", fraction=1.0),
        ),
        of(Nlsr(reference="aligned", space="merged", fraction=1.0)),
    ),
    "wise_ft twice = once with 1 - (1 - a)^2": (
        after(WiseFt(a=0.3), WiseFt(a=0.3)),
        of(WiseFt(a=0.51)),
    ),
}


@shapes
@pytest.mark.parametrize("identity", IDENTITIES)
def test_two_ways_give_one_matrix(identity: str, shape: tuple[int, int]) -> None:
    left, right = IDENTITIES[identity]
    layer = layer_of(shape)
    found, expected = left(layer), right(layer)
    moved = float((layer.finetuned - wa(layer)).norm())
    assert float((found - expected).norm()) <= 1e-9 * moved


@pytest.mark.parametrize("shape", [(8, 8), (5, 12)])
@pytest.mark.parametrize("kind", ["base", "unaligned"])
@pytest.mark.parametrize("route", ["input", "output"])
def test_lssf_on_all_outputs_is_resta(shape: tuple[int, int], kind: str, route: str) -> None:
    """Where Z has full row rank, so not on tall matrices."""
    layer, x = layer_of(shape), matrix(shape[1], 60, seed=7)
    moments = input_moments(x) if route == "input" else output_moments(wa(layer) @ x)
    lssf = Lssf(standardize="none", eta=1.0, alpha=0.7, safety_vector=kind, min_tokens=1)
    resta = Resta(gamma=0.7, safety_vector=kind)
    assert error(edit_of(lssf, layer, given(moments)), edit_of(resta, layer)) <= 1e-10


@pytest.mark.parametrize("n", [6, 9])
def test_safe_lora_with_a_rotation_is_wise_ft(n: int) -> None:
    """With V = q times an orthogonal matrix, and all selected: 1 - a = q / sqrt(d_out)."""
    q, layer = 0.8, layer_of((n, n))
    turned = dataclasses.replace(layer, base=wa(layer) - q * orthogonal(n, seed=3))
    found = of(SafeLora(tau=2.0))(turned)
    assert error(found - wf(layer), of(WiseFt(a=1 - q / math.sqrt(n)))(layer) - wf(layer)) <= 1e-10


# ---- what holds for every method ----------------------------------------------------------------


def every_method(kind: str) -> dict[str, Method]:
    """Settings under which every method edits; "form" A adds delta_safe, B filters delta_task."""
    vector: Any = {"safety_vector": kind}
    return {
        "lssf": Lssf(min_tokens=1, **vector),
        "delta_svd": DeltaSvd(rank=3, **vector),
        "lox": Lox(k=3, **vector),
        "lox, randomised": Lox(k=3, svd="randomised", **vector),
        "resta": Resta(**vector),
        "resta, DARE on the safety vector": Resta(dare="safety", **vector),
        "resta, DARE on the task vector": Resta(dare="task", **vector),
        "safe_lora": SafeLora(tau=2.0, **vector),
        "safemerge": Safemerge(tau=2.0, safety_model="aligned", **vector),
        "somf": SOMF,
        "one_shot": OneShot(),
        "safe_patching": SafePatching(),
        "safe_delta": SafeDelta(s=0.3, budget="relative"),
        "irr": Irr(**vector),
        "nlsr": Nlsr(reference="aligned", space="merged", fraction=1.0),
        "antidote": Antidote(alpha=0.3, prune_to="aligned", space="merged"),
        "wise_ft": WiseFt(),
        "replace": Replace(rank=3, **vector),
    }


NAMES = list(every_method("base"))
FORM_A = {
    "lssf",
    "delta_svd",
    "lox",
    "lox, randomised",
    "resta",
    "resta, DARE on the safety vector",
}
ALONE = {"one_shot", "safe_patching"}  # read the fine-tune only
USES_VECTOR = FORM_A | {"safe_lora", "safemerge", "irr", "replace"}
FORM_B = [name for name in NAMES if name not in FORM_A | ALONE and "DARE" not in name]
methods = pytest.mark.parametrize("name", NAMES)


def test_every_method_from_weights_and_moments_is_here() -> None:
    """Those that train have tests of their own, though some are here as well."""
    elsewhere = {name for name, method in METHODS.items() if method.cost_class == "training"}
    assert {method.name for method in every_method("base").values()} >= set(METHODS) - elsewhere


@methods
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_strength_0_is_the_fine_tune_and_1_the_method(
    name: str, t: float, dtype: torch.dtype
) -> None:
    method, layer = every_method("base")[name], layer_of((6, 8), dtype=dtype)
    edit = method.edit(layer, prepared(method, layer))
    assert isinstance(edit, LowRank | Dense), edit
    found, _ = apply_edit(layer.finetuned, edit, strength=t)
    assert found.dtype == dtype
    if t == 0.0:
        assert torch.equal(found, layer.finetuned)
    elif t == 1.0:
        assert torch.equal(found, repaired(method, layer, prepared(method, layer)))
    else:
        expected = layer.finetuned.double() + t * edit.dense().double()
        ulp = torch.finfo(dtype).eps * expected.abs()
        assert bool(((found.double() - expected).abs() <= ulp + 1e-6 * expected.abs()).all())


@pytest.mark.parametrize("name", FORM_B)
def test_without_a_task_vector_a_filter_has_nothing_to_do(name: str) -> None:
    method, layer = every_method("base")[name], layer_of((6, 6))
    same = dataclasses.replace(layer, finetuned=wa(layer))
    assert isinstance(method.edit(same, prepared(method, same)), Unchanged)


@methods
@pytest.mark.parametrize("kind", ["base", "unaligned"])
def test_without_a_safety_vector_nothing_that_uses_one_edits(name: str, kind: str) -> None:
    method, layer = every_method(kind)[name], layer_of((6, 6))
    same = dataclasses.replace(layer, **{kind: wa(layer)})
    unchanged = isinstance(method.edit(same, prepared(method, same)), Unchanged)
    assert unchanged is (name in USES_VECTOR)


@methods
@shapes
def test_every_method_is_deterministic_and_leaves_its_inputs_alone(
    name: str, shape: tuple[int, int]
) -> None:
    method, layer = every_method("base")[name], layer_of(shape, dtype=torch.float32)
    first = edit_of(method, layer, prepared(method, layer))
    assert torch.equal(edit_of(method, layer, prepared(method, layer)), first)
    fresh = layer_of(shape, dtype=torch.float32)
    assert torch.equal(layer.finetuned, fresh.finetuned)
    for role in ("aligned", "base", "unaligned"):
        assert torch.equal(layer.require(role), fresh.require(role))


@pytest.mark.parametrize("name", sorted(FORM_A))
@shapes
def test_additive_methods_do_not_depend_on_the_fine_tune(name: str, shape: tuple[int, int]) -> None:
    method, layer = every_method("base")[name], layer_of(shape)
    moved = dataclasses.replace(layer, finetuned=layer.finetuned + matrix(*shape, seed=99))
    one, two = (edit_of(method, each, prepared(method, each)) for each in (layer, moved))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["safe_lora", "safemerge"])
@shapes
def test_an_adapter_is_filtered_as_the_model_it_merges_to(
    name: str, shape: tuple[int, int]
) -> None:
    method, layer = every_method("base")[name], adapter_layer(shape)
    whole = dataclasses.replace(layer, lora=None)
    assert error(of(method)(layer), of(method)(whole)) <= 1e-12
    given_model = Safemerge(tau=2.0, safety_model="safety")
    both = safe_adapter(layer)
    apart = dataclasses.replace(both, lora=None, safety_lora=None)
    assert error(of(given_model)(both), of(given_model)(apart)) <= 1e-12


@pytest.mark.parametrize(
    "name", ["lssf", "delta_svd", "lox", "resta", "safe_lora", "safemerge", "wise_ft"]
)
def test_what_is_not_idempotent_moves_again(name: str) -> None:
    """The guard against a second repair is there for these."""
    method, layer = every_method("base")[name], layer_of((7, 9))
    once, twice = of(method)(layer), after(method, method)(layer)
    assert float((twice - once).norm()) > 0.01 * float((once - layer.finetuned).norm())


def test_the_key_of_these_layers_is_that_of_the_statistics() -> None:
    assert layer_of((3, 3)).key == KEY
