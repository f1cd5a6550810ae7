"""LoX's and AsFT's claims: by hand, against dense float64, and the models that are moved."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from realign.checkpoint.slots import Slot
from realign.errors import NotFoundError, UsageError
from realign.lab.claims_moved import inner, measure_moved, norm, perturbations, split
from realign.lab.claims_weights import (
    MatrixVectors,
    Part,
    association,
    matrix_vectors,
    measure_weight_claims,
    summarise_vectors,
)
from realign.lab.record import read_record

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
SLOT = Slot("k", "k", "q_proj", 0)


def diagonal(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values))


def test_the_ratio_by_hand() -> None:
    # V = diag(3, 2, 1), k = 2: R_align = sqrt(13 / 14). The fine-tune adds 4 in the third row.
    others = {"base": torch.zeros(3, 3), "tuned": diagonal(3, 2, 5), "same": diagonal(3, 2, 1)}
    found = matrix_vectors(SLOT, diagonal(3, 2, 1), others, rank=2)
    assert found is not None and found.squared == pytest.approx(14)
    assert found.r_align == pytest.approx(0.963624, abs=1e-6)
    tuned, same = found.parts["tuned"], found.parts["same"]
    assert tuned.ratio == pytest.approx(math.sqrt(13 / 38))
    assert (tuned.inner, tuned.squared, tuned.inside) == pytest.approx((4, 16, 0))
    assert same.ratio == pytest.approx(found.r_align) and same.inside is None


def test_what_poison_adds_is_the_difference_of_two_fine_tunes() -> None:
    torch.manual_seed(0)
    aligned, base, clean, bad = (torch.randn(6, 4) for _ in range(4))
    others = {"base": base, "both_p0": clean, "both_p5": bad}
    found = matrix_vectors(SLOT, aligned, others, rank=2)
    assert found is not None and set(found.parts) == {"both_p0", "both_p5", "poison_p5"}
    added, v = (bad - clean).double(), (aligned - base).double()
    u = torch.linalg.svd(v)[0][:, :2]
    part = found.parts["poison_p5"]
    assert part.inner == pytest.approx(float((added * v).sum()), rel=1e-6)
    assert part.inside == pytest.approx(float((u.T @ added).norm() / added.norm()) ** 2, rel=1e-5)
    assert part.ratio is None


def test_an_aligned_model_that_never_moved_has_no_direction() -> None:
    same = torch.ones(3, 3)
    assert matrix_vectors(SLOT, same, {"base": same, "tuned": diagonal(1, 2, 3)}, rank=2) is None


def test_pooled_figures_take_all_matrices_as_one_vector() -> None:
    torch.manual_seed(1)
    rows: list[MatrixVectors] = []
    v_all, d_all, kept_v, kept_f = [], [], 0.0, 0.0
    for scale in (1.0, 3.0):
        aligned, base, tuned = (scale * torch.randn(5, 7) for _ in range(3))
        row = matrix_vectors(SLOT, aligned, {"base": base, "tuned": tuned}, rank=2)
        assert row is not None
        rows.append(row)
        v, d = (aligned - base).double(), (tuned - aligned).double()
        u = torch.linalg.svd(v)[0][:, :2]
        v_all.append(v.flatten())
        d_all.append(d.flatten())
        kept_v += float((u.T @ v).square().sum())
        kept_f += float((u.T @ (v + d)).square().sum())
    record = read_record(TINY)
    found = summarise_vectors(rows, harm={"tuned": 0.5}, record=record, rank=2)
    v, d = torch.cat(v_all), torch.cat(d_all)
    direction = found.directions["tuned"]
    assert direction.cosine == pytest.approx(float(v @ d / (v.norm() * d.norm())), rel=1e-5)
    assert direction.distance == pytest.approx(float(d.norm() / v.norm()), rel=1e-5)
    r_align, r_ft = kept_v / float(v @ v), kept_f / float((v + d) @ (v + d))
    assert direction.ratio_pooled == pytest.approx(math.sqrt(r_ft / r_align), rel=1e-5)
    assert direction.complied == 0.5 and direction.cosines.n == 2
    assert found.ratio_and_harm is None  # one model says nothing about association


def test_an_update_that_is_zero_in_one_matrix_counts_in_the_others() -> None:
    moved = MatrixVectors("a", 0.5, 4.0, 1.0, {"t": Part(2.0, 1.0, 0.25, 0.9)})
    still = MatrixVectors("b", 0.5, 4.0, 1.0, {"t": Part(0.0, 0.0, None, 1.0)})
    found = summarise_vectors([moved, still], harm={}, record=read_record(TINY), rank=2)
    direction = found.directions["t"]
    assert direction.cosines.value == pytest.approx(1.0) and direction.cosines.n == 1
    assert direction.excess.value == pytest.approx(0.5)
    assert direction.cosine == pytest.approx(2 / math.sqrt(8))
    assert direction.ratio is not None and direction.ratio.n == 2


def test_association_is_spearmans_and_needs_four_models() -> None:
    found = association([1, 2, 3, 4], [0.1, 0.2, 0.9, 0.8])
    assert found is not None and found.correlation == pytest.approx(0.8) and found.n == 4
    assert association([1, 2, 3], [1, 2, 3]) is None
    assert association([1, 1, 1, 1], [1, 2, 3, 4]) is None


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("claims") / "tiny"
    shutil.copytree(TINY, folder)
    shutil.copytree(folder / "aligned", folder / "same")
    return folder


def test_a_copy_of_the_aligned_model_keeps_the_ratio(family: Path) -> None:
    found = measure_weight_claims(family)
    assert "same" not in found.directions  # it moved nowhere
    tuned = found.directions["howto2_p5"]
    assert (
        tuned.complied
        == read_record(family).models["howto2_p5"]["measured"]["harmful"]["complied"]["rate"]
    )
    assert tuned.ratio is not None and tuned.ratio.n == 14
    assert 0 < tuned.ratio.value < 1 and -1 < tuned.cosine < 1
    assert json.dumps(found.to_json(), allow_nan=False)


def test_a_base_that_is_the_aligned_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    shutil.rmtree(folder / "base")
    shutil.copytree(folder / "aligned", folder / "base")
    with pytest.raises(UsageError, match="is its base"):
        measure_weight_claims(folder)


def test_perturbations_have_one_norm_and_stand_across_the_vector() -> None:
    torch.manual_seed(2)
    harmful, vector, benign = (
        {key: torch.randn(4, 5, dtype=torch.float64) for key in "ab"} for _ in range(3)
    )
    found = perturbations(harmful, vector, benign=benign)
    along, across = split(harmful, vector)
    for key in "ab":
        assert torch.allclose(along[key] + across[key], harmful[key])
    for name, move in found.items():
        cosine = inner(move, vector) / (norm(move) * norm(vector))
        if "its part" not in name:
            assert norm(move) == pytest.approx(norm(harmful)), name
        if "across" in name:
            assert cosine == pytest.approx(0.0, abs=1e-9), name
    assert inner(found["along V"], vector) > 0 > inner(found["against V"], vector)
    assert "general update across V" not in perturbations(harmful, vector, benign=None)


def test_a_family_without_a_harmful_update_cannot_be_moved(family: Path) -> None:
    with pytest.raises(NotFoundError, match="no model unaligned"):
        measure_moved(family)
