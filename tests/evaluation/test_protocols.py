"""Every protocol against its formula, written down a second time with other libraries, on a random prediction."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.analytic_scene import ball_and_wall, write_analytic_scene
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from subspace3d.commands import evaluate as command
from subspace3d.commands.evaluate import EvaluateConfig
from subspace3d.evaluation import protocol_metrics, protocols
from subspace3d.evaluation.alignment import umeyama
from subspace3d.evaluation.fusion import fuse, import_open3d, one_per_voxel, spread_points
from subspace3d.evaluation.pose import consensus_alignment, moved_cameras, step_errors, trajectory_error
from subspace3d.evaluation.protocol_metrics import Measured, auc, dtu_overall, f_scores, pair_errors, thinned
from subspace3d.evaluation.protocols import PROTOCOLS
from subspace3d.evaluation.scene_metrics import Views
from subspace3d.evaluation.table import QUANTITIES
from subspace3d.evaluation.video_depth import reweighted_scale, video_depth_errors
from subspace3d.formats.scene import write_scene


def random_prediction(rng: np.random.Generator, true: Views, noise: float = 0.02) -> Views:
    """Truth with noise on depths and cameras, in another world and unit."""
    depths = true.depths / 3 * (1 + noise * rng.standard_normal(true.depths.shape))
    turns = Rotation.from_rotvec(noise * rng.standard_normal((len(depths), 3))).as_matrix()
    extrinsics = true.extrinsics.copy()
    extrinsics[:, :, :3] = turns @ extrinsics[:, :, :3]
    extrinsics[:, :, 3] = extrinsics[:, :, 3] / 3 + noise * rng.standard_normal((len(depths), 3)) / 3
    return Views(depths, true.intrinsics, extrinsics)


@pytest.fixture(autouse=True)
def _fewer_points(monkeypatch):
    """A surface of a few thousand voxels needs no million points."""
    monkeypatch.setattr(protocol_metrics, "SURFACE_POINTS", 50_000)


@pytest.fixture
def scene(rng) -> Measured:
    _, true = ball_and_wall(views=5, size=42)
    return Measured(replace(random_prediction(rng, true), scale="metric"), replace(true, unit="m"))


# ---- frames and sizes ------------------------------------------------------------------------------------------------


def test_frames_are_chosen_as_the_originals_choose_them():
    assert PROTOCOLS["authors"].frames(96) == [0, 12, 24, 36, 48, 60, 72, 84]
    assert PROTOCOLS["pi3"].frames(12) == PROTOCOLS["cut3r"].frames(12) == [0, 5, 10]
    # what np.random.seed(0); np.random.choice(50, 10, replace=False) gives
    assert PROTOCOLS["vggt"].frames(50) == [28, 11, 10, 41, 2, 27, 38, 31, 22, 4]
    assert PROTOCOLS["vggt"].frames(4) == [0, 1, 2, 3]
    random.seed(42)
    indices = list(range(130))
    random.shuffle(indices)
    assert PROTOCOLS["da3"].frames(130) == sorted(indices[:100])
    assert PROTOCOLS["da3"].frames(100) == list(range(100))


def test_sizes_are_those_of_the_originals():
    centred = np.array([[500.0, 0, 640], [0, 500, 360], [0, 0, 1]])
    # ClearPose, 1280 x 720: 518 wide, round(518 * 720 / 1280 / 14) = 21 patches high
    assert protocols.whole_width(centred, (720, 1280), 518, 14) == ((0, 0, 1280, 720), (294, 518))
    # 7-Scenes, 640 x 480: round(27.75) patches
    assert protocols.whole_width(centred, (480, 640), 518, 14)[1] == (392, 518)
    # upright: 690.67 high, to 49 patches = 686; the middle 518 of them
    box, size = protocols.width_cut_to_square(centred, (640, 480), 518, 14)
    assert size == (518, 518)
    assert box == pytest.approx((0, 320 - 320 * 518 / 686, 480, 320 + 320 * 518 / 686))
    assert protocols.width_cut_to_square(centred, (480, 640), 518, 14)[1] == (392, 518)
    # 4 : 3 of a 16 : 9 image keeps its height; 0.75 * 518 / 14 = 27.75
    box, size = protocols.four_to_three(centred, (720, 1280), 518, 14)
    assert size == (392, 518)
    assert box == pytest.approx((640 - 360 * 518 / 392, 0, 640 + 360 * 518 / 392, 720))
    # Depth Anything 3: 504 x 378 -> both multiples of 14; 504 x 283.5, rounded to 284, to 20 patches
    assert protocols.longest_side(centred, (480, 640), 518, 14)[1] == (378, 504)
    assert protocols.longest_side(centred, (720, 1280), 518, 14)[1] == (280, 504)


def test_the_page_says_of_every_protocol_what_the_results_say():
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    page = page.split("## Published protocols")[1]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.count("|") == 7]
    assert rows[0] == ["", *PROTOCOLS]
    marked = {metric: [cell == "x" for cell in cells] for metric, *cells in rows[2:]}
    wanted = {metric for protocol in PROTOCOLS.values() for metric in protocol.metrics}
    assert marked == {metric: [metric in each.metrics for each in PROTOCOLS.values()] for metric in wanted}
    for name, protocol in PROTOCOLS.items():
        section = page.split(f"### `{name}`")[1].split("\n#")[0]
        stated = dict(re.findall(r"(?m)^\| (\w+) \| (.+) \|$", section))
        told = protocol.in_words()
        told["metrics"] = ", ".join(f"`{metric}`" for metric in told["metrics"])
        assert stated == told, name


def test_views_are_cut_as_a_protocol_says(tmp_path):
    images, true = ball_and_wall(views=2, size=56)
    depths = true.depths.astype(np.float32)
    write_scene(tmp_path / "s", images[:, :40], depths[:, :40], true.intrinsics, true.extrinsics, provenance={})
    scene = protocols.load_views(tmp_path / "s", [1], protocols.whole_width, 112, 7)
    assert scene.images.shape == (1, 77, 112, 3)  # 40 / 56 * 16 = 11.4 patches
    # nothing is cut off, so only the two scales change
    scale = np.diag([112 / 56, 77 / 40, 1])
    np.testing.assert_allclose(scene.intrinsics[0], scale @ true.intrinsics[1])


# ---- poses -----------------------------------------------------------------------------------------------------------


def pair_errors_by_quaternions(pred, true, combine) -> tuple[np.ndarray, np.ndarray]:
    """Angles from SciPy's rotations, and from the cosine of the directions."""
    square = np.array([[0.0, 0, 0, 1]])
    poses = [[np.concatenate([extrinsic, square]) for extrinsic in views] for views in (pred, true)]
    rotations, directions = [], []
    for i in range(len(pred)):
        for j in range(i + 1, len(pred)):
            ours, theirs = (combine(side, i, j) for side in poses)
            turn = Rotation.from_matrix(ours[:3, :3]) * Rotation.from_matrix(theirs[:3, :3]).inv()
            rotations.append(np.degrees(turn.magnitude()))
            cosine = abs(ours[:3, 3] @ theirs[:3, 3])
            cosine /= np.linalg.norm(ours[:3, 3]) * np.linalg.norm(theirs[:3, 3])
            directions.append(np.degrees(np.arccos(min(1.0, cosine))))
    return np.array(rotations), np.array(directions)


