"""Moments against dense references: every vector built, kept and multiplied out in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.model_support import gpt2, llama, loaded, qwen2
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from realign.errors import (
    CheckpointError,
    MismatchError,
    ModelError,
    NonFiniteError,
    OutputError,
    UsageError,
)
from realign.model.accumulate import Sums, standardise_tokens
from realign.model.moments import (
    MomentRequest,
    Moments,
    MomentSet,
    TokenSequence,
    collect_moments,
    token_sequence,
)
from realign.model.moments_file import StoredMoments, save_moments

LAYER = "model.layers.1"


def sequences(count: int = 9, *, vocabulary: int = 48, seed: int = 5) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    made: list[TokenSequence] = []
    for index in range(count):
        length = 3 + (index * 5) % 11
        ids = torch.randint(7, vocabulary, (length,), generator=generator).tolist()
        made.append(token_sequence(ids[:2], ids[2:]))
    return made


def dense(model: PreTrainedModel, path: str, items: list[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Inputs [N, d_in] and outputs [N, d_out] (bias included) of a module, one sequence a time."""
    seen: list[tuple[Tensor, Tensor]] = []
    module: Any = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    for item in items:
        with torch.no_grad():
            model(torch.tensor([item.ids]))
    handle.remove()
    keep = torch.tensor([flag for item in items for flag in item.keep])
    x = torch.cat([x[0] for x, _ in seen])[keep].double()
    y = torch.cat([y[0] for _, y in seen])[keep].double()
    return x, y


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


def test_input_and_output_moments_equal_the_dense_reference() -> None:
    model, items = llama(), sequences()
    requests = {
        f"{kind} {name}": MomentRequest(kind, f"{LAYER}.{name}")  # type: ignore[arg-type]
        for kind in ("input", "output")
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    }
    found = collect_moments(loaded(model), items, requests=requests, batch_size=4)
    assert not found.missing
    for key, request in requests.items():
        x, y = dense(model, request.module_path, items)
        v = x if request.kind == "input" else y
        assert found[key].n == len(v) == sum(len(item.ids) - 2 for item in items)
        assert found[key].s2.dtype == torch.float64
        assert close(found[key].s1, v.sum(dim=0))
        assert close(found[key].s2, v.T @ v)
        assert close(found[key].covariance(), torch.cov(v.T, correction=0))


def test_the_input_route_equals_the_output_route() -> None:
    model, items = llama(), sequences()
    path = f"{LAYER}.mlp.up_proj"
    requests = {
        "in": MomentRequest("input", path),
        "out": MomentRequest("output", path),
    }
    found = collect_moments(loaded(model), items, requests=requests)
    weight = model.get_parameter(f"{path}.weight").data
    through = found["in"].through(weight)
    assert (through.n, through.kind) == (found["out"].n, "output")
    assert close(through.s1, found["out"].s1)
    assert close(through.s2, found["out"].s2)
    with pytest.raises(MismatchError, match="do not feed"):
        found["out"].through(weight)


