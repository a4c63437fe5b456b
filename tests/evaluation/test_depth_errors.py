"""Abs Rel and delta by hand."""

from __future__ import annotations

import numpy as np
import pytest

from subspace3d.evaluation.depth import absolute_relative, delta_share

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