def _world(poses, i, j):
    against_first = [pose @ np.linalg.inv(poses[0]) for pose in poses]
    return np.linalg.inv(against_first[i]) @ against_first[j]


@pytest.mark.parametrize(
    ("pair", "combine"),
    [
        ("first_from_second", lambda poses, i, j: poses[i] @ np.linalg.inv(poses[j])),
        ("second_from_first", lambda poses, i, j: poses[j] @ np.linalg.inv(poses[i])),
        ("world", _world),
    ],
)
def test_pose_errors_are_those_of_the_originals(scene, pair, combine):
    pred, true = scene.pred.extrinsics, scene.true.extrinsics
    rotation, direction = pair_errors(pred, true, pair)
    expected = pair_errors_by_quaternions(pred, true, combine)
    # arccos of a number near 1 keeps half of the digits: 1e-8 rad
    np.testing.assert_allclose(rotation, expected[0], atol=1e-5)
    np.testing.assert_allclose(direction, expected[1], atol=1e-5)


def test_the_direction_of_a_translation_counts_up_to_its_sign():
    true = np.tile(np.eye(3, 4), (2, 1, 1))
    true[1, 0, 3] = 1.0
    pred = true.copy()
    pred[1, 0, 3] = -2.0
    assert pair_errors(pred, true, "second_from_first")[1] == pytest.approx([0])
    pred[1, :, 3] = 0
    assert pair_errors(pred, true, "second_from_first")[1] == pytest.approx([90])


