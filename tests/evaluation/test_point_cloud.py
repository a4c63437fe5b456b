"""ICP, distances and normals on clouds whose answers are known."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from subspace3d.evaluation.alignment import Similarity
from subspace3d.evaluation.fusion import import_open3d
from subspace3d.evaluation.point_cloud import MovedCloud, PointCloud, icp, subsample, surface_distances


def bumpy_surface(rng: np.random.Generator, count: int = 4000) -> np.ndarray:
    """Points of a height field without any symmetry."""
    x, y = rng.uniform(-1, 1, size=(2, count))
    return np.stack([x, 0.6 * y, 0.3 * np.sin(3 * x + 1) + 0.2 * y**2 + 0.2 * x * y], axis=1)


def sphere(rng: np.random.Generator, radius: float, count: int) -> np.ndarray:
    directions = rng.normal(size=(count, 3))
    return radius * directions / np.linalg.norm(directions, axis=1, keepdims=True)


def grid(step: float, height: float = 0.0) -> np.ndarray:
    axis = np.arange(0, 1 + step / 2, step)
    x, y = np.meshgrid(axis, axis)
    return np.stack([x.ravel(), y.ravel(), np.full(x.size, height)], axis=1)


def test_icp_undoes_a_small_motion(rng):
    target = bumpy_surface(rng)
    turn, shift = Rotation.from_rotvec([0.01, -0.02, 0.015]).as_matrix(), np.array([0.01, 0.005, -0.01])
    source = (target - shift) @ turn  # the inverse motion
    result = icp(source, PointCloud(target), threshold=0.1)
    # the same points, so once pairs are right the motion is exact
    np.testing.assert_allclose(result.motion.rotation, turn, atol=1e-4)
    np.testing.assert_allclose(result.motion.translation, shift, atol=1e-4)
    assert result.fitness == 1.0
    assert result.inlier_rmse < 1e-4


def icp_by_definition(source: np.ndarray, target: np.ndarray, threshold: float) -> tuple[np.ndarray, float, float]:
    """Point-to-point ICP from the identity, with SciPy's tree and SciPy's rotation; Open3D's stopping rule."""
    tree = cKDTree(target)

    def pairs(points):
        distances, nearest = tree.query(points)
        near = distances < threshold
        return near, nearest[near], near.mean(), np.sqrt(np.mean(distances[near] ** 2))

    moved = source
    near, nearest, fitness, rmse = pairs(moved)
    for _ in range(30):
        before = fitness, rmse
        mean_source, mean_target = moved[near].mean(axis=0), target[nearest].mean(axis=0)
        turn, _ = Rotation.align_vectors(target[nearest] - mean_target, moved[near] - mean_source)
        moved = turn.apply(moved - mean_source) + mean_target
        near, nearest, fitness, rmse = pairs(moved)
        if abs(fitness - before[0]) < 1e-6 and abs(rmse - before[1]) < 1e-6:
            break
    return moved, fitness, rmse


def test_icp_follows_its_definition(rng):
    target = bumpy_surface(rng, 3000)
    source = bumpy_surface(rng, 2000) @ Rotation.from_rotvec([0.02, -0.03, 0.02]).as_matrix() + [0.02, 0.03, -0.01]
    moved, fitness, rmse = icp_by_definition(source, target, threshold=0.05)
    result = icp(source, PointCloud(target), threshold=0.05)
    # the same pairs in every iteration, so only round-off is between them
    np.testing.assert_allclose(result.motion.apply(source), moved, atol=1e-9)
    assert result.fitness == pytest.approx(fitness)
    assert result.inlier_rmse == pytest.approx(rmse)
    assert result.motion.scale == 1.0


def test_icp_on_part_of_the_source_finds_the_same_motion(rng):
    target = bumpy_surface(rng)
    shift = np.array([0.01, 0.005, -0.01])
    result = icp(target - shift, PointCloud(target), threshold=0.1, max_source_points=1000)
    np.testing.assert_allclose(result.motion.translation, shift, atol=1e-3)


