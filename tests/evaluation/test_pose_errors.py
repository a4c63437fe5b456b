"""Relative camera errors by hand, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from subspace3d.evaluation.pose import relative_pose_errors, relative_poses


def cameras(rotations: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Camera-from-world [S, 3, 4] of cameras at ``centres``."""
    translations = -np.einsum("sij,sj->si", rotations, centres)
    return np.concatenate([rotations, translations[..., None]], axis=2)


def random_cameras(rng: np.random.Generator, count: int) -> np.ndarray:
    return cameras(Rotation.random(count, rng).as_matrix(), rng.normal(size=(count, 3)))


def test_errors_by_hand():
    still = np.stack([np.eye(3)] * 3)
    true = cameras(still, np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]))
    turned = still.copy()
    turned[2] = Rotation.from_euler("z", 30, degrees=True).as_matrix()
    # camera 1 stands 45 degrees off and twice as far; camera 2 is turned about itself
    pred = cameras(turned, np.array([[0.0, 0, 0], [2, 2, 0], [0, 1, 0]]))
    errors = relative_pose_errors(pred, true)
    np.testing.assert_allclose(errors.rotation_deg, [0, 30, 30], atol=1e-6)
    # pair (1, 2): true direction (-1, 1), predicted (-2, -1) turned by +30 degrees in camera 2
    third = np.degrees(np.arctan2(-1, -2) - np.arctan2(1, -1)) % 360 + 30
    np.testing.assert_allclose(errors.translation_deg, [45, 30, min(third, 360 - third)], atol=1e-6)


def test_small_and_largest_angles_are_exact():
    true = cameras(np.stack([np.eye(3)] * 2), np.array([[0.0, 0, 0], [1, 0, 0]]))
    for angle in (1e-6, 1e-3, 1.0, 90.0, 179.9):
        pred = true.copy()
        pred[1, :, :3] = Rotation.from_euler("y", angle, degrees=True).as_matrix()
        assert relative_pose_errors(pred, true).rotation_deg[0] == pytest.approx(angle, rel=1e-6)
    opposite = cameras(np.stack([np.eye(3)] * 2), np.array([[0.0, 0, 0], [-1, 0, 0]]))
    assert relative_pose_errors(opposite, true).translation_deg[0] == pytest.approx(180)


def test_world_frame_and_scale_do_not_matter(rng):
    true = random_cameras(rng, 5)
    turn, shift = Rotation.random(None, rng).as_matrix(), rng.normal(size=3)
    moved = np.concatenate([true[:, :, :3] @ turn, (true[:, :, :3] @ shift + true[:, :, 3])[..., None] * 3], axis=2)
    errors = relative_pose_errors(moved, true)
    assert errors.rotation_deg.shape == errors.translation_deg.shape == (10,)
    assert errors.rotation_deg.max() < 1e-6
    # a shift of the world changes t_i by R_i s, which cancels in t_ij but for round-off
    assert errors.translation_deg.max() < 1e-6


def test_relative_poses_take_camera_i_to_camera_j(rng):
    extrinsics, point = random_cameras(rng, 3), rng.normal(size=3)
    rotations, translations = relative_poses(extrinsics)
    seen = extrinsics[:, :, :3] @ point + extrinsics[:, :, 3]
    for pair, (first, second) in enumerate([(0, 1), (0, 2), (1, 2)]):
        np.testing.assert_allclose(rotations[pair] @ seen[first] + translations[pair], seen[second], atol=1e-12)


def test_pairs_without_a_true_baseline_are_left_out():
    centres = np.array([[5.0, 0, 0], [5, 0, 0], [6, 0, 0]])
    rotations = Rotation.from_euler("y", [[0], [20], [40]], degrees=True).as_matrix()
    true = cameras(rotations, centres)
    errors = relative_pose_errors(true, true)
    assert errors.rotation_deg.shape == (3,)
    assert errors.translation_deg.shape == (2,)


def test_a_predicted_baseline_of_zero_has_no_direction():
    true = cameras(np.stack([np.eye(3)] * 2), np.array([[0.0, 0, 0], [1, 0, 0]]))
    pred = cameras(np.stack([np.eye(3)] * 2), np.zeros((2, 3)))
    assert relative_pose_errors(pred, true).translation_deg.tolist() == [90.0]


@pytest.mark.parametrize(
    ("pred", "true", "message"),
    [
        (np.zeros((1, 3, 4)), np.zeros((1, 3, 4)), "at least 2 frames, got 1"),
        (np.zeros((2, 4, 4)), np.zeros((2, 4, 4)), r"\[S, 3, 4\]"),
        (np.zeros((2, 3, 4)), np.zeros((3, 3, 4)), r"got \(2, 3, 4\) and \(3, 3, 4\)"),
        (np.full((2, 3, 4), np.nan), np.zeros((2, 3, 4)), "pred must be finite, got 24"),
    ],
)
def test_bad_cameras_are_refused(pred, true, message):
    with pytest.raises(ValueError, match=message):
        relative_pose_errors(pred, true)