def test_auc_is_the_mean_of_the_cumulative_histogram(rng):
    rotation, direction = rng.uniform(0, 40, size=(2, 200))
    rotation[:3], direction[:3] = [30, 3, 29], [0, 0, 29]
    for threshold in (3, 30):
        histogram, _ = np.histogram(np.maximum(rotation, direction), bins=np.arange(threshold + 1))
        assert auc(rotation, direction, threshold) == pytest.approx(np.mean(np.cumsum(histogram / 200)))


def test_the_three_poses_of_a_pair_give_different_numbers(scene):
    values = [auc(*pair_errors(scene.pred.extrinsics, scene.true.extrinsics, pair), 3)
              for pair in ("first_from_second", "second_from_first", "world")]  # fmt: skip
    assert len(set(values)) == 3


def test_trajectory_errors_are_those_of_evo(scene):
    from evo.core import metrics
    from evo.core.trajectory import PosePath3D

    def path(extrinsics):
        return PosePath3D(poses_se3=[np.linalg.inv(np.vstack([e, [0, 0, 0, 1]])) for e in extrinsics])

    reference, estimate = path(scene.true.extrinsics), path(scene.pred.extrinsics)
    estimate.align(reference, correct_scale=True)
    ape = metrics.APE(metrics.PoseRelation.translation_part)
    ape.process_data((reference, estimate))
    assert trajectory_error(scene.pred.centres(), scene.true.centres()) == pytest.approx(
        ape.get_statistic(metrics.StatisticsType.rmse)
    )
    expected = []
    for relation in (metrics.PoseRelation.translation_part, metrics.PoseRelation.rotation_angle_deg):
        rpe = metrics.RPE(relation, delta=1, delta_unit=metrics.Unit.frames, all_pairs=True)
        rpe.process_data((reference, estimate))
        expected.append(rpe.get_statistic(metrics.StatisticsType.rmse))
    assert step_errors(scene.pred.extrinsics, scene.true.extrinsics) == pytest.approx(tuple(expected))


def test_consensus_follows_its_definition(rng):
    true = rng.standard_normal((9, 3))
    pred = (true @ Rotation.from_rotvec([0.3, -0.2, 0.5]).as_matrix()) / 2 + [1, 2, 3]
    pred += 0.01 * rng.standard_normal(pred.shape)
    pred[4] += 3  # one camera that is wrong
    found = consensus_alignment(pred, true)
    kept = np.linalg.norm(found.apply(pred) - true, axis=1)
    assert kept[4] > 1
    # the others do not feel it: without it the Sim(3) is good to the noise, in true units
    assert np.delete(kept, 4).max() < 0.1
    assert np.linalg.norm(umeyama(pred, true).apply(pred) - true, axis=1)[[0, 1, 2]].max() > 0.1