def test_layers_fed_the_same_tensor_share_one_set() -> None:
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    requests = {name: MomentRequest("input", f"{LAYER}.{name}") for name in names}
    found = collect_moments(loaded(llama()), sequences(), requests=requests, batch_size=2)
    q, k, v, o, gate, up, down = (found[name] for name in names)
    assert q is k is v
    assert gate is up
    assert len({id(m) for m in (q, o, gate, down)}) == 4
    alone = {"k": requests["self_attn.k_proj"]}
    assert close(collect_moments(loaded(llama()), sequences(), requests=alone)["k"].s2, k.s2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_excluded_from_outputs(dtype: torch.dtype) -> None:
    model, items = qwen2().to(dtype), sequences()
    path = f"{LAYER}.self_attn.k_proj"
    found = collect_moments(
        loaded(model), items, requests={"k": MomentRequest("output", path)}, batch_size=1
    )
    x, y = dense(model, path, items)
    z = x @ model.get_parameter(f"{path}.weight").data.double().T
    assert not close(y.T @ y, z.T @ z, 0.5), "the bias must matter for this test to mean anything"
    # in bf16, 2^-9 relative to z; relative to the bias it would be far more
    assert close(found["k"].s2, z.T @ z, 1e-5 if dtype == torch.float32 else 4e-3)


def test_conv1d_and_row_blocks_of_a_fused_projection() -> None:
    model, items = gpt2(), sequences()
    path = "transformer.h.1.attn.c_attn"
    requests = {
        "in": MomentRequest("input", path, (0, 24), transposed=True),
        "whole": MomentRequest("output", path, transposed=True),
        "k": MomentRequest("output", path, (24, 48), transposed=True),
        "token k": MomentRequest("token", path, (24, 48), transposed=True),
        "fc": MomentRequest("output", "h.1.mlp.c_fc", transposed=True),  # the bare decoder's name
    }
    found = collect_moments(loaded(model), items, requests=requests, batch_size=3)
    assert not found.missing
    x, _ = dense(model, path, items)
    z = x @ model.get_parameter(f"{path}.weight").data.double()
    assert close(found["in"].s2, x.T @ x)
    assert close(found["whole"].s2, z.T @ z)
    assert torch.equal(found["k"].s2, found["whole"].s2[24:48, 24:48])
    standard = standardise_tokens(z[:, 24:48])
    assert close(found["token k"].s2, standard.T @ standard)
    assert found["fc"].s1.shape == (96,)


def test_conv1d_in_bf16_excludes_the_bias() -> None:
    model, items = gpt2().to(torch.bfloat16), sequences()
    path = "transformer.h.1.attn.c_attn"
    request = MomentRequest("output", path, transposed=True)
    found = collect_moments(loaded(model), items, requests={"a": request}, batch_size=1)
    x, _ = dense(model, path, items)
    z = x @ model.get_parameter(f"{path}.weight").data.double()
    assert close(found["a"].s2, z.T @ z, 4e-3)


def test_token_standardisation() -> None:
    # The hand example's Z has the tokens as columns; eigenvalues as published for it.
    z = torch.tensor([[1, -1, 1, -1], [2, -2, 2, -2], [1, 1, -1, -1]]).double()
    standard = standardise_tokens(z.T)
    eigenvalues = torch.linalg.eigvalsh(standard.T @ standard).flip(0)
    expected = torch.tensor([10.535574, 1.464426, 0.0], dtype=torch.float64)
    assert torch.allclose(eigenvalues, expected, atol=1e-6)
    flat = standardise_tokens(torch.tensor([[2.0, 2.0], [1.0, 3.0]]))
    assert torch.equal(flat, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), batch_size=st.integers(1, 9), budget=st.integers(10, 200))
def test_batch_split_and_order_do_not_matter(seed: int, batch_size: int, budget: int) -> None:
    subject, items = loaded(qwen2()), sequences()
    requests = {
        "in": MomentRequest("input", f"{LAYER}.mlp.gate_proj"),
        "out": MomentRequest("output", f"{LAYER}.self_attn.q_proj"),
        "token": MomentRequest("token", f"{LAYER}.self_attn.o_proj"),
    }
    whole = collect_moments(subject, items, requests=requests)
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [items[index] for index in order]
    split = collect_moments(
        subject, shuffled, requests=requests, batch_size=batch_size, token_budget=budget
    )
    for key in requests:
        assert split[key].n == whole[key].n
        assert close(split[key].s1, whole[key].s1, 1e-4)
        assert close(split[key].s2, whole[key].s2, 1e-5)