def test_icp_without_pairs_does_not_move(rng):
    target = bumpy_surface(rng, 200)
    result = icp(target + 100, PointCloud(target), threshold=0.1)
    np.testing.assert_array_equal(result.motion.apply(target), target)
    assert result.fitness == 0.0


def test_icp_refuses_a_threshold_that_is_not_positive(rng):
    with pytest.raises(ValueError, match="must be positive, got 0"):
        icp(grid(0.5), PointCloud(grid(0.5)), threshold=0)


def test_distances_by_hand():
    # the prediction lies 0.1 above the truth, and misses its second half: distance 1 from x = 1 + i to x = 1
    true = PointCloud(np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]))
    pred = PointCloud(np.array([[0.0, 0, 0.1], [1, 0, 0.1]]))
    result = surface_distances(pred, true)
    complete = [0.1, 0.1, np.hypot(1, 0.1), np.hypot(3, 0.1)]
    assert result["accuracy"] == pytest.approx(0.1)
    assert result["accuracy_median"] == pytest.approx(0.1)
    assert result["completeness"] == pytest.approx(np.mean(complete))
    assert result["completeness_median"] == pytest.approx(np.median(complete))
    assert result["chamfer"] == pytest.approx((0.1 + np.mean(complete)) / 2)


def test_concentric_spheres(rng):
    result = surface_distances(PointCloud(sphere(rng, 1.1, 20_000)), PointCloud(sphere(rng, 1.0, 20_000)))
    # d^2 = 0.1^2 + 1.1 c^2 with the chord c to the nearest of n random directions, mean c^2 = 4 / n = 2e-4,
    # so that mean d < sqrt(0.01022) = 0.1011; the last digit is left to chance
    assert 0.1 <= result["accuracy"] < 0.1012
    assert 0.1 <= result["completeness"] < 0.1012
    # both normals tilt by about the distance to the 30th neighbour over the radius at most, so cos > 0.99
    assert result["normal_consistency"] > 0.99


def test_planes_at_an_angle():
    flat = grid(0.02)
    angle = np.radians(35)
    tilted = flat @ Rotation.from_euler("x", -35, degrees=True).as_matrix()
    assert surface_distances(PointCloud(flat + [0, 0, 0.01]), PointCloud(flat))["normal_consistency"] == pytest.approx(
        1
    )
    assert surface_distances(PointCloud(tilted), PointCloud(flat))["normal_consistency"] == pytest.approx(np.cos(angle))


def test_normals_are_those_of_open3d(rng):
    open3d = import_open3d()
    points = bumpy_surface(rng) + 0.01 * rng.normal(size=(4000, 3))
    reference = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    reference.estimate_normals(open3d.geometry.KDTreeSearchParamKNN(30))
    chosen = np.arange(0, 4000, 3)
    agreement = np.einsum("ij,ij->i", PointCloud(points).normals(chosen), np.asarray(reference.normals)[chosen])
    np.testing.assert_allclose(np.abs(agreement), 1.0, atol=1e-6)


def test_distances_are_those_of_open3d(rng):
    open3d = import_open3d()
    pred, true = bumpy_surface(rng, 500), bumpy_surface(rng, 700)
    clouds = [open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points)) for points in (pred, true)]
    result = surface_distances(PointCloud(pred), PointCloud(true))
    assert result["accuracy"] == pytest.approx(np.mean(clouds[0].compute_point_cloud_distance(clouds[1])))
    assert result["completeness"] == pytest.approx(np.mean(clouds[1].compute_point_cloud_distance(clouds[0])))


