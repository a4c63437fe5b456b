"""Depth and point errors over the valid pixels of a sequence, raw and under the alignments that papers use."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, masked_depths
from subspace3d.evaluation.l1_alignment import ScaleShift, align_scale_shift

DELTA_THRESHOLD = 1.25
POINT_THRESHOLD = 0.25
EDGE_JUMP = 0.05
EDGE_REACH = 2  # pixels
FIT_GRID = 64  # the joint fit of scale and translation sees this many rows and columns of each view


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


def delta_share(pred: Array, true: Array, mask: NDArray[np.bool_], threshold: float = DELTA_THRESHOLD) -> float:
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
    return float(np.mean(is_within(predicted, truth, threshold)))


def is_within(pred: Array, true: Array, threshold: float = DELTA_THRESHOLD) -> NDArray[np.bool_]:
    """``max(pred / true, true / pred) < threshold``, each by itself; false where one of them is not positive."""
    # products instead of quotients: no division by zero
    return (pred < threshold * true) & (true < threshold * pred)


def frame_affine_errors(
    pred: Array, true: Array, mask: NDArray[np.bool_], threshold: float = DELTA_THRESHOLD
) -> tuple[float, float, list[ScaleShift], int]:
    """``mean |pred - g| / g`` and ``mean [max(pred / g, g / pred) < threshold]`` with ``g = s_f true + t_f``.

    The protocol of the paper's release: per frame f the truth is fitted to the prediction,
    ``argmin_{s_f, t_f} sum |s_f true + t_f - pred|``, and the prediction is compared with the fitted truth. Where g is
    not positive a relative error has no meaning: such pixels count as outside the threshold and are left out of the
    mean error. Note that the fit forgives a prediction that is flat: with s_f near 0 it has a small error.

    Args:
        pred (Array): [S, H, W] predicted z-depth, any unit.
        true (Array): [S, H, W] true z-depth, positive where ``mask`` holds.
        mask (NDArray[np.bool_]): [S, H, W], pixels that count; frames without any do not.
        threshold (float): largest ratio, above 1.

    Returns:
        tuple: relative error (NaN when g is nowhere positive), share within the threshold, the fit of each frame that
        counts, and the number of pixels where g is not positive.

    Raises:
        ValueError: as `absolute_relative`.
    """
    masked_depths(pred, true, mask)
    fits, errors, within, left_out = [], [], 0, 0
    for frame in np.flatnonzero(mask.any(axis=(1, 2))):
        predicted, truth = masked_depths(pred[frame], true[frame], mask[frame])
        fit = align_scale_shift(truth[:, None], predicted[:, None])
        fitted = fit.apply(truth[:, None])[:, 0]
        positive = fitted > 0
        errors.append(np.abs(predicted - fitted)[positive] / fitted[positive])
        within += int(np.count_nonzero(is_within(predicted, fitted, threshold)))
        left_out += int(np.count_nonzero(~positive))
        fits.append(fit)
    every = np.concatenate(errors)
    return float(every.mean()) if every.size else math.nan, within / int(mask.sum()), fits, left_out


def align_scale_translation(pred: Array, true: Array, chosen: NDArray[np.bool_] | slice = slice(None)) -> ScaleShift:
    """``argmin_{s, t} sum_i |s pred_i + t - true_i|_1 / |true_i|``, s one number, t in R^3: the global minimum.

    MoGe's alignment of a point map that is known up to scale and translation. MoGe takes the best t among those that
    put one point exactly on its partner; the minimum over all t, found here, never costs more.

    Args:
        pred (Array): [n, 3] predicted points in camera coordinates.
        true (Array): [n, 3] true points in camera coordinates, none at the camera.
        chosen (NDArray[np.bool_] | slice): which rows the fit sees.

    Raises:
        ValueError: as `align_scale_shift`, or a true point lies at the camera.
    """
    source, target = np.asarray(pred, np.float64)[chosen], np.asarray(true, np.float64)[chosen]
    distance = np.linalg.norm(target, axis=-1)
    if distance.size and distance.min() <= 0:
        raise ValueError(f"true must not hold the camera itself, got {np.count_nonzero(distance <= 0)} points at 0")
    return align_scale_shift(source, target, 1.0 / distance)


def fit_grid(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of the pixels in ``mask`` [S, H, W] those nearest to a grid of 64 x 64 per view; all of them if none is.

    Returns:
        NDArray[np.bool_]: [number of True in ``mask``], frame by frame, row by row.
    """
    grid = np.zeros(mask.shape, bool)
    rows, columns = (_evenly(size) for size in mask.shape[1:])
    grid[:, rows[:, None], columns] = True
    chosen = grid[mask]
    return chosen if chosen.any() else np.ones(len(chosen), bool)


