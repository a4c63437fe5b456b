"""Scale and shift of least absolute error: by hand, against a linear program, against every anchor."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.optimize import linprog

from subspace3d.evaluation.l1_alignment import align_scale_shift


def cost_of(scale: float, shift: np.ndarray, source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    return float(weights @ np.abs(scale * source + shift - target).sum(axis=1))


def least_cost_by_linear_program(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    """min sum w e with -e <= s x + t - y <= e."""
    count, dims = source.shape
    fitted = np.zeros((count * dims, 1 + dims))
    fitted[:, 0] = source.ravel()
    fitted[:, 1:] = np.tile(np.eye(dims), (count, 1))
    slack = np.eye(count * dims)
    result = linprog(
        np.concatenate([np.zeros(1 + dims), np.repeat(weights, dims)]),
        np.block([[fitted, -slack], [-fitted, -slack]]),
        np.concatenate([target.ravel(), -target.ravel()]),
        bounds=[(None, None)] * (1 + dims) + [(0, None)] * (count * dims),
    )
    return float(result.fun)


def least_cost_over_anchors(source: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    """MoGe's search: t such that one point lies on its partner, s by trying every ratio of the others."""
    costs = []
    for x, y in zip(source, target):
        offsets, wanted = source - x, target - y
        ratios = wanted[offsets != 0] / offsets[offsets != 0]
        costs += [cost_of(ratio, y - ratio * x, source, target, weights) for ratio in ratios]
    return min(costs)


def test_an_outlier_does_not_move_the_line():
    source, target = np.arange(5.0)[:, None], np.array([[1.0], [3], [5], [7], [100]])
    fit = align_scale_shift(source, target)
    assert (fit.scale, fit.shift[0]) == pytest.approx((2, 1))
    assert (fit.cost, fit.bound) == pytest.approx((91, 91))
    # unless its weight says otherwise: the last two points then carry the line
    assert align_scale_shift(source, target, np.array([0, 0, 0, 1.0, 9])).scale == pytest.approx(93)


@pytest.mark.parametrize(("count", "dims"), [(2, 1), (7, 1), (8, 1), (2, 3), (9, 3), (20, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_cost_is_that_of_the_linear_program(rng, count, dims, weighted):
    source, target = rng.normal(size=(2, count, dims))
    weights = rng.uniform(size=count) if weighted else np.ones(count)
    fit = align_scale_shift(source, target, weights if weighted else None)
    # the solver's own tolerance is 1e-7 of its constraints
    assert fit.cost == pytest.approx(least_cost_by_linear_program(source, target, weights), abs=1e-6)
    assert fit.cost == pytest.approx(cost_of(fit.scale, fit.shift, source, target, weights), rel=1e-12, abs=1e-12)
    # certified to 1e-12 of the cost without a fit, which is below 10 per coordinate here
    assert 0 <= fit.cost - fit.bound < 1e-11 * count * dims


def test_no_anchor_costs_less(rng):
    source, target = rng.normal(size=(2, 12, 3)) + [0, 0, 3]
    weights = 1 / np.linalg.norm(target, axis=1)
    fit = align_scale_shift(source, target, weights)
    assert fit.cost <= least_cost_over_anchors(source, target, weights) * (1 + 1e-12)


@pytest.mark.parametrize("scale", [0.4, -3.0])
def test_an_exact_relation_is_recovered(rng, scale):
    source = rng.normal(size=(500, 3))
    fit = align_scale_shift(source, scale * source + [1, -2, 3], rng.uniform(size=500))
    assert fit.scale == pytest.approx(scale, rel=1e-11)
    np.testing.assert_allclose(fit.shift, [1, -2, 3], atol=1e-10)
    np.testing.assert_allclose(fit.apply(source), scale * source + [1, -2, 3], atol=1e-10)


def test_many_ties_of_a_quantised_map_end_at_the_minimum(rng):
    source = np.round(rng.uniform(1, 4, size=(2000, 1)), 1)
    target = np.round(2 * source + rng.normal(size=source.shape), 1)
    fit = align_scale_shift(source, target)
    ones = np.ones(2000)
    for scale in fit.scale + np.array([-1e-3, 1e-3, -0.1, 0.1]):
        assert fit.cost <= cost_of(scale, np.median(target - scale * source), source, target, ones) + 1e-9


def test_a_source_without_spread_fits_the_median():
    fit = align_scale_shift(np.full((5, 1), 3.0), np.array([[1.0], [2], [3], [4], [50]]))
    assert (fit.scale, fit.shift.tolist(), fit.cost) == (0.0, [3.0], 51.0)
    assert align_scale_shift(np.array([[1.0]]), np.array([[7.0]])).apply(np.array([[1.0]])).tolist() == [[7.0]]


@pytest.mark.parametrize(
    ("source", "target", "weights", "message"),
    [
        (np.ones((3, 1)), np.ones((4, 1)), None, r"\[n >= 1, D\], got \(3, 1\) and \(4, 1\)"),
        (np.ones((0, 1)), np.ones((0, 1)), None, r"\[n >= 1, D\]"),
        (np.full((2, 1), np.nan), np.ones((2, 1)), None, "source must be finite, got 2 of 2"),
        (np.ones((2, 1)), np.full((2, 1), np.inf), None, "target must be finite, got 2 of 2"),
        (np.ones((2, 1)), np.ones((2, 1)), np.ones(3), r"weights must be \[2\], got \(3,\)"),
        (np.ones((2, 1)), np.ones((2, 1)), np.array([1.0, -1.0]), "weights must be finite, not negative"),
        (np.ones((2, 1)), np.ones((2, 1)), np.zeros(2), "weights must be finite, not negative"),
    ],
)
def test_bad_input_is_refused(source, target, weights, message):
    with pytest.raises(ValueError, match=message):
        align_scale_shift(source, target, weights)


def test_a_target_without_spread_is_fitted_by_it_alone(rng):
    target = np.full((6, 1), 3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 0 / 0 of both ends of the bracket
        fit = align_scale_shift(rng.standard_normal((6, 1)), target)
    assert (fit.scale, fit.shift.tolist(), fit.cost, fit.bound) == (0.0, [3.0], 0.0, 0.0)
