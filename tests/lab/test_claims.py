"""LSSF's two claims: the arithmetic by hand and against dense oracles, then on a shipped family."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from realign.audit.suites import load_suite
from realign.errors import NotFoundError, SuiteError, UsageError
from realign.lab.claim_figures import MatrixClaims, compare, mean_of, summarise
from realign.lab.claims import Claims, measure_claims, refusals
from realign.model.loading import load_model
from realign.model.moments import TokenSequence
from realign.repair.methods.scatter import OutputSpectrum
from realign.subspace.eigen import KnownEigenpairs
from realign.subspace.projector import Isolation, Overlap, isolation

FIXTURES = Path(__file__).parents[2] / "fixtures"
TINY = FIXTURES / "tiny"


def spectrum(energies: list[float], vectors: Tensor) -> OutputSpectrum:
    values = torch.tensor(energies, dtype=torch.float64)
    return OutputSpectrum(KnownEigenpairs(values, vectors), None)


def test_stability_and_isolation_by_hand() -> None:
    e = torch.eye(3, dtype=torch.float64)
    turned = torch.tensor([[1, 0, 0], [0, math.cos(math.pi / 6), -0.5], [0, 0.5, 0.866]])
    a, b = spectrum([3, 2, 1], e), spectrum([5, 4, 0], turned.to(torch.float64))
    found = compare(a, b, 2)
    assert found is not None
    assert found.cosines == pytest.approx((1.0, 0.866025), abs=1e-6)
    assert found.overlap == pytest.approx(0.875)
    assert found.chance == pytest.approx(0.666667, abs=1e-6)
    delta = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    share = isolation(a.basis(2), delta)
    assert (share.share, share.excess) == (pytest.approx(0.1), pytest.approx(0.15))


def test_no_angles_where_the_cut_is_degenerate_and_no_overlap_without_directions() -> None:
    e = torch.eye(3, dtype=torch.float64)
    sharp, blurred = spectrum([3, 2, 1], e), spectrum([3, 2, 2 - 1e-7], e)
    for found in (compare(sharp, blurred, 2), compare(blurred, sharp, 2)):
        assert found is not None
        assert found.cosines is None
        assert found.overlap == pytest.approx(1.0)
    assert compare(sharp, spectrum([3, 0, 0], e), 2) is None
    assert compare(sharp, sharp, 0) is None


def row(general: float | None, safe: float) -> MatrixClaims:
    def part(excess: float | None) -> Isolation:
        return Isolation(None if excess is None else excess / 4, 0.25, excess)

    return MatrixClaims(
        key="k",
        module="q_proj",
        layer=0,
        d_out=8,
        rank=2,
        tokens=9,
        same_text={"tuned": Overlap(None, safe / 4, 0.25), "lost": None},
        other_half={},
        isolation={"general": part(general), "safe_base": part(safe)},
    )


def test_means_leave_out_what_is_missing() -> None:
    found = summarise([row(2.0, 1.0), row(1.0, 3.0), row(None, 2.0)])
    assert found.chance.value == 0.25
    assert set(found.same_text) == {"tuned"}
    assert found.same_text["tuned"].value == pytest.approx(0.5)
    assert found.excess["general"].value == pytest.approx(1.5)
    assert found.excess["general"].n == 2
    assert found.excess["safe_base"].n == 3
    # Ratios per matrix, not of the means: (1/2 + 3/1) / 2.
    assert found.over_general["safe_base"].value == pytest.approx(1.75)
    assert found.over_general["safe_base"].n == 2
    assert "general" not in found.over_general


def test_an_interval_holds_its_mean_and_narrows_with_more_matrices() -> None:
    values = torch.rand(400, generator=torch.Generator().manual_seed(1)).tolist()
    few, many = mean_of(values[:10]), mean_of(values)
    for found in (few, many):
        assert found.low < found.value < found.high
    assert many.high - many.low < 0.4 * (few.high - few.low)
    assert mean_of([0.5]) == mean_of([0.5, 0.5][:1])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny family with a copy of its aligned model as one more "fine-tune"."""
    folder = tmp_path_factory.mktemp("claims") / "tiny"
    shutil.copytree(TINY, folder)
    shutil.copytree(folder / "aligned", folder / "same")
    return folder


@pytest.fixture(scope="module")
def claims(family: Path) -> Claims:
    return measure_claims(family, general=family / "howto2_p5")


def test_an_identical_model_overlaps_wholly_and_has_no_delta(claims: Claims) -> None:
    for matrix in claims.matrices:
        same = matrix.same_text["same"]
        assert same is not None
        assert same.overlap == pytest.approx(1.0, abs=1e-9)
        assert matrix.isolation["task_same"] == Isolation(None, matrix.rank / matrix.d_out, None)
        assert matrix.other_half["same"] == matrix.other_half["aligned"]
    assert "task_same" not in claims.whole.share


def test_every_matrix_of_the_family_has_every_figure(claims: Claims) -> None:
    assert len(claims.matrices) == 14
    assert set(claims.layers) == {"0", "1"}
    assert claims.anchors_refused <= claims.anchors_asked == 128
    assert set(claims.whole.same_text) == {"base", "general", "howto2_p5", "same"}
    assert set(claims.whole.other_half) == {"aligned", *claims.whole.same_text}
    assert set(claims.whole.share) == {"safe_base", "general", "task_howto2_p5"}
    for matrix in claims.matrices:
        assert 0 < matrix.rank < matrix.d_out
        general, task = matrix.isolation["general"], matrix.isolation["task_howto2_p5"]
        assert general == task  # the same model under two names
        assert general.share is not None
        assert 0.0 < general.share < 1.0
    for mean in (*claims.whole.same_text.values(), *claims.whole.other_half.values()):
        assert claims.whole.chance.high < mean.low <= mean.value <= mean.high <= 1.0 + 1e-9


def test_two_runs_are_equal_and_the_result_is_json(family: Path, claims: Claims) -> None:
    again = measure_claims(family, general=family / "howto2_p5")
    text = json.dumps(claims.to_json(), allow_nan=False)
    assert json.dumps(again.to_json(), allow_nan=False) == text
    assert json.loads(text)["schema"] == "realign/lab-claims/1"


def _asked_words(tokenizer: Any, half: Iterable[TokenSequence]) -> set[str]:
    """Words of the prompts; a small model may name another entity in its refusal."""
    prompts = [[i for i, kept in zip(x.ids, x.keep, strict=True) if not kept] for x in half]
    return {word for ids in prompts for word in tokenizer.decode(ids).split()}


def test_the_halves_share_no_entity() -> None:
    suite = load_suite(TINY / "suites" / "anchors.jsonl")
    with load_model(TINY / "aligned", device="cpu") as loaded:
        texts = refusals(loaded, suite, tokens="response")
        halves = [_asked_words(loaded.tokenizer, half) for half in texts.halves]
        with pytest.raises(SuiteError, match="of 15 anchors"):
            refusals(loaded, suite.limited(15), tokens="response")
    names = {item.cluster for item in suite.items if item.cluster}
    first, second = (words & names for words in halves)
    assert first
    assert second
    assert not first & second
    sizes = [len(half) for half in texts.halves]
    assert min(sizes) > 0.3 * sum(sizes)


def test_what_is_missing_is_named(family: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="both_p7"):
        measure_claims(family, finetunes=["both_p7"])
    with pytest.raises(NotFoundError, match="nowhere"):
        measure_claims(family, general=tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="no laboratory family"):
        measure_claims(tmp_path)
    with pytest.raises(UsageError, match="no fine-tune"):
        measure_claims(family, finetunes=["base"])
