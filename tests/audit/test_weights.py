from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from realign.audit.schema import Weights
from realign.audit.weights import measure_weights
from realign.checkpoint.reader import FolderCheckpoint, open_checkpoint
from realign.errors import NonFiniteError

A1 = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
T1 = torch.tensor([[-1.0, 0, 0], [0, -0.2, 0.3], [0, 0.4, 0.5]])
A2 = torch.tensor([[0.0, 1], [1, 0]])
T2 = torch.tensor([[0.0, -1.5], [0.5, 0]])
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBED = "model.embed_tokens.weight"


def write(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    config: dict[str, object] | None = None,
) -> FolderCheckpoint:
    folder.mkdir()
    config = config or {"model_type": "llama", "hidden_size": 3, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, FolderCheckpoint)
    return checkpoint


def trio(
    tmp_path: Path, *, dtype: torch.dtype = torch.float32, t1: torch.Tensor = T1
) -> tuple[FolderCheckpoint, ...]:
    base = {
        Q: torch.ones(3, 3),
        UP: torch.ones(2, 2),
        NORM: torch.ones(3),
        EMBED: torch.arange(12.0).reshape(4, 3),
    }
    reference = {**base, Q: base[Q] + A1, UP: base[UP] + A2}
    subject = {**reference, Q: reference[Q] + t1, UP: reference[UP] + T2}
    return tuple(
        write(tmp_path / name, tensors, dtype=dtype)
        for name, tensors in (("base", base), ("reference", reference), ("subject", subject))
    )


def measured(
    base: FolderCheckpoint, reference: FolderCheckpoint, subject: FolderCheckpoint
) -> Weights:
    return measure_weights(reference=reference, subjects={"subject": subject}, base=base)


def test_the_vectors_through_real_files(tmp_path: Path) -> None:
    weights = measured(*trio(tmp_path))
    rows = {row.key: row for row in weights.groups[0].per_matrix}
    q, up = rows[Q], rows[UP]
    assert q.alignment_retained == pytest.approx(0.56, abs=1e-6)
    assert q.cosine == pytest.approx(-0.792825, abs=1e-6)
    # k = 1: the fewest directions with half the energy of a.
    assert q.energy == pytest.approx(0.805823, abs=1e-6)
    assert q.energy_squared == pytest.approx(0.649351, abs=1e-6)
    assert q.excess == pytest.approx(1.948052, abs=1e-6)
    assert q.lox_ratio == pytest.approx(0.764272, abs=1e-6)
    assert q.entropy == pytest.approx(0.828131, abs=1e-6)
    assert q.effective_rank == pytest.approx(2.289036, abs=1e-6)
    assert q.stable_rank == pytest.approx(1.54, abs=1e-6)
    assert up.alignment_retained == pytest.approx(0.5, abs=1e-6)
    # Sum of numerators over sum of denominators, never the mean of ratios (0.53).
    assert weights.global_["alignment_retained"] == pytest.approx(0.542857, abs=1e-6)
    layers = {row.key: row.alignment_retained for row in weights.per_layer}
    assert layers["0"] == pytest.approx(0.56) and layers["1"] == pytest.approx(0.5)
    assert {row.key for row in weights.per_module} == {"q_proj", "up_proj", "norm", "embed"}
    assert weights.line == "weight screening: NOT validated"


