"""Camera errors by hand, against evo and SciPy, and what they must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
from evo.core import metrics, trajectory
from scipy.spatial.transform import Rotation

from subspace3d.evaluation.pose import PairErrors, pose_auc, relative_pose_errors, relative_poses, trajectory_error


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


def test_rotation_errors_are_those_of_scipy(rng):
    pred, true = random_cameras(rng, 6), random_cameras(rng, 6)
    first, second = np.triu_indices(6, k=1)
    turns = [Rotation.from_matrix(extrinsics[:, :, :3]) for extrinsics in (pred, true)]
    relative = [turn[second] * turn[first].inv() for turn in turns]
    expected = np.degrees((relative[0] * relative[1].inv()).magnitude())
    np.testing.assert_allclose(relative_pose_errors(pred, true).rotation_deg, expected, rtol=1e-9)


def test_area_under_the_accuracy_curve_by_hand():
    errors = PairErrors(np.array([0.5, 7.0, 10.0]), np.array([3.2, 2.0]), np.array([True, False, True]))
    # of two pairs with a baseline the worse errors are 3.2 and 10: counted from 4 and from 11 degrees on
    assert pose_auc(errors, 5) == pytest.approx(2 / 2 / 5)
    assert pose_auc(errors, 15) == pytest.approx((12 + 5) / 2 / 15)
    perfect = PairErrors(np.zeros(1), np.zeros(1), np.ones(1, bool))
    assert pose_auc(perfect, 30) == 1.0
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pose_auc(errors, 0)
    with pytest.raises(ValueError, match="true baseline, got none of 1"):
        pose_auc(PairErrors(np.zeros(1), np.zeros(0), np.zeros(1, bool)), 5)


def test_area_is_that_of_a_cumulated_histogram(rng):
    errors = PairErrors(rng.uniform(0, 40, size=100), rng.uniform(0, 40, size=100), np.ones(100, bool))
    counts, _ = np.histogram(np.maximum(errors.rotation_deg, errors.translation_deg), bins=np.arange(31))
    assert pose_auc(errors, 30) == pytest.approx(np.mean(np.cumsum(counts / 100)))


def centres_of(extrinsics: np.ndarray) -> np.ndarray:
    return -np.einsum("sji,sj->si", extrinsics[:, :, :3], extrinsics[:, :, 3])


def test_trajectory_and_rotation_errors_are_those_of_evo(rng):
    true = random_cameras(rng, 8)
    pred = cameras(
        Rotation.from_rotvec(0.2 * rng.normal(size=(8, 3))).as_matrix() @ true[:, :, :3],
        3 * centres_of(true) + 0.3 * rng.normal(size=(8, 3)),
    )
    paths = []
    for extrinsics in (true, pred):
        poses = np.tile(np.eye(4), (8, 1, 1))
        poses[:, :3] = extrinsics
        paths.append(trajectory.PosePath3D(poses_se3=[np.linalg.inv(pose) for pose in poses]))

    relative = metrics.RPE(metrics.PoseRelation.rotation_angle_deg, delta=1, delta_unit=metrics.Unit.frames)
    relative.process_data(tuple(paths))
    first, second = np.triu_indices(8, k=1)
    found = relative_pose_errors(pred, true).rotation_deg[second - first == 1]
    np.testing.assert_allclose(found, relative.error, rtol=1e-6)

    paths[1].align(paths[0], correct_scale=True)
    absolute = metrics.APE(metrics.PoseRelation.translation_part)
    absolute.process_data(tuple(paths))
    expected = absolute.get_statistic(metrics.StatisticsType.rmse)
    assert trajectory_error(centres_of(pred), centres_of(true)) == pytest.approx(expected, rel=1e-9)


def test_a_trajectory_on_one_line_is_refused():
    line = np.arange(4.0)[:, None] * [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="span at least a plane"):
        trajectory_error(line, line)


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
