"""SafePatching: hand example, supports, SNIP from autograd, ascent that stops, real repairs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.subspace_support import matrix
from support.training_support import (
    DRIFTED,
    SUITES,
    Notes,
    encoded,
    live,
    repair_tiny,
    rows,
    weights_of,
    write_rows,
)

from realign.errors import SuiteError, UsageError
from realign.repair.edit import Dense, Layer, Unchanged
from realign.repair.methods.safe_patching import SafePatching
from realign.repair.methods.safe_patching_runs import mean_loss, snip_scores
from realign.repair.preparation import NO_STATISTICS, Statistics
from realign.repair.running import LiveModel


@pytest.fixture(scope="module")
def running() -> Iterator[LiveModel]:
    with live(DRIFTED) as model:
        yield model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "harmful.jsonl", rows("harmful", 12))


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_hand_example() -> None:
    method = SafePatching(p=1.0, top_se=0.5, top_osm=0.5, alpha=1.0, beta=0.5)
    edit = method.merged(
        row(1, 2, 3, 4),
        row(4, 3, 2, 1),
        over=row(5, 6, 7, 8),
        over_scores=row(1, 4, 3, 2),
    )
    assert edit.tolist() == [[1.0, 0.0, 3.5, 0.0]]


@given(seed=st.integers(0, 9999), a=st.floats(0, 1), b=st.floats(0, 1))
def test_supports_are_disjoint(seed: int, a: float, b: float) -> None:
    """The safety patch holds 1 and the other 1000: no entry of their sum is both."""
    method = SafePatching(top_se=a, top_osm=b, alpha=1.0, beta=1.0)
    ones = torch.ones(5, 8)
    scores, others = matrix(5, 8, seed=seed).abs(), matrix(5, 8, seed=seed + 1).abs()
    edit = method.merged(ones, scores, over=1000 * ones, over_scores=others)
    assert set(edit.flatten().tolist()) <= {0.0, 1.0, 1000.0}


def test_equal_scores_leave_nothing() -> None:
    scores, patch = matrix(6, 7, seed=0).abs(), matrix(6, 7, seed=1)
    method = SafePatching(top_se=0.4, top_osm=0.4, beta=0.5)
    assert not bool(method.merged(patch, scores, over=2 * patch, over_scores=scores).any())
    same = torch.ones(6, 7)  # equal within a matrix as well: ties fall alike
    assert not bool(method.merged(patch, same, over=patch, over_scores=same).any())


def test_settings_that_can_do_nothing_are_refused() -> None:
    nothing: tuple[dict[str, Any], ...] = ({"alpha": 0.0}, {"p": 0.0}, {"top_se": 0.0})
    for settings in nothing:
        with pytest.raises(UsageError, match="keeps nothing"):
            SafePatching(**settings).check_settings()
    SafePatching(alpha=0.0, beta=0.5).check_settings()
    none = SafePatching(alpha=0.0, beta=0.0)
    assert not bool(none.merged(row(1, 2), row(1, 2), over=row(3, 4), over_scores=row(2, 1)).any())


def test_snip_is_absolute_before_it_is_averaged(running: LiveModel) -> None:
    """Averaged first, gradients of different texts cancel."""
    replies = encoded(running, rows("harmful", 3))
    found = snip_scores(running, replies)
    model = running.loaded.model
    key = running.keys[3]
    weight = model.get_parameter(key)
    grads: list[torch.Tensor] = []
    for reply in replies:
        ids = torch.tensor([reply.ids])
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < reply.start, -100)
        loss = model(input_ids=ids, labels=labels).loss
        (grad,) = torch.autograd.grad(loss, weight)
        grads.append(weight.detach() * grad)
    each = torch.stack(grads)
    assert torch.allclose(found[key], each.abs().mean(0), rtol=1e-3, atol=1e-9)
    assert float(each.mean(0).abs().sum()) < 0.9 * float(found[key].sum())
    assert running.gradient(key) is None


def test_edit_reads_what_was_prepared() -> None:
    layer = Layer(key="w", module="q_proj", layer=0, finetuned=torch.zeros(2, 2))
    delta = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    edit = SafePatching().edit(layer, Statistics(tables={"delta": {"w": delta}}))
    assert isinstance(edit, Dense) and edit.facts["kept_share"] == 0.25
    assert isinstance(SafePatching().edit(layer, NO_STATISTICS), Unchanged)


def patched(output: Path, data: Path, *, seed: int = 0, **settings: Any) -> Any:
    settings = {"lr": 3e-4, "steps": 6, "batch": 4, **settings}
    options: dict[str, Any] = {"harmful_data": data, "aligned": None, "seed": seed}
    return repair_tiny("safe_patching", output, settings=settings, **options)


def test_makes_harmful_answers_less_likely_and_repeats(
    tmp_path: Path, data: Path, running: LiveModel
) -> None:
    outputs = [tmp_path / name for name in ("one", "two")]
    first = patched(outputs[0], data, rise=9.0)
    patched(outputs[1], data, rise=9.0)
    assert weights_of(outputs[0]) == weights_of(outputs[1])
    facts = first.manifest["method_facts"]
    assert facts["safety_steps"] == 6
    assert facts["safety_loss_after"] > facts["safety_loss_before"]
    replies = encoded(running, rows("harmful", 12))
    with live(outputs[0]) as after:
        assert mean_loss(after, replies) > mean_loss(running, replies)
        for key in running.keys:
            share = float((after.weight(key) != running.weight(key)).double().mean())
            assert 0.1 < share < 0.2  # p = .5 of the top .3


def test_other_seeds_give_other_masks(tmp_path: Path, data: Path) -> None:
    for seed in (0, 1):
        patched(tmp_path / str(seed), data, steps=1, seed=seed)
    assert weights_of(tmp_path / "0") != weights_of(tmp_path / "1")


def test_ascent_stops_when_the_loss_has_risen(tmp_path: Path, data: Path) -> None:
    facts = patched(tmp_path / "out", data, rise=0.05, steps=40).manifest["method_facts"]
    assert facts["safety_steps"] < 40
    assert facts["safety_loss_after"] >= facts["safety_loss_before"] + 0.05


def test_the_over_safety_patch_is_never_kept(tmp_path: Path, data: Path) -> None:
    facts = patched(tmp_path / "out", data, beta=0.5).manifest["method_facts"]
    assert facts["over_loss_after"] < facts["over_loss_before"]
    assert not list((tmp_path / "cache-out").glob("safe-patching*"))
    patched(tmp_path / "plain", data)
    assert len(list((tmp_path / "cache-plain").glob("safe-patching*"))) == 1


def test_with_both_patches_the_same_seed_gives_the_same_bytes(tmp_path: Path, data: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        patched(tmp_path / name, data, steps=2, beta=0.5, seed=seed)
    one, two, other = (weights_of(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and one != other


def test_evaluation_on_the_harmful_data_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(SuiteError, match="shares 12 prompts with the suite harmful"):
        repair_tiny(
            "safe_patching",
            tmp_path / "out",
            settings={},
            harmful_data=data,
            suites=[SUITES / "harmful.jsonl"],
        )


class _Interrupting(Notes):
    """Ctrl-C in the middle of a training."""

    def task(self, description: str, *, total: float | None, unit: str = "") -> Any:
        if description == "safety patch":
            raise KeyboardInterrupt
        return super().task(description, total=total, unit=unit)


def test_an_interruption_leaves_nothing(tmp_path: Path, data: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        repair_tiny(
            "safe_patching",
            tmp_path / "out",
            settings={},
            harmful_data=data,
            progress=_Interrupting(),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["cache-out"]
    assert not list((tmp_path / "cache-out").glob("*safe-patching*"))