def test_normal_consistency_of_both_directions_is_that_of_open3d(rng):
    open3d = import_open3d()
    pred, true = (bumpy_surface(rng, count) + 0.01 * rng.normal(size=(count, 3)) for count in (900, 1300))
    normals = []
    for points in (pred, true):
        cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
        cloud.estimate_normals()
        normals.append(np.asarray(cloud.normals))
    result = surface_distances(PointCloud(pred), PointCloud(true))
    directions = {
        "normal_consistency_accuracy": np.einsum("ij,ij->i", normals[0], normals[1][cKDTree(true).query(pred)[1]]),
        "normal_consistency_completeness": np.einsum("ij,ij->i", normals[1], normals[0][cKDTree(pred).query(true)[1]]),
    }
    for name, agreement in directions.items():
        assert result[name] == pytest.approx(np.abs(agreement).mean(), abs=1e-6), name
    assert result["normal_consistency"] == pytest.approx(sum(result[name] for name in directions) / 2)
    assert result["normal_consistency_accuracy"] != result["normal_consistency_completeness"]


def test_means_over_evenly_spaced_queries_are_close_to_the_full_ones(rng):
    pred, true = (
        PointCloud(bumpy_surface(rng, 6000) + 0.02 * rng.normal(size=(6000, 3))),
        PointCloud(bumpy_surface(rng)),
    )
    full, part = surface_distances(pred, true), surface_distances(pred, true, most_queries=1500)
    for name in ("accuracy", "completeness", "normal_consistency"):
        # the spread of these values is below their mean, so 3 / sqrt(1500) bounds three standard errors
        assert part[name] == pytest.approx(full[name], rel=3 / np.sqrt(1500)), name


def test_a_cloud_of_fewer_points_than_neighbours_has_normals():
    np.testing.assert_allclose(np.abs(PointCloud(grid(0.5)).normals(np.array([0, 8]))[:, 2]), 1.0)


def test_a_moved_cloud_is_the_cloud_of_the_moved_points(rng):
    cloud, chosen = PointCloud(bumpy_surface(rng, 500)), np.arange(0, 500, 7)
    motion = Similarity(2.5, Rotation.random(random_state=1).as_matrix(), np.array([1.0, -2.0, 3.0]))
    moved, made = MovedCloud(cloud, motion), PointCloud(motion.apply(cloud.points))
    queries = made.points[::3] + 0.1 * rng.normal(size=(len(made.points[::3]), 3))
    for got, expected in zip(moved.nearest(queries), made.nearest(queries)):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moved.at(chosen), made.points[chosen])
    agreement = np.einsum("ij,ij->i", moved.normals(chosen), made.normals(chosen))
    np.testing.assert_allclose(np.abs(agreement), 1.0, rtol=1e-9)


def test_normals_do_not_depend_on_what_was_asked_for_before(rng):
    points = bumpy_surface(rng, 300)
    asked_twice, everything = PointCloud(points), PointCloud(points).normals(np.arange(300))
    first, repeated = np.array([5, 250, 5]), np.array([250, 7, 299, 5])
    for indices in (first, repeated):
        np.testing.assert_array_equal(asked_twice.normals(indices), everything[indices])


@pytest.mark.parametrize("points", [np.zeros((0, 3)), np.zeros((4, 2)), np.array([[0.0, 0, np.nan]])])
def test_bad_clouds_are_refused(points):
    with pytest.raises(ValueError, match="points must be"):
        PointCloud(points)


def test_subsample_is_even_and_complete():
    assert subsample(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert subsample(10, 5).tolist() == [0, 2, 4, 6, 8]


def test_missing_open3d_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(ImportError, match=r"subspace3d\[eval\]"):
        import_open3d()


def test_missing_system_library_names_the_packages(monkeypatch, tmp_path):
    (tmp_path / "open3d.py").write_text(
        "raise OSError('libusb-1.0.so.0: cannot open shared object file: No such file or directory')"
    )
    monkeypatch.delitem(sys.modules, "open3d", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"libusb-1\.0\.so\.0.*apt-get install -y libusb-1\.0-0 libgl1"):
        import_open3d()
