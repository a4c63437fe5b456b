"""Abs Rel, delta and point errors by hand, raw and under each alignment."""

from __future__ import annotations

import numpy as np
import pytest

from subspace3d.evaluation.depth import (
    absolute_relative,
    align_scale_translation,
    delta_share,
    edge_recall,
    fit_grid,
    frame_affine_errors,
    point_errors,
)

TRUE = np.array([[1.0, 2.0], [4.0, 0.0]])
PRED = np.array([[1.1, 1.0], [4.9, 7.0]])
MASK = TRUE > 0


def test_absolute_relative_by_hand():
    assert absolute_relative(PRED, TRUE, MASK) == pytest.approx((0.1 + 0.5 + 0.225) / 3)
    assert absolute_relative(TRUE, TRUE, MASK) == 0.0


def test_delta_share_by_hand():
    # ratios 1.1, 2, 1.225: two of three lie below 1.25
    assert delta_share(PRED, TRUE, MASK) == pytest.approx(2 / 3)
    assert delta_share(PRED, TRUE, MASK, threshold=1.2) == pytest.approx(1 / 3)
    assert delta_share(PRED, TRUE, MASK, threshold=3.0) == 1.0


def test_delta_is_symmetric_and_strict():
    ones = np.ones(2)
    assert delta_share(np.array([1.25, 0.8]), ones, np.ones(2, bool)) == 0.0
    assert delta_share(np.array([1.2499, 0.8001]), ones, np.ones(2, bool)) == 1.0


def test_a_prediction_that_is_not_positive_never_counts():
    assert delta_share(np.array([0.0, -1.0]), np.ones(2), np.ones(2, bool)) == 0.0
    assert absolute_relative(np.array([0.0, -1.0]), np.ones(2), np.ones(2, bool)) == 1.5


def test_threshold_must_be_above_one():
    with pytest.raises(ValueError, match=r"threshold must be above 1, got 1\.0"):
        delta_share(PRED, TRUE, MASK, threshold=1.0)


@pytest.mark.parametrize("function", [absolute_relative, delta_share])
def test_empty_mask_is_refused(function):
    with pytest.raises(ValueError, match="at least one pixel, got none of 4"):
        function(PRED, TRUE, np.zeros_like(MASK))


def test_frames_are_fitted_by_themselves_and_the_truth_to_the_prediction():
    true = np.array([[[1.0, 2, 3, 4, 5]], [[1, 2, 3, 4, 0]], [[0, 0, 0, 0, 0]]])
    pred = np.array([[[3.0, 5, 7, 9, 14]], [[3.5, 4, 4.5, 5, 9]], [[1, 1, 1, 1, 1]]])
    error, share, fits, left_out = frame_affine_errors(pred, true, true > 0)
    # frame 0 lies on 2 d + 1 but for the last pixel, 14 against 11; frame 1 on d / 2 + 3; frame 2 has no depth
    assert [fit.scale for fit in fits] == pytest.approx([2, 0.5])
    assert [fit.shift[0] for fit in fits] == pytest.approx([1, 3])
    assert error == pytest.approx((3 / 11) / 9)
    assert share == pytest.approx(8 / 9)
    assert left_out == 0


def test_a_fitted_truth_that_is_not_positive_has_no_relative_error():
    true = np.arange(1.0, 6.0).reshape(1, 1, 5)
    error, share, _, left_out = frame_affine_errors(true - 2.5, true, true > 0)
    assert error == pytest.approx(0, abs=1e-12)
    assert share == pytest.approx(3 / 5)
    assert left_out == 2
    error, share, _, left_out = frame_affine_errors(-true, true, true > 0)
    assert np.isnan(error)
    assert (share, left_out) == (0, 5)


def test_point_errors_by_hand():
    pred, true = np.array([[1.0, 0, 0], [0, 0, 2]]), np.array([[1.0, 0, 0], [0, 0, 1]])
    assert point_errors(pred, true) == (0.5, 0.5)
    # the smaller of the two distances counts: 1 < 0.6 * 2 is not enough
    assert point_errors(pred, true, threshold=0.6)[1] == 0.5
    assert point_errors(pred, true, threshold=1.1)[1] == 1.0
    with pytest.raises(ValueError, match=r"\[n >= 1, 3\]"):
        point_errors(pred[:0], true[:0])
    with pytest.raises(ValueError, match="threshold must be positive"):
        point_errors(pred, true, threshold=0)


def test_scale_and_translation_are_found_from_part_of_the_points(rng):
    true = rng.normal(size=(200, 3)) + [0, 0, 5]
    pred = (true - [0.1, 0.2, -0.3]) / 2.5
    pred[1::2] = 77
    fit = align_scale_translation(pred, true, np.arange(200) % 2 == 0)
    assert fit.scale == pytest.approx(2.5)
    np.testing.assert_allclose(fit.shift, [0.1, 0.2, -0.3], atol=1e-9)
    with pytest.raises(ValueError, match="camera itself, got 1 points"):
        align_scale_translation(pred, np.concatenate([true[:-1], np.zeros((1, 3))]))


def test_the_fit_sees_a_grid_of_each_view():
    mask = np.ones((2, 128, 256), bool)
    chosen = fit_grid(mask).reshape(mask.shape)
    assert chosen.sum(axis=(1, 2)).tolist() == [64 * 64] * 2
    assert np.flatnonzero(chosen[0].any(axis=1))[:2].tolist() == [1, 3]
    assert np.flatnonzero(chosen[0].any(axis=0))[:2].tolist() == [2, 6]
    # small views count whole, and so does what the grid misses
    assert fit_grid(np.ones((1, 5, 64), bool)).all()
    off_grid = np.zeros((1, 128, 128), bool)
    off_grid[0, ::2, ::2] = True
    assert fit_grid(off_grid).sum() == 64 * 64


def step_at(column: int) -> np.ndarray:
    return np.where(np.arange(14) < column, 1.0, 1.2)[None, None].repeat(5, axis=1)


def test_edge_recall_counts_true_edges_with_a_predicted_one_within_reach():
    true = step_at(7)
    everywhere = np.ones_like(true, bool)
    assert edge_recall(7 * true, true, everywhere) == 1.0
    assert edge_recall(np.ones_like(true), true, everywhere) == 0.0
    # the true edge is at columns 6 and 7; one moved by two reaches both, by three only the nearer one
    for column, share in ((9, 1.0), (10, 0.5), (11, 0.0), (4, 0.5)):
        assert edge_recall(step_at(column), true, everywhere) == share
    ramp = np.broadcast_to(1.04 ** np.arange(14), true.shape)  # no jump above 5 %
    assert edge_recall(ramp, true, everywhere) == 0.0 and np.isnan(edge_recall(true, ramp, everywhere))


def test_edges_need_two_valid_neighbours():
    true = np.ones((2, 5, 5))
    true[1, 2:] = 2.0
    mask = np.ones_like(true, bool)
    assert edge_recall(true, true, mask) == 1.0
    mask[1, 2] = False  # what is next to the jump
    assert np.isnan(edge_recall(true, true, mask))
    # the scale does not matter, nor does the sign of the jump; what is not positive is no edge
    mask[1, 2] = True
    assert edge_recall(-true, true, mask) == 0.0
    assert edge_recall(0.01 / true, true, mask) == 1.0