def _evenly(size: int) -> NDArray[np.intp]:
    if size <= FIT_GRID:
        return np.arange(size)
    return (2 * np.arange(FIT_GRID) + 1) * size // (2 * FIT_GRID)


def point_errors(pred: Array, true: Array, threshold: float = POINT_THRESHOLD) -> tuple[float, float]:
    """``mean |p - q| / |q|`` and ``mean [|p - q| < threshold * min(|p|, |q|)]``, p predicted, q true.

    Args:
        pred (Array): [n, 3] predicted points in camera coordinates, aligned with ``true``.
        true (Array): [n, 3] true points in camera coordinates, none at the camera.
        threshold (float): share of the distance from the camera, positive.

    Raises:
        ValueError: shapes differ or are not [n >= 1, 3], or ``threshold`` is not positive.
    """
    if pred.shape != true.shape or pred.ndim != 2 or pred.shape[1:] != (3,) or len(pred) == 0:
        raise ValueError(f"pred and true must both be [n >= 1, 3], got {pred.shape} and {true.shape}")
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    # for three columns twice as fast as np.linalg.norm
    error, near, far = (np.sqrt(np.einsum("ij,ij->i", value, value)) for value in (pred - true, pred, true))
    return float(np.mean(error / far)), float(np.mean(error < threshold * np.minimum(near, far)))


def edge_recall(
    pred: Array, true: Array, mask: NDArray[np.bool_], jump: float = EDGE_JUMP, reach: int = EDGE_REACH
) -> float:
    """Share of the true discontinuities that have a predicted one at most ``reach`` rows and columns away.

    A pixel is at a discontinuity if the depth of its neighbour to the left, right, above or below is more than
    ``1 + jump`` times its own or less than the inverse; both must be in ``mask``. With ``pred`` and ``true`` exchanged
    it is the share of the predicted discontinuities that are true. It needs no alignment of scale.

    Args:
        pred (Array): [S, H, W] predicted z-depth, any unit; where not positive there is no discontinuity.
        true (Array): [S, H, W] true z-depth.
        mask (NDArray[np.bool_]): [S, H, W], pixels that count.
        jump (float): relative difference from which neighbours are a discontinuity.
        reach (int): pixels.

    Returns:
        float: NaN where the truth has no discontinuity.
    """
    wanted, found = (_edges(np.asarray(depth), mask, jump) for depth in (true, pred))
    near = np.zeros_like(found)
    height, width = found.shape[1:]
    padded = np.pad(found, ((0, 0), (reach, reach), (reach, reach)))
    for row in range(2 * reach + 1):
        for column in range(2 * reach + 1):
            near |= padded[:, row : row + height, column : column + width]
    return float(near[wanted].mean()) if wanted.any() else math.nan


def _edges(depth: Array, mask: NDArray[np.bool_], jump: float) -> NDArray[np.bool_]:
    """Pixels at a discontinuity, [S, H, W]; see `edge_recall`."""
    edges = np.zeros(depth.shape, bool)
    valid = mask & (depth > 0)
    for axis in (1, 2):
        near, far = ([slice(None)] * 3 for _ in range(2))
        near[axis], far[axis] = slice(None, -1), slice(1, None)
        first, second = tuple(near), tuple(far)
        apart = ~is_within(depth[first], depth[second], 1 + jump) & valid[first] & valid[second]
        edges[first] |= apart
        edges[second] |= apart
    return edges