def test_consensus_is_the_sim3_of_those_that_most_draws_agree_on(rng):
    """The definition once more, with evo's Umeyama."""
    from evo.core.geometry import umeyama_alignment

    true = rng.standard_normal((8, 3))
    pred = true @ Rotation.from_rotvec([0.1, 0.4, -0.2]).as_matrix() / 3 + 0.05 * rng.standard_normal((8, 3))
    pred[[2, 5]] += 0.7

    def fitted(rows):
        turn, shift, scale = umeyama_alignment(pred[rows].T, true[rows].T, True)
        return scale * pred @ turn.T + shift

    every = np.arange(8)
    gaps = [min(np.linalg.norm(point - other) for other in true) for point in fitted(every)]
    draws, best = np.random.default_rng(42), (-1, 0.0)
    for _ in range(10):
        distances = np.linalg.norm(fitted(draws.choice(8, size=4, replace=False)) - true, axis=1)
        near = np.flatnonzero(distances <= np.median(gaps))
        mean = distances[near].mean() if len(near) else np.inf
        if (len(near), -mean) > best:
            best, kept = (len(near), -mean), near
    assert 3 <= len(kept) < 8
    np.testing.assert_allclose(consensus_alignment(pred, true).apply(pred), fitted(kept), atol=1e-9)


def test_cameras_move_with_their_world(scene):
    motion = umeyama(scene.pred_cloud.points, scene.true_cloud.points)
    moved = moved_cameras(scene.pred.extrinsics, motion)
    views = Views(motion.scale * scene.pred.depths, scene.pred.intrinsics, moved)
    np.testing.assert_allclose(views.points(scene.mask), motion.apply(scene.pred_cloud.points), atol=1e-12)


# ---- surfaces --------------------------------------------------------------------------------------------------------


def surface_by_open3d(pred: np.ndarray, true: np.ndarray, threshold: float = 0.1) -> dict[str, float]:
    """ICP, normals and distances of recons_eval: Open3D and SciPy on all points."""
    o3d = import_open3d()
    clouds = [o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points)) for points in (pred, true)]
    registration = o3d.pipelines.registration
    found = registration.registration_icp(
        *clouds, threshold, np.eye(4), registration.TransformationEstimationPointToPoint()
    )
    clouds[0].transform(found.transformation)
    points, normals = [], []
    for cloud in clouds:
        cloud.estimate_normals()
        points.append(np.asarray(cloud.points))
        normals.append(np.asarray(cloud.normals))
    forward, partner = cKDTree(points[1]).query(points[0])
    backward, back = cKDTree(points[0]).query(points[1])
    first = np.abs(np.sum(normals[0] * normals[1][partner], axis=1))
    second = np.abs(np.sum(normals[1] * normals[0][back], axis=1))
    return {
        "accuracy": forward.mean(),
        "accuracy_median": np.median(forward),
        "completeness": backward.mean(),
        "completeness_median": np.median(backward),
        "normal_consistency": (first.mean() + second.mean()) / 2,
        "normal_consistency_median": (np.median(first) + np.median(second)) / 2,
    }


@pytest.mark.parametrize("name", ["authors", "pi3"])
def test_surfaces_after_sim3_and_icp_are_those_of_recons_eval(scene, name):
    aligned = scene.similarity.apply(scene.pred_cloud.points)
    expected = surface_by_open3d(aligned, scene.true_cloud.points)
    found = PROTOCOLS[name].measure(scene).metrics
    for metric, value in expected.items():
        # the same pairs in every step of ICP; Open3D's normals are those of another eigenvalue solver
        assert found[metric] == pytest.approx(value, rel=1e-5), metric