def test_nothing_changed_and_all_undone(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    same = measured(*trio(tmp_path / "x", t1=torch.zeros(3, 3)))
    q = {row.key: row for row in same.groups[0].per_matrix}[Q]
    assert (q.alignment_retained, q.cosine, q.relative_distance) == (1.0, None, 0.0)
    (tmp_path / "y").mkdir()
    undone = measured(*trio(tmp_path / "y", t1=-A1))
    q = {row.key: row for row in undone.groups[0].per_matrix}[Q]
    assert q.alignment_retained == pytest.approx(0.0, abs=1e-7)
    assert q.cosine == pytest.approx(-1.0)


def test_small_deltas_of_bf16_weights_are_recovered_and_flagged(tmp_path: Path) -> None:
    # 1 + 2^-7 is the next bf16 number: the difference is exact only in float32.
    names = {Q: torch.full((4, 4), 64.0)}
    moved = {Q: torch.full((4, 4), 64.0)}
    moved[Q][0, 0] = 64.5
    reference = write(tmp_path / "reference", names, dtype=torch.bfloat16)
    subject = write(tmp_path / "subject", moved, dtype=torch.bfloat16)
    weights = measure_weights(reference=reference, subjects={"subject": subject})
    (row,) = weights.groups[0].per_matrix
    assert row.relative_distance == pytest.approx(0.5 / 256, abs=1e-9)
    tiny = write(tmp_path / "same", names, dtype=torch.bfloat16)
    again = measure_weights(reference=reference, subjects={"subject": tiny})
    assert again.groups[0].per_matrix[0].relative_distance == 0.0
    assert row.alignment_retained is None  # no base


def test_resized_vocabularies_share_rows_and_extra_tensors_are_listed(tmp_path: Path) -> None:
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    reference = write(tmp_path / "r", {Q: matrix, EMBED: torch.ones(4, 3)})
    longer = torch.cat([torch.ones(4, 3), torch.full((2, 3), 9.0)])
    subject = write(tmp_path / "s", {Q: matrix, EMBED: longer, "extra.bias": torch.ones(1)})
    weights = measure_weights(reference=reference, subjects={"subject": subject})
    rows = {row.key: row for row in weights.groups[0].per_matrix}
    assert rows[EMBED].relative_distance == 0.0
    assert weights.unmatched == ("extra.bias",)
    assert weights.groups[0].total is None  # one of 28 numbers is more than 1 %


def test_what_the_base_lacks_is_listed_and_not_dropped_in_silence(tmp_path: Path) -> None:
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    down = Q.replace("self_attn.q_proj", "mlp.down_proj")
    up = Q.replace("self_attn.q_proj", "mlp.up_proj")
    tensors = {name: matrix.clone() for name in (Q, down, up)}
    reference = write(tmp_path / "r", tensors)
    subject = write(tmp_path / "s", {name: 2 * tensor for name, tensor in tensors.items()})
    base = write(tmp_path / "b", {Q: torch.zeros(3, 3), up: torch.zeros(3, 4)})
    weights = measure_weights(reference=reference, subjects={"subject": subject}, base=base)
    assert sorted(weights.skipped) == [
        f"{down}: not in the base, compared with the reference alone",
        f"{up}: of another shape in the base, compared with the reference alone",
    ]
    rows = {row.key: row for row in weights.groups[0].per_matrix}
    assert rows[down].relative_distance == pytest.approx(1.0)
    assert rows[down].alignment_retained is None and rows[Q].alignment_retained is not None


def test_other_architectures_are_no_error_and_no_number(tmp_path: Path) -> None:
    reference = write(tmp_path / "r", {Q: torch.ones(3, 3)})
    subject = write(tmp_path / "s", {Q: torch.ones(3, 4)})
    weights = measure_weights(reference=reference, subjects={"subject": subject})
    assert weights.unmatched == (Q,) and weights.global_ == {}
    assert weights.global_reason == "100.0% of the parameters do not match by name and shape"


def test_fused_transposed_and_stacked_matrices_are_measured_one_by_one(tmp_path: Path) -> None:
    """GPT-2 stores [d_in, 3 d_out]; a stack of experts is [experts, d_out, d_in]."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(4, 12, generator=generator)
    delta = torch.zeros(4, 12)
    delta[:, 4:8] = torch.eye(4)  # only the keys move
    config = {"model_type": "gpt2", "n_embd": 4, "n_head": 2, "n_layer": 1}
    name = "h.0.attn.c_attn.weight"
    reference = write(tmp_path / "r", {name: fused}, config=config)
    subject = write(tmp_path / "s", {name: fused + delta}, config=config)
    weights = measure_weights(reference=reference, subjects={"subject": subject})
    moved = {row.key: row.relative_distance for row in weights.groups[0].per_matrix}
    expected = 2.0 / float(fused[:, 4:8].norm())
    assert moved == {
        f"{name}[q_proj]": 0.0,
        f"{name}[k_proj]": pytest.approx(expected, abs=1e-6),
        f"{name}[v_proj]": 0.0,
    }
    experts = torch.randn(2, 3, 3, generator=generator)
    bumped = experts.clone()
    bumped[1] += torch.eye(3)
    stack = "model.layers.0.mlp.experts.up_proj"
    reference = write(tmp_path / "r3", {stack: experts})
    subject = write(tmp_path / "s3", {stack: bumped})
    weights = measure_weights(reference=reference, subjects={"subject": subject})
    moved = {row.key: row.relative_distance for row in weights.groups[0].per_matrix}
    assert moved[f"{stack}[e0]"] == 0.0 and (moved[f"{stack}[e1]"] or 0.0) > 0.0


def test_a_broken_tensor_is_named(tmp_path: Path) -> None:
    reference = write(tmp_path / "r", {Q: torch.ones(3, 3)})
    subject = write(tmp_path / "s", {Q: torch.full((3, 3), float("nan"))})
    with pytest.raises(NonFiniteError, match="q_proj"):
        measure_weights(reference=reference, subjects={"subject": subject})
