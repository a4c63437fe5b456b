"""Camera errors: relative poses of frame pairs, which need no alignment, and the trajectory after a Sim(3)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, Similarity, umeyama

AUC_THRESHOLDS_DEG = (3, 5, 15, 30)
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
    rotation = rotation_angles(pred_rotation, true_rotation)
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


def rotation_angles(first: Array, second: Array) -> Array:
    """Angle in degrees, 0 to 180, by which rotations [n, 3, 3] differ from others, each from its own: [n]."""
    # |R - R*|_F = 2 sqrt(2) sin(angle / 2); unlike arccos of the trace it keeps small angles
    chord = np.linalg.norm(first - second, axis=(1, 2)) / np.sqrt(8.0)
    return np.degrees(2.0 * np.arcsin(np.clip(chord, 0.0, 1.0)))


def _direction_angles(first: Array, second: Array) -> Array:
    """Angle in degrees between rows of [n, 3]; 90 where ``first`` is zero."""
    cross = np.linalg.norm(np.cross(first, second), axis=1)
    angles = np.degrees(np.arctan2(cross, np.einsum("pi,pi->p", first, second)))
    return np.where(np.linalg.norm(first, axis=1) > 0, angles, 90.0)


def step_errors(pred: Array, true: Array) -> tuple[float, float]:
    """Root mean square error of the motion between neighbouring frames: translation, and rotation in degrees.

    The centres are brought onto the true ones by a Sim(3) first, rotations with them; per step the error is
    ``E = (A_i^-1 A_{i+1})^-1 (B_i^-1 B_{i+1})`` of world-from-camera poses A (true) and B (predicted): RPE with a delta
    of one frame.

    Args:
        pred (Array): [S, 3, 4] predicted camera-from-world.
        true (Array): [S, 3, 4] true camera-from-world; the unit of the result.

    Raises:
        ValueError: fewer than 3 cameras, or they stand on one line: see `umeyama`.
    """
    aligned = moved_cameras(pred, umeyama(camera_centres(pred), camera_centres(true)))
    steps = []
    for extrinsics in (true, aligned):
        rotations, centres = extrinsics[:, :, :3], camera_centres(extrinsics)
        turns = rotations[:-1] @ rotations[1:].transpose(0, 2, 1)
        steps.append((turns, np.einsum("sij,sj->si", rotations[:-1], np.diff(centres, axis=0))))
    (true_turns, true_moves), (turns, moves) = steps
    angles = rotation_angles(turns, true_turns)
    distances = np.linalg.norm(moves - true_moves, axis=1)
    return float(np.sqrt(np.mean(distances**2))), float(np.sqrt(np.mean(angles**2)))


def camera_centres(extrinsics: Array) -> Array:
    """``-R^T t`` [S, 3] of camera-from-world ``[R | t]`` [S, 3, 4]."""
    return -np.einsum("sji,sj->si", extrinsics[:, :, :3], extrinsics[:, :, 3])


def moved_cameras(extrinsics: Array, motion: Similarity) -> Array:
    """Camera-from-world [S, 3, 4] in the world after ``motion``: ``R' = R Q^T``, ``t' = -R' (c Q x + u)``, x the
    centre."""
    rotations = extrinsics[:, :, :3] @ motion.rotation.T
    centres = motion.apply(camera_centres(extrinsics))
    return np.concatenate([rotations, -np.einsum("sij,sj->si", rotations, centres)[:, :, None]], axis=2)


def consensus_alignment(pred: Array, true: Array, draws: int = 10, seed: int = 42) -> Similarity:
    """The Sim(3) from predicted to true camera centres that most centres agree with.

    A centre agrees when it lands within h of its partner; h is the median, over the centres after a Sim(3) of all of
    them, of the distance to the nearest true centre. Of ``draws`` Sim(3)s of half the cameras (rounded up, at least 3)
    the one with most agreeing centres, and of equals the one with the least mean distance of those, names them; the
    result is the Sim(3) of the agreeing centres, or that of the draw if they are fewer than 3.

    Args:
        pred (Array): [S, 3] predicted centres.
        true (Array): [S, 3] true centres.
        draws (int): random halves.
        seed (int): of NumPy's default generator.

    Raises:
        ValueError: fewer than 3 cameras, or they stand on one line: see `umeyama`.
    """
    best = umeyama(pred, true)
    gaps = np.linalg.norm(best.apply(pred)[:, None] - true[None], axis=2).min(axis=1)
    reach = float(np.median(gaps))
    rng = np.random.default_rng(seed)
    score, agreeing = (-1, np.inf), None
    for _ in range(draws):
        half = rng.choice(len(pred), size=max(3, (len(pred) + 1) // 2), replace=False)
        try:
            motion = umeyama(pred[half], true[half])
        except ValueError:
            continue
        distances = np.linalg.norm(motion.apply(pred) - true, axis=1)
        near = distances <= reach
        mean = float(distances[near].mean()) if near.any() else np.inf
        if (near.sum(), -mean) > (score[0], -score[1]):
            score, agreeing, best = (int(near.sum()), mean), near, motion
    if agreeing is None or agreeing.sum() < 3:
        return best
    try:
        return umeyama(pred[agreeing], true[agreeing])
    except ValueError:
        return best