def test_cut3r_aligns_by_medians(scene):
    first = [torch.from_numpy(side.first_camera().apply(cloud.points)) for side, cloud in
             ((scene.pred, scene.pred_cloud), (scene.true, scene.true_cloud))]  # fmt: skip
    shifts = [torch.nanmedian(points[:, 2]) for points in first]
    for points, shift in zip(first, shifts):
        points[:, 2] -= shift
    centres = [torch.nanmedian(points, dim=0).values for points in first]
    scales = [torch.nanmedian((p - c).norm(dim=1)) for p, c in zip(first, centres)]
    pred = first[0] * scales[1] / scales[0]
    for points in (pred, first[1]):
        points[:, 2] += shifts[1]
    to_world = scene.true.first_camera().inverse()
    # of 42 columns the middle 42 * 224 / 512 = 18.4, so 9 to either side, and as many rows
    middle = np.zeros(scene.mask.shape, bool)
    middle[:, 12:30, 12:30] = True
    inside = middle[scene.mask]
    expected = surface_by_open3d(*(to_world.apply(points.numpy()[inside]) for points in (pred, first[1])))
    found = PROTOCOLS["cut3r"].measure(scene).metrics
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, rel=1e-5), metric


def test_vggt_measures_without_icp(scene):
    aligned = scene.similarity.apply(scene.pred_cloud.points)
    accuracy = cKDTree(scene.true_cloud.points).query(aligned)[0].mean()
    completeness = cKDTree(aligned).query(scene.true_cloud.points)[0].mean()
    found = PROTOCOLS["vggt"].measure(scene).metrics
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["completeness"] == pytest.approx(completeness)
    assert found["overall"] == pytest.approx((accuracy + completeness) / 2)


def test_f_score_by_hand():
    true = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]])
    pred = np.array([[0.0, 0, 0.01], [1, 0, 0.04], [2, 0, 0.06]])
    found = f_scores(pred, true, threshold=0.05)
    # two of three points are precise, two of four are found
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(1 / 2)
    assert found["f_score"] == pytest.approx(2 * (1 / 3) / (7 / 6))
    assert f_scores(pred + 5, true)["f_score"] == 0
    with pytest.raises(ValueError, match="predicted surface must have points"):
        f_scores(np.empty((0, 3)), true)


def test_dtu_leaves_out_what_is_far_and_what_is_crowded():
    true = np.array([[0.0, 0, 0], [10, 0, 0], [100, 0, 0]])
    pred = np.array([[1.0, 0, 0], [1.05, 0, 0], [11, 0, 0], [500, 0, 0]])
    # thinned to 1 (or 1.05), 11 and 500; then 1 and 1 towards the truth, 1 and 1 towards the prediction
    assert dtu_overall(pred, true, density=0.2, cap=20) == pytest.approx(1, abs=0.03)
    with pytest.raises(ValueError, match="within 20"):
        dtu_overall(pred + 1000, true, density=0.2, cap=20)


def test_thinned_points_keep_their_distance(rng):
    points = rng.uniform(size=(2000, 3))
    kept = thinned(points, 0.1)
    pairs = cKDTree(kept).query_pairs(0.1)
    assert not pairs
    # and no point is farther than that from one that was kept
    assert cKDTree(kept).query(points)[0].max() <= 0.1


def test_one_point_per_voxel_is_open3ds(rng):
    o3d = import_open3d()
    points = rng.uniform(size=(3000, 3))
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points)).voxel_down_sample(0.13)
    expected = np.asarray(cloud.points)
    found = one_per_voxel(points, 0.13)
    np.testing.assert_allclose(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)], atol=1e-12)


def test_points_are_spread_evenly_over_triangles():
    # one triangle has three times the area of the other
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 0, 1], [0, 1, 1]])
    points = spread_points(corners, np.array([[0, 1, 2], [3, 4, 5]]), 40_000)
    above = points[:, 2] > 0.5
    # binomial: 4 standard deviations of sqrt(0.25 * 0.75 / 40000)
    assert above.mean() == pytest.approx(0.75, abs=4 * np.sqrt(0.25 * 0.75 / 40_000))
    np.testing.assert_allclose(points[above].mean(axis=0), [1, 1 / 3, 1], atol=0.02)
    assert (points[:, 0] / np.where(above, 3, 1) + points[:, 1] <= 1 + 1e-12).all()
    assert len(spread_points(corners, np.empty((0, 3), int), 10)) == 0