def test_parts_merge_to_the_whole() -> None:
    subject, items = loaded(llama()), sequences()
    requests = {"out": MomentRequest("output", f"{LAYER}.mlp.down_proj")}
    whole = collect_moments(subject, items, requests=requests)["out"]
    parts = [collect_moments(subject, p, requests=requests)["out"] for p in (items[:3], items[3:])]
    merged = parts[0].merge(parts[1])
    assert merged.n == whole.n
    assert close(merged.s1, whole.s1)
    assert close(merged.s2, whole.s2)
    other = Moments(1, torch.zeros(3), torch.zeros(3, 3), "output")
    with pytest.raises(MismatchError, match="cannot be merged"):
        whole.merge(other)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_small_spread_beside_a_large_mean_survives(precision: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = 300 + 0.5 * torch.randn(4096, 6, generator=generator)  # float32, variance 0.25
    sums = Sums(6, torch.device("cpu"), precision)
    for part in data.split(300):
        sums.add(part)
    exact = torch.cov(data.double().T, correction=0)
    found = Moments(*sums.finish(), "output").covariance()
    assert torch.allclose(found, exact, atol=1e-7)
    naive = (data.T @ data) / len(data) - torch.outer(data.mean(0), data.mean(0))
    assert (naive.diagonal().double() - exact.diagonal()).abs().max() > 1e-3, "the trap is real"


def test_pivoted_float32_equals_float64_on_a_model() -> None:
    subject, items = loaded(llama()), sequences()
    requests = {"out": MomentRequest("output", f"{LAYER}.mlp.down_proj")}
    exact = collect_moments(subject, items, requests=requests, precision="float64")["out"]
    pivoted = collect_moments(subject, items, requests=requests, precision="float32", batch_size=2)[
        "out"
    ]
    assert pivoted.n == exact.n
    assert close(pivoted.s1, exact.s1)
    assert close(pivoted.covariance(), exact.covariance())


def test_what_cannot_be_collected_is_said() -> None:
    config = MixtralConfig(
        vocab_size=48,
        hidden_size=24,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = MixtralForCausalLM(config).eval()
    requests = {
        "expert": MomentRequest("input", "model.layers.0.block_sparse_moe.experts.0.w9"),
        "embedding": MomentRequest("output", "model.embed_tokens"),
        "q": MomentRequest("output", "model.layers.0.self_attn.q_proj"),
    }
    found = collect_moments(loaded(model), sequences(3), requests=requests)
    assert set(found) == {"q"}
    assert "no module" in found.missing["expert"]
    assert "one vector per position" in found.missing["embedding"]


def test_a_module_that_never_runs_is_said() -> None:
    model = llama()
    model.model.spare = torch.nn.Linear(24, 3)
    found = collect_moments(
        loaded(model), sequences(2), requests={"s": MomentRequest("input", "model.spare")}
    )
    assert "never ran" in found.missing["s"]


def test_the_head_is_reached() -> None:
    model, items = llama(), sequences(4)
    found = collect_moments(
        loaded(model), items, requests={"head": MomentRequest("output", "lm_head")}
    )
    _, y = dense(model, "lm_head", items)
    assert close(found["head"].s2, y.T @ y)


def test_nothing_kept_gives_zero_tokens() -> None:
    items = [TokenSequence((8, 9), (False, False))]
    found = collect_moments(
        loaded(llama()), items, requests={"q": MomentRequest("input", f"{LAYER}.self_attn.q_proj")}
    )
    assert found["q"].n == 0
    assert not found["q"].s2.any()


def test_non_finite_activations_name_the_module() -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = float("inf")
    path = f"{LAYER}.self_attn.q_proj"
    with pytest.raises(NonFiniteError, match=path):
        collect_moments(loaded(model), sequences(2), requests={"q": MomentRequest("input", path)})


def test_hooks_are_removed_even_after_an_error() -> None:
    model = llama(positions=8)
    requests = {"q": MomentRequest("input", f"{LAYER}.self_attn.q_proj")}
    bad = [TokenSequence((8, 99), (True, True))]  # no such token
    with pytest.raises(ModelError, match="IndexError"):
        collect_moments(loaded(model), bad, requests=requests)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ModelError, match="positions"):
        collect_moments(loaded(model), sequences(9), requests=requests)


def test_masks() -> None:
    assert token_sequence([1, 2], [3]).keep == (False, False, True)
    assert token_sequence([1, 2], [3], tokens="prompt").keep == (True, True, False)
    assert token_sequence([1, 2], [3], tokens="all").keep == (True, True, True)
    with pytest.raises(UsageError, match="answer"):
        token_sequence([1], [2], tokens="answer")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="mask"):
        TokenSequence((1, 2), (True,))


def test_round_trip_through_a_file_shares_what_was_shared(tmp_path: Path) -> None:
    requests = {
        "q[0]": MomentRequest("input", f"{LAYER}.self_attn.q_proj"),
        "k": MomentRequest("input", f"{LAYER}.self_attn.k_proj"),
        "o": MomentRequest("token", f"{LAYER}.self_attn.o_proj"),
        "none": MomentRequest("token", "absent"),
    }
    found = collect_moments(loaded(llama()), sequences(), requests=requests)
    file = tmp_path / "moments.safetensors"
    save_moments(file, found, about={"model": "tiny"})
    back = StoredMoments(file)
    assert back.about == {"model": "tiny"}
    assert list(back) == sorted(found) and len(back) == len(found)
    assert back.missing == found.missing
    with safe_open(file, framework="pt") as stored:
        assert len(stored.keys()) == 2 * 2, "q and k share their inputs"
    assert file.stat().st_mode & 0o777 == 0o600
    for key, moments in found.items():
        assert (back[key].n, back[key].kind) == (moments.n, moments.kind)
        assert torch.equal(back[key].s1, moments.s1)
        assert torch.equal(back[key].s2, moments.s2)
    assert [path.name for path in tmp_path.iterdir()] == ["moments.safetensors"]


def test_damaged_foreign_or_absent_files(tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        StoredMoments(file)
    save_file({"0.s1": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="schema"):
        StoredMoments(file)
    save_moments(
        file, MomentSet({"a": Moments(0, torch.zeros(2), torch.zeros(2, 2), "input")}), about={}
    )
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        StoredMoments(file)
    about = {"schema": "realign/moments/1", "missing": "{}", "about": "{}"}
    for index in ("", "[]", "null", '{"a": 1}', '{"a": {"set": 3, "n": 0, "kind": "input"}}'):
        save_file({"0.s1": torch.zeros(1)}, file, metadata={**about, "index": index})
        with pytest.raises(CheckpointError, match="cannot be read"):
            StoredMoments(file)
    with pytest.raises(OutputError, match="cannot be written"):
        save_moments(tmp_path / "absent" / "x", MomentSet({}), about={})
