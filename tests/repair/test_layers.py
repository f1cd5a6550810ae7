"""What a method is given: every checkpoint of its roles, LoRA factors, places, and the order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support.adapter_support import tune
from support.repair_support import Trio, read_folder
from torch import Tensor

from realign.checkpoint.slots import logical_matrix, stored_rows
from realign.errors import NonFiniteError, NothingToDoError, UsageError
from realign.repair.edit import Dense, Edit, Layer, Unchanged, VectorKind
from realign.repair.engine import prepare_statistics, repair
from realign.repair.layers import read_layers
from realign.repair.method import Card, Method, Role
from realign.repair.methods.wise_ft import CARD
from realign.repair.plan import Plan, plan, plan_repair
from realign.repair.preparation import Scores, Selection, Statistics, Workbench
from realign.repair.request import Inputs, RepairRequest, open_inputs
from realign.repair.stream import STREAM_BYTES

ATTENTION = ["q_proj", "v_proj"]


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """Keeps the layers that it sees, and edits by what it chose."""

    name: ClassVar[str] = "recorder"
    card: ClassVar[Card] = CARD
    paper_vector: ClassVar[VectorKind | None] = None
    fuses: ClassVar[bool] = True
    seen: dict[str, Layer] = field(default_factory=dict)
    roles: tuple[str, ...] = ("aligned",)

    @classmethod
    def parameters(cls):
        return ()

    def required_roles(self) -> frozenset[Role]:
        return frozenset(self.roles)  # type: ignore[arg-type]

    def edit(self, layer: Layer, statistics: Statistics) -> Edit:
        self.seen[f"{layer.key}@{layer.start}"] = layer
        if not statistics.selects(layer.key):
            return Unchanged("not chosen")
        return Dense(torch.ones_like(layer.finetuned))


class EntryRecorder(Recorder):
    elementwise: ClassVar[bool] = True


class Chooser(Recorder):
    """Measures all matrices from weights, and edits the two that moved farthest."""

    def prepare(self, workbench: Workbench) -> Statistics:
        scores = {
            layer.key: {"moved": float(layer.task_vector().norm())} for layer in workbench.layers()
        }
        assert list(scores) == list(workbench.slots)
        return Statistics(
            scores=scores, facts={"largest": max(s["moved"] for s in scores.values())}
        )

    def select(self, scores: Scores) -> Selection | None:
        assert not self.seen, "matrices are chosen before any is edited"
        return frozenset(sorted(scores, key=lambda key: scores[key]["moved"])[-2:])


def _request(trio: Trio, method: Method, **options: object) -> RepairRequest:
    given = {"finetuned": trio.finetuned, "aligned": trio.aligned, "method": method}
    return RepairRequest(**{**given, **options})


def _layers(request: RepairRequest) -> tuple[Plan, dict[str, Layer]]:
    with open_inputs(request) as inputs:
        planned = plan_repair(request, inputs)
        return planned, {layer.key: layer for _, layer in read_layers(planned, inputs)}


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2", "gpt_oss"])
def test_layers_of_a_plan_are_what_the_engine_edits(trio_of, tmp_path: Path, arch: str) -> None:
    trio, method = trio_of(arch, torch.bfloat16), Recorder()
    request = _request(trio, method, output=tmp_path / "out")
    _, layers = _layers(request)
    repair(request)
    edited = {key.partition("@")[0]: layer for key, layer in method.seen.items()}
    assert set(edited) == set(layers)  # threads edit in any order
    for key, layer in layers.items():
        assert torch.equal(layer.finetuned, edited[key].finetuned)
        assert torch.equal(layer.require("aligned"), edited[key].require("aligned"))
        assert (layer.module, layer.layer) == (edited[key].module, edited[key].layer)


def test_every_role_has_its_weights(trio_of, tmp_path: Path) -> None:
    """Another checkpoint in the place of each role; further fine-tunes in their order."""
    trio = trio_of("llama")
    method = Recorder(roles=("aligned", "safety", "reference"))
    request = _request(
        trio, method, safety=trio.unaligned, reference=trio.base, also=[trio.base, trio.aligned]
    )
    planned, layers = _layers(request)
    assert list(planned.inputs) == ["finetuned", "aligned", "reference", "safety", "also1", "also2"]
    base, aligned, unaligned = map(read_folder, (trio.base, trio.aligned, trio.unaligned))
    for key, layer in layers.items():
        assert torch.equal(layer.require("safety"), unaligned[key])
        assert torch.equal(layer.require("reference"), base[key])
        assert layer.base is None and layer.unaligned is None
        assert len(layer.also) == 2
        assert torch.equal(layer.also[0], base[key]) and torch.equal(layer.also[1], aligned[key])
    result = repair(
        RepairRequest(**{**vars(request), "output": tmp_path / "out", "method": method})
    )
    assert set(result.manifest["inputs"]) == set(planned.inputs)
    assert all(each["files"] for each in result.manifest["inputs"].values())


def test_the_same_checkpoint_twice_is_refused(trio_of) -> None:
    trio = trio_of("llama")
    for role, option in (("safety", "--safety-model"), ("reference", "--reference")):
        method = Recorder(roles=("aligned", role))
        with pytest.raises(NothingToDoError, match=option):
            plan(_request(trio, method, **{role: trio.finetuned}))
    with pytest.raises(NothingToDoError, match="--also"):
        plan(_request(trio, Recorder(), also=[trio.finetuned]))
    with pytest.raises(UsageError, match="cannot fuse others"):
        plan(_request(trio, "wise_ft", also=[trio.base]))


@pytest.mark.parametrize(("role", "option"), [("safety", "--safety-model"), ("base", "--base")])
def test_a_role_that_settings_need_is_asked_for_by_its_option(
    trio_of, role: str, option: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan(_request(trio_of("llama"), Recorder(roles=("aligned", role))))
    assert role in caught.value.message and option in caught.value.hint


# --- LoRA factors ------------------------------------------------------------------------------


def _products(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    return {key: each.lora.product() for key, each in layers.items() if each.lora is not None}


@pytest.mark.parametrize(
    ("arch", "targets"),
    [
        ("llama", ATTENTION),
        ("phi3", ["qkv_proj", "down_proj"]),
        ("gpt2", ["c_attn", "c_proj"]),
    ],
)
@pytest.mark.parametrize("rslora", [False, True])
def test_factors_of_an_adapter_are_its_task_vector(
    trio_of, tmp_path: Path, arch: str, targets: list[str], rslora: bool
) -> None:
    trio = trio_of(arch)
    options = {"target_modules": targets, "r": 4, "lora_alpha": 12, "use_rslora": rslora}
    if arch == "gpt2":
        options["fan_in_fan_out"] = True
    adapter = tune(trio.aligned, tmp_path / "adapter", **options)
    planned, layers = _layers(_request(trio, Recorder(), finetuned=adapter))
    assert planned.factored == {"finetuned"}
    products = _products(layers)
    assert products
    for key, layer in layers.items():
        task = layer.task_vector()
        if key not in products:
            assert not bool(task.any()), key
            continue
        assert layer.lora is not None and layer.lora.down.shape[0] == 4
        torch.testing.assert_close(products[key], task, rtol=0, atol=2e-6)


def test_factors_of_experts(trio_of, tmp_path: Path) -> None:
    trio = trio_of("gpt_oss")
    adapter = tune(
        trio.aligned,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj"],
        r=2,
        lora_dropout=0.0,
    )
    _, layers = _layers(_request(trio, Recorder(), finetuned=adapter))
    products = _products(layers)
    assert sum("experts" in key for key in products) == 3
    for key, product in products.items():
        torch.testing.assert_close(product, layers[key].task_vector(), rtol=0, atol=2e-6)


def test_an_adapter_over_another_base_has_no_factors(trio_of, tmp_path: Path) -> None:
    """BASE+ADAPTER on the unaligned model: Wf is not Wa + s B A."""
    trio = trio_of("llama")
    adapter = tune(trio.aligned, tmp_path / "adapter", target_modules=ATTENTION)
    request = _request(trio, Recorder(), finetuned=f"{trio.unaligned}+{adapter}")
    planned, layers = _layers(request)
    assert planned.factored == frozenset()
    assert not _products(layers)


def test_more_than_a_product_has_no_factors(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    adapter = tune(trio.aligned, tmp_path / "dora", target_modules=ATTENTION, use_dora=True)
    _, layers = _layers(_request(trio, Recorder(), finetuned=adapter))
    assert not _products(layers)


def test_adapters_in_other_roles_stand_on_the_aligned_model(trio_of, tmp_path: Path) -> None:
    trio = trio_of("llama")
    safety = tune(trio.aligned, tmp_path / "safety", target_modules=ATTENTION)
    method = Recorder(roles=("aligned", "safety", "reference"))
    _, layers = _layers(_request(trio, method, safety=safety, reference=safety))
    seen = 0
    for layer in layers.values():
        assert layer.lora is None
        for tensor, factors in (
            (layer.require("safety"), layer.safety_lora),
            (layer.require("reference"), layer.reference_lora),
        ):
            if factors is not None:
                seen += 1
                moved = tensor - layer.require("aligned")
                torch.testing.assert_close(factors.product(), moved, rtol=0, atol=2e-6)
    assert seen == 8


# --- places ------------------------------------------------------------------------------------


def test_chunks_say_where_they_begin(tmp_path: Path) -> None:
    """In row-major order of the stored tensor: parts of one expert of a stack, too."""
    from safetensors.torch import save_file

    rows = STREAM_BYTES // 4 // 64 + 5
    shapes = {
        "model.layers.0.mlp.experts.down_proj": (2, rows, 64),
        "model.layers.0.self_attn.q_proj.weight": (rows, 64),
        "model.layers.0.input_layernorm.weight": (64,),
    }
    config = {"model_type": "gpt_oss", "hidden_size": 64, "num_hidden_layers": 1}
    generator = torch.Generator().manual_seed(1)
    for name in ("finetuned", "aligned"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        tensors = {
            tensor: torch.randn(shape, generator=generator) for tensor, shape in shapes.items()
        }
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    method = EntryRecorder()
    request = RepairRequest(
        finetuned=tmp_path / "finetuned",
        aligned=tmp_path / "aligned",
        method=method,
        scope="all",
        output=tmp_path / "out",
    )
    repair(request)
    stored = read_folder(tmp_path / "finetuned")
    covered = dict.fromkeys(shapes, 0)
    for layer in method.seen.values():
        flat = stored[layer.key].reshape(-1)
        part = flat[layer.start : layer.start + layer.finetuned.numel()]
        assert torch.equal(part, layer.finetuned.reshape(-1)), (layer.key, layer.start)
        covered[layer.key] += part.numel()
    assert covered == {name: tensor.numel() for name, tensor in stored.items()}
    assert len(method.seen) > len(shapes)


# --- the order of things -----------------------------------------------------------------------


def test_prepare_then_select_then_edit(trio_of, tmp_path: Path) -> None:
    trio, method = trio_of("llama"), Chooser()
    result = repair(_request(trio, method, output=tmp_path / "out"))
    edited = {row.key for row in result.rows if row.outcome == "edited"}
    assert len(edited) == 2
    assert set(result.manifest["selection"]) == edited
    moved = {row.key: row.facts["moved"] for row in result.rows}
    assert len(moved) == 14  # also of those that were not chosen
    assert edited == set(sorted(moved, key=lambda key: moved[key])[-2:])
    assert result.manifest["method_facts"] == {"largest": max(moved.values())}


def test_a_method_of_weights_alone_may_not_ask_for_models(trio_of) -> None:
    class Liar(Recorder):
        def prepare(self, workbench: Workbench) -> Statistics:
            return workbench.moments(role="aligned", standardize="none", tokens="all")

    request = _request(trio_of("llama"), Liar())
    with open_inputs(request) as inputs, pytest.raises(AttributeError, match="declares neither"):
        prepare_statistics(request, plan_repair(request, inputs), inputs)


def test_damage_is_named_before_anything_is_prepared(trio_of, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    trio = trio_of("llama")
    file = trio.aligned / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.inf
    for source in trio.aligned.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    request = _request(trio, Chooser(), aligned=tmp_path, output=tmp_path.parent / "out")
    with pytest.raises(NonFiniteError, match=r"up_proj.weight of the aligned checkpoint"):
        repair(request)


def test_slots_and_shapes_of_one_read(trio_of) -> None:
    """A layer is the view of exactly its stored rows."""
    trio = trio_of("phi3")
    request = _request(trio, Recorder())
    with open_inputs(request) as inputs:
        planned = plan_repair(request, inputs)
        stored = read_folder(trio.finetuned)
        for slot, layer in read_layers(planned, inputs):
            rows = slice(*stored_rows(slot, tuple(stored[slot.tensor].shape)))
            assert torch.equal(layer.finetuned, logical_matrix(stored[slot.tensor][rows], slot))
    assert isinstance(inputs, Inputs)