def test_a_fused_wall_lies_where_it_is():
    intrinsic = np.array([[60.0, 0, 28], [0, 60, 28], [0, 0, 1]])
    views = Views(np.full((2, 56, 56), 2.0), np.tile(intrinsic, (2, 1, 1)), np.tile(np.eye(3, 4), (2, 1, 1)))
    corners, triangles = fuse(views, voxel=0.05, truncation=0.2)
    assert len(triangles) > 0
    np.testing.assert_allclose(corners[:, 2], 2, atol=1e-3)
    # the rays through the outer edges meet the wall 28 / 60 * 2 from the middle
    assert np.abs(corners[:, :2]).max() == pytest.approx(56 / 60, abs=0.1)
    # 128 x 128 pixels 0.03 apart, each in a block of its own
    finer = Views(np.full((1, 128, 128), 2.0), views.intrinsics[:1], views.extrinsics[:1])
    with pytest.raises(ValueError, match=r"must fit into 10000 blocks .* got 16384: it is too large for voxels"):
        fuse(finer, voxel=1e-4, truncation=4e-4)


def test_da3_by_its_parts(scene):
    found = PROTOCOLS["da3"].measure(scene)
    alignment = consensus_alignment(scene.pred.centres(), scene.true.centres())
    visible = np.where(scene.mask, scene.pred.depths, 0) * alignment.scale

    def surface(depths, intrinsics, extrinsics):
        mesh = fuse(Views(depths, intrinsics, extrinsics), 4 / 512, 0.04)
        return one_per_voxel(spread_points(*mesh, 50_000), 4 / 512)

    true = surface(np.where(scene.mask, scene.true.depths, 0), scene.true.intrinsics, scene.true.extrinsics)
    posed = surface(visible, scene.true.intrinsics, scene.true.extrinsics)
    assert found.metrics["f_score_posed"] == pytest.approx(f_scores(posed, true)["f_score"])
    assert found.metrics["overall_posed"] == pytest.approx(f_scores(posed, true)["overall"])
    # the predicted cameras in the true world: where the points they see go when the Sim(3) moves them
    turned = np.array([e[:, :3] @ alignment.rotation.T for e in scene.pred.extrinsics])
    moved = -np.einsum("sij,sj->si", turned, alignment.apply(scene.pred.centres()))
    unposed = surface(visible, scene.pred.intrinsics, np.concatenate([turned, moved[..., None]], axis=2))
    expected = f_scores(unposed, true)
    assert 0 < expected["f_score"] < 1
    for metric, value in expected.items():
        assert found.metrics[metric] == pytest.approx(value), metric
    assert "millimetres" in found.reasons["overall_dtu"]


def test_dtus_overall_of_a_scene_in_millimetres(scene):
    """The prediction placed by its cameras, both surfaces thinned to 0.2 mm, what is 20 mm off left out."""
    truth = replace(
        scene.true, depths=50 * scene.true.depths, extrinsics=scene.true.extrinsics * [1, 1, 1, 50], unit="mm"
    )
    found = PROTOCOLS["da3"].measure(Measured(scene.pred, truth)).metrics["overall_dtu"]
    motion = consensus_alignment(scene.pred.centres(), truth.centres())
    clouds = thinned(motion.apply(scene.pred_cloud.points), 0.2), thinned(truth.points(scene.mask), 0.2)
    means = []
    for source, target in (clouds, clouds[::-1]):
        distances = cKDTree(target).query(source)[0]
        means.append(distances[distances < 20].mean())
    assert found == pytest.approx(np.mean(means))


# ---- video depth -----------------------------------------------------------------------------------------------------


