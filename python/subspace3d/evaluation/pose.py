"""Camera errors: relative poses of frame pairs, which need no alignment, and the trajectory after a Sim(3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, umeyama

AUC_THRESHOLDS_DEG = (5, 15, 30)
# A baseline below this share of the longest one is round-off, not a direction.
_NO_BASELINE = 1e-9


@dataclass(frozen=True)
class PairErrors:
    """Errors of all frame pairs i < j, in the order (0, 1), (0, 2), ..., (1, 2), ...

    Args:
        rotation_deg (Array): float64 [pairs], 0 to 180.
        translation_deg (Array): float64 [pairs with a true baseline], 0 to 180; empty when no camera moves.
        moved (NDArray[np.bool_]): [pairs], which pairs have a true baseline.
    """

    rotation_deg: Array
    translation_deg: Array
    moved: NDArray[np.bool_]


def relative_poses(extrinsics: Array) -> tuple[Array, Array]:
    """``R_ij = R_j R_i^T``, ``t_ij = t_j - R_ij t_i``: camera j from camera i, for all i < j.

    Args:
        extrinsics (Array): [S, 3, 4] camera-from-world, OpenCV.

    Returns:
        tuple[Array, Array]: rotations [pairs, 3, 3] and translations [pairs, 3].
    """
    first, second = np.triu_indices(len(extrinsics), k=1)
    rotations, translations = extrinsics[:, :, :3], extrinsics[:, :, 3]
    relative = rotations[second] @ rotations[first].transpose(0, 2, 1)
    return relative, translations[second] - np.einsum("pij,pj->pi", relative, translations[first])


def relative_pose_errors(pred: Array, true: Array) -> PairErrors:
    """``angle(R_ij, R_ij*)`` and ``angle(t_ij, t_ij*)`` in degrees for all frame pairs i < j.

    The translation error compares directions, so it needs no scale; opposite directions are 180 degrees apart (no
    sign ambiguity is granted). A predicted baseline of exactly zero has no direction and counts as 90 degrees.

    Args:
        pred (Array): float64 [S, 3, 4], predicted camera-from-world [R | t], OpenCV.
        true (Array): float64 [S, 3, 4], true camera-from-world [R | t], OpenCV.

    Raises:
        ValueError: shapes differ or are not [S, 3, 4], S < 2, or a value is not finite.
    """
    pred, true = np.asarray(pred, np.float64), np.asarray(true, np.float64)
    if pred.ndim != 3 or pred.shape[1:] != (3, 4) or pred.shape != true.shape:
        raise ValueError(f"pred and true must both be [S, 3, 4], got {pred.shape} and {true.shape}")
    if len(pred) < 2:
        raise ValueError(f"pred must have at least 2 frames, got {len(pred)}")
    for name, value in (("pred", pred), ("true", true)):
        if not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(value))} values that are not")

    pred_rotation, pred_translation = relative_poses(pred)
    true_rotation, true_translation = relative_poses(true)
    # |R - R*|_F = 2 sqrt(2) sin(angle / 2); unlike arccos of the trace it keeps small angles
    chord = np.linalg.norm(pred_rotation - true_rotation, axis=(1, 2)) / np.sqrt(8.0)
    rotation = np.degrees(2.0 * np.arcsin(np.clip(chord, 0.0, 1.0)))

    baseline = np.linalg.norm(true_translation, axis=1)
    # camera positions relative to the world origin set the size of the round-off
    size = max(float(np.abs(true[:, :, 3]).max()), float(baseline.max()))
    moved = baseline > _NO_BASELINE * size
    return PairErrors(rotation, _direction_angles(pred_translation[moved], true_translation[moved]), moved)


def pose_auc(errors: PairErrors, threshold_deg: int) -> float:
    """``mean over t = 1, 2, ..., threshold of the share of pairs with max(rotation, translation error) < t degrees``.

    The area under the curve of accuracy over threshold, in steps of one degree, as relative poses are usually scored.
    Pairs without a true baseline have no translation error and are left out.

    Args:
        errors (PairErrors): of one scene.
        threshold_deg (int): end of the curve, at least 1.

    Raises:
        ValueError: ``threshold_deg`` is below 1, or no true camera moves.
    """
    if threshold_deg < 1:
        raise ValueError(f"threshold_deg must be at least 1, got {threshold_deg}")
    if len(errors.translation_deg) == 0:
        raise ValueError(f"errors must have a pair with a true baseline, got none of {len(errors.moved)}")
    worse = np.maximum(errors.rotation_deg[errors.moved], errors.translation_deg)
    return float(np.mean(worse[:, None] < np.arange(1, threshold_deg + 1)))


def trajectory_error(pred_centres: Array, true_centres: Array) -> float:
    """``sqrt(mean_i |a(x_i) - y_i|^2)``, a the Sim(3) of `umeyama` from predicted to true centres: the ATE.

    Args:
        pred_centres (Array): [S, 3], any world frame and unit.
        true_centres (Array): [S, 3]; their unit is the unit of the result.

    Raises:
        ValueError: fewer than 3 cameras, or they stand on one line: see `umeyama`.
    """
    aligned = umeyama(pred_centres, true_centres).apply(pred_centres)
    return float(np.sqrt(np.mean(np.sum((aligned - true_centres) ** 2, axis=1))))


def _direction_angles(first: Array, second: Array) -> Array:
    """Angle in degrees between rows of [n, 3]; 90 where ``first`` is zero."""
    cross = np.linalg.norm(np.cross(first, second), axis=1)
    angles = np.degrees(np.arctan2(cross, np.einsum("pi,pi->p", first, second)))
    return np.where(np.linalg.norm(first, axis=1) > 0, angles, 90.0)
