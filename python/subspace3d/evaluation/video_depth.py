"""Depth of a whole sequence under the alignments of the video depth benchmarks: scale, scale and shift, none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, masked_depths
from subspace3d.evaluation.depth import is_within
from subspace3d.evaluation.l1_alignment import align_scale_shift

_REWEIGHTINGS = 10
_LEAST_RESIDUAL = 1e-8
_LEAST_SCALE = 1e-3


def reweighted_scale(pred: Array, true: Array) -> float:
    """``argmin_s sum |s pred - true|`` by ten steps of reweighted least squares, at least 1e-3.

    ``s_0 = mean true / mean pred``, then ``w = 1 / (|s pred - true| + 1e-8)``, ``s = sum w pred true / sum w pred^2``:
    the scale of CUT3R's evaluation, which ends near the minimum (a weighted median) and not in it.

    Args:
        pred (Array): [n] predicted depths.
        true (Array): [n] true depths.
    """
    scale = float(true.mean() / pred.mean())
    for _ in range(_REWEIGHTINGS):
        weights = 1.0 / (np.abs(scale * pred - true) + _LEAST_RESIDUAL)
        weighted = weights * pred
        scale = float((weighted @ true) / (weighted @ pred))
    return max(scale, _LEAST_SCALE)


def video_depth_errors(
    pred: Array, true: Array, mask: NDArray[np.bool_], most_depth: float | None = None, metre: float = 1.0
) -> dict[str, tuple[float, float]]:
    """Relative error and share within 1.25 of one sequence, by alignment.

    ``scale``: one s, `reweighted_scale`. ``scale_shift``: one s and one t of least ``sum |s pred + t - true|``, the
    global minimum. ``metric``: the prediction, taken for metres. An aligned depth counts as ``most_depth`` where it is
    beyond; one that is not positive never counts as within.

    Args:
        pred (Array): [S, H, W] predicted z-depth.
        true (Array): [S, H, W] true z-depth.
        mask (NDArray[np.bool_]): [S, H, W], pixels that count, of those with true depth below ``most_depth``.
        most_depth (float | None): in the unit of ``true``; none: no limit.
        metre (float): in the unit of ``true``.

    Returns:
        dict: alignment -> (``mean |d - true| / true``, ``mean [max(d / true, true / d) < 1.25]``).

    Raises:
        ValueError: as `masked_depths`; or the mean prediction is 0.
    """
    if most_depth is not None:
        mask = mask & (true < most_depth)
    predicted, truth = masked_depths(pred, true, mask)
    if predicted.mean() == 0:
        raise ValueError("pred must not have mean 0 where mask holds")
    fit = align_scale_shift(predicted[:, None], truth[:, None])
    aligned = {
        "scale": reweighted_scale(predicted, truth) * predicted,
        "scale_shift": fit.apply(predicted[:, None])[:, 0],
        "metric": metre * predicted,
    }
    errors = {}
    for name, depth in aligned.items():
        if most_depth is not None:
            depth = np.minimum(depth, most_depth)
        errors[name] = float(np.mean(np.abs(depth - truth) / truth)), float(np.mean(is_within(depth, truth)))
    return errors