def test_reweighted_scale_is_cut3rs(rng):
    true = torch.from_numpy(rng.uniform(1, 5, 500))
    pred = true / 3 * torch.from_numpy(rng.lognormal(0, 0.2, 500))
    scale = true.mean() / pred.mean()
    for _ in range(10):
        weights = 1.0 / ((scale * pred - true).abs() + 1e-8)
        scale = (weights * pred * true).sum() / (weights * pred**2).sum()
    assert reweighted_scale(pred.numpy(), true.numpy()) == pytest.approx(float(scale))


def test_scale_and_shift_cost_no_more_than_adam_finds(rng):
    true = rng.uniform(1, 5, (1, 20, 25))
    pred = (true - 0.8) / 3 * rng.lognormal(0, 0.1, true.shape)
    mask = np.ones(true.shape, bool)
    truth, predicted = torch.from_numpy(true).ravel(), torch.from_numpy(pred).ravel()
    s = (truth.median() / predicted.median()).clone().requires_grad_()
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([s, t], lr=1e-4)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (s * predicted + t - truth).abs().sum()
        loss.backward()
        optimizer.step()
    # a thousand steps of at most about 1e-4: the original does not reach a shift of 0.8
    assert abs(t.item()) < 0.11
    error, _ = video_depth_errors(pred, true, mask)["scale_shift"]
    assert error < ((s * predicted + t - truth).abs() / truth).mean().item()


def test_video_depth_by_hand():
    true = np.array([[[1.0, 2.0, 4.0, 80.0]]])
    mask = np.ones(true.shape, bool)
    errors = video_depth_errors(true / 2 - 0.25, true, mask, most_depth=70)
    assert errors["scale_shift"] == pytest.approx((0, 1))
    # 0.25 for 1, 0.75 for 2, 1.75 for 4: nothing is fitted, the pixel beyond 70 does not count
    assert errors["metric"][0] == pytest.approx((0.75 + 0.625 + 0.5625) / 3)
    assert errors["metric"][1] == 0
    beyond = video_depth_errors(np.full(true.shape, 100.0), true, mask, most_depth=70)
    assert beyond["metric"][0] == pytest.approx((69 + 34 + 16.5) / 3)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_perfect_prediction_is_perfect_under_every_protocol(name):
    _, true = ball_and_wall(views=4, size=42)
    found = PROTOCOLS[name].measure(Measured(replace(true, scale="metric"), replace(true, unit="m")))
    assert set(found.metrics) == set(PROTOCOLS[name].metrics)
    for metric, value in found.metrics.items():
        if value is None:
            assert metric == "overall_dtu"
        elif QUANTITIES[metric].lower_is_better:
            # medians are good to round-off, angles to its root
            assert value == pytest.approx(0, abs=1e-6), metric
        else:
            assert value == pytest.approx(1, abs=1e-6), metric


def test_where_true_cameras_stand_may_be_unknown(scene):
    true = replace(scene.true, translation_known=False)
    for name, protocol in PROTOCOLS.items():
        found = protocol.measure(Measured(scene.pred, true))
        assert set(found.metrics) == set(protocol.metrics), name
        for metric, value in found.metrics.items():
            if "abs_rel" in metric or "delta" in metric:
                assert value is not None, metric
            else:
                assert value is None, (name, metric)


def test_the_command_prints_all_protocols_side_by_side(tmp_path, capsys):
    write_analytic_scene(tmp_path / "scenes" / "one")
    config = EvaluateConfig(
        scenes=tmp_path / "scenes", out=tmp_path / "out", weights="random", protocol="all", frames=3
    )
    results = command.run(config)
    printed = capsys.readouterr().out.splitlines()
    head = next(line for line in printed if line.startswith("metric"))
    assert head.split() == ["metric", "method", *PROTOCOLS]
    assert any(line.startswith("AUC@30 ^") for line in printed)
    assert list(results["protocols"]) == list(PROTOCOLS)
    base = results["methods"]["base"]
    for name, protocol in PROTOCOLS.items():
        assert set(base["protocols"][name]["per_scene"]["one"]) == set(protocol.metrics)
        assert results["protocols"][name]["alignment"] == protocol.alignment
    assert results["protocol"]["size"] == "centred square of image_size"
    assert base["details"]["one"]["frame_indices"] == [0, 1, 2]


