"""Depth errors over the valid pixels of a sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, masked_depths


def absolute_relative(pred: Array, true: Array, mask: NDArray[np.bool_]) -> float:
    """``mean_mask |pred - true| / true``.

    Args:
        pred (Array): predicted z-depth, any shape, in the unit of ``true``.
        true (Array): true z-depth, same shape, positive where ``mask`` holds.
        mask (NDArray[np.bool_]): same shape, pixels that count.

    Raises:
        ValueError: shapes differ, the mask is empty, or a masked value is not finite or a true one not positive.
    """
    predicted, truth = masked_depths(pred, true, mask)
    return float(np.mean(np.abs(predicted - truth) / truth))


def delta_share(pred: Array, true: Array, mask: NDArray[np.bool_], threshold: float = 1.25) -> float:
    """``mean_mask [max(pred / true, true / pred) < threshold]``; a prediction that is not positive never counts.

    Args:
        pred (Array): predicted z-depth, any shape, in the unit of ``true``.
        true (Array): true z-depth, same shape, positive where ``mask`` holds.
        mask (NDArray[np.bool_]): same shape, pixels that count.
        threshold (float): largest ratio, above 1.

    Raises:
        ValueError: ``threshold`` is not above 1, or as `absolute_relative`.
    """
    if not threshold > 1:
        raise ValueError(f"threshold must be above 1, got {threshold}")
    predicted, truth = masked_depths(pred, true, mask)
    # products instead of quotients: no division by a zero prediction
    return float(np.mean((predicted < threshold * truth) & (truth < threshold * predicted)))
