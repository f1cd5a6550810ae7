"""VISAGE in its readings, on curves whose numbers are known."""

from __future__ import annotations

import pytest

from realign.audit.visage import (
    basin_asymmetry,
    basin_window,
    coherence_interval,
    visage_gated,
    visage_logodds,
    visage_points,
    visage_window,
)
from realign.subspace.directions import grid

GRID = grid(-0.5, 0.5, 21)
S = [100, 100, 100, 80, 20, 5, 2, 1, 0, 0, 0, 0, 0, 1, 3, 6, 25, 100, 70, 100, 100]
H = [0, 0, 5, 30, 15, 5, 2, 1, 0, 0, 0, 0, 0, 1, 3, 6, 20, 40, 10, 0, 0]
COHERENT = [0, 5, 20, 60, 95, 98, *[100] * 9, 99, 90, 55, 30, 10, 0]


def test_the_two_published_readings() -> None:
    assert visage_points([S]) == pytest.approx(85.8, abs=1e-6)
    assert basin_window(S) == (3, 18)
    assert visage_window([S]) == pytest.approx(80.4375, abs=1e-6)


def test_the_gated_reading_and_its_interval() -> None:
    assert visage_gated([H], [COHERENT]) == pytest.approx(95.923077, abs=1e-6)
    assert coherence_interval(GRID, [COHERENT]) == (-0.3, 0.3)
    narrower = [100 if abs(alpha) < 0.13 else 10 for alpha in GRID]
    assert coherence_interval(GRID, [COHERENT, narrower]) == (-0.1, 0.1)
    assert coherence_interval(GRID, [[10.0] * 21]) is None
    assert visage_gated([H], [[79.9] * 21]) is None


def test_models_without_a_basin_and_without_an_edge() -> None:
    assert visage_points([[100.0] * 21]) == visage_window([[100.0] * 21]) == 0.0
    assert basin_window([0.0] * 21) == (0, 20)
    assert visage_points([[0.0] * 21]) == visage_window([[0.0] * 21]) == 100.0


def test_points_are_pooled_and_windows_averaged() -> None:
    narrow = [100.0] * 10 + [0.0] + [100.0] * 10
    assert visage_points([narrow, [50.0] * 21]) == pytest.approx((100 + 21 * 50) / 22)
    # Nothing opens before the middle in `narrow`: its window is the whole grid.
    assert visage_window([narrow, [50.0] * 21]) == pytest.approx((100 / 21 + 50) / 2)


def test_the_reading_without_generation_skips_broken_points() -> None:
    assert visage_logodds([[90.0, None, 50.0], [10.0, None, None]]) == 50.0
    assert visage_logodds([[None, None]]) is None


def test_the_asymmetry_of_the_basin() -> None:
    alphas = (-1.0, -0.5, 0.0, 0.5, 1.0)
    along = [40.0, 10.0, 0.0, 0.0, 0.0]
    across = [60.0, 20.0, 0.0, 30.0, 70.0]
    assert basin_asymmetry(alphas, along, [across]) == pytest.approx((15.0, 50.0))
    other = [value + 6 for value in across]
    assert basin_asymmetry(alphas, along, [across, other]) == pytest.approx((18.0, 53.0))