def test_one_protocol_chooses_frames_and_sizes(tmp_path):
    images, true = ball_and_wall(views=12, size=56)
    depths = true.depths.astype(np.float32)
    write_scene(tmp_path / "in" / "s", images[:, :40], depths[:, :40], true.intrinsics, true.extrinsics, provenance={})
    config = EvaluateConfig(scenes=tmp_path / "in", out=tmp_path / "out", weights="random", protocol="pi3")
    results = command.run(config)
    details = results["methods"]["base"]["details"]["s"]
    assert details["frame_indices"] == [0, 5, 10]
    # 40 / 56 * 112 = 80 rows, rounded to six patches of 14
    assert 3 * 80 * 112 < details["points"] < 3 * 84 * 112
    assert results["protocol"]["frame_choice"] == PROTOCOLS["pi3"].frames_in_words


@pytest.mark.slow
def test_methods_side_by_side_measure_the_same(tmp_path):
    write_analytic_scene(tmp_path / "scenes" / "one")

    def run(out, workers):
        folders = {"scenes": tmp_path / "scenes", "out": tmp_path / out}
        config = EvaluateConfig(**folders, weights="random", protocol="vggt", frames=2, workers=workers)
        return command.run(config)["methods"]["base"]

    alone, beside = run("a", 1), run("b", 2)
    # processes of fewer threads add up in another order
    one, other = (
        {name: value for name, value in each["per_scene"]["one"].items() if value is not None}
        for each in (alone, beside)
    )
    assert one == pytest.approx(other, rel=1e-4)
    assert alone["protocols"].keys() == beside["protocols"].keys()


def test_settings_of_the_command_are_checked(tmp_path):
    write_analytic_scene(tmp_path / "scenes" / "one")
    for change in ({"workers": 0}, {"f_threshold": 0.0}, {"frames": 0}):
        config = EvaluateConfig(scenes=tmp_path / "scenes", out=tmp_path / "out", weights="random", **change)
        with pytest.raises(ValueError, match="must be at least 1, images at least 0, icp_threshold and f_threshold"):
            command.run(config)


def test_metres_are_compared_where_the_model_and_the_scene_have_them(scene):
    known = PROTOCOLS["cut3r"].measure(scene).metrics
    expected = np.abs(scene.pred.depths - scene.true.depths)[scene.mask] / scene.true.depths[scene.mask]
    assert known["abs_rel_metric"] == pytest.approx(expected.mean())
    millimetres = replace(
        scene.true, depths=1000 * scene.true.depths, extrinsics=scene.true.extrinsics * [1, 1, 1, 1000], unit="mm"
    )
    found = PROTOCOLS["cut3r"].measure(Measured(scene.pred, millimetres)).metrics
    for name in ("abs_rel_metric", "delta_metric", "abs_rel_scale_shift"):
        assert found[name] == pytest.approx(known[name]), name
    for pred, true in (
        (replace(scene.pred, scale="scene"), scene.true),
        (scene.pred, replace(scene.true, unit="scan")),
    ):
        result = PROTOCOLS["cut3r"].measure(Measured(pred, true))
        assert (result.metrics["abs_rel_metric"], result.metrics["delta_metric"]) == (None, None)
        assert "metres" in result.reasons["abs_rel_metric"] and result.metrics["abs_rel_scale"] is not None


def test_values_that_are_not_finite_are_not_defined(scene):
    # where all is behind the camera the truth that is fitted to it is nowhere positive
    behind = Measured(replace(scene.pred, depths=-scene.pred.depths), scene.true)
    result = PROTOCOLS["authors"].measure(behind)
    assert result.metrics["abs_rel_frame_affine"] is None and result.metrics["delta_frame_affine"] == 0
    assert "the value is nan" in result.reasons["abs_rel_frame_affine"]
