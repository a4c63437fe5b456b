"""A scene's metrics: the truth measured against itself is perfect, whatever frame and unit it is given in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from evaluation.analytic_scene import ball_and_wall
from scipy.spatial.transform import Rotation

from subspace3d.evaluation.scene_metrics import Views, measure
from subspace3d.evaluation.table import METRICS

# all that is better when higher is a share or an agreement: 1 at best
PERFECT = {name: 0.0 if metric.lower_is_better else 1.0 for name, metric in METRICS.items()}


def in_another_world(true: Views, scale: float, rng: np.random.Generator) -> Views:
    """The same views after world' = scale * turn @ world + shift."""
    turn, shift = Rotation.random(None, rng).as_matrix(), rng.normal(size=3)
    rotations = true.extrinsics[:, :, :3] @ turn.T
    translations = scale * true.extrinsics[:, :, 3] - rotations @ shift
    return Views(true.depths * scale, true.intrinsics, np.concatenate([rotations, translations[..., None]], axis=2))


def training_unit(true: Views) -> float:
    points = true.points(true.depths > 0)
    return float(np.linalg.norm(points - true.centres()[0], axis=1).mean())


def test_points_project_back_to_their_pixels():
    _, true = ball_and_wall(views=2, size=28)
    mask = true.depths > 0
    points = true.points(mask)
    start = 0
    for view in range(2):
        rows, columns = np.nonzero(mask[view])
        own = points[start : start + len(rows)]
        start += len(rows)
        seen = own @ true.extrinsics[view, :, :3].T + true.extrinsics[view, :, 3]
        pixels = seen @ true.intrinsics[view].T
        np.testing.assert_allclose(pixels[:, :2] / pixels[:, 2:], np.stack([columns, rows], 1) + 0.5, atol=1e-9)
        np.testing.assert_allclose(seen[:, 2], true.depths[view][mask[view]], atol=1e-12)


def test_oracle_is_perfect(rng):
    _, true = ball_and_wall()
    result = measure(in_another_world(true, 1 / training_unit(true), rng), true, icp_threshold=0.1)
    assert result.reasons == {}
    assert set(result.metrics) == set(METRICS)
    for name, value in result.metrics.items():
        # angles come from differences of rotations with entries of order 1: 1e-15 rad, far below 1e-6 degrees
        assert value == pytest.approx(PERFECT[name], abs=1e-6), name
    assert result.details["scale"] == pytest.approx(training_unit(true))
    points = 4 * (56 * 56 - 9)
    counts = ("points", "queries", "queries_raw", "icp_source_points")
    assert [result.details[name] for name in counts] == [points] * 4
    assert result.details["scale_translation"]["fit_points"] == points
    assert result.details["camera_pairs"] == result.details["camera_pairs_with_baseline"] == 6


def test_aligned_values_do_not_see_the_scale_and_raw_values_do(rng):
    _, true = ball_and_wall()
    result = measure(in_another_world(true, 1.2 / training_unit(true), rng), true, icp_threshold=0.1)
    assert result.metrics["abs_rel"] == pytest.approx(0, abs=1e-9)
    assert result.metrics["accuracy"] == pytest.approx(0, abs=1e-9)
    assert result.metrics["abs_rel_scale_translation"] == pytest.approx(0, abs=1e-9)
    assert result.metrics["abs_rel_frame_affine"] == pytest.approx(0, abs=1e-9)
    assert result.metrics["point_rel"] == pytest.approx(0, abs=1e-9)
    assert result.metrics["abs_rel_raw"] == pytest.approx(0.2)
    assert result.metrics["point_rel_raw"] == pytest.approx(0.2)
    assert result.metrics["delta_1_25_raw"] == 1.0
    assert result.metrics["completeness_raw"] > 0.01
    assert result.depth_scale == pytest.approx(training_unit(true) / 1.2)


def test_each_alignment_forgives_what_it_fits(rng):
    _, true = ball_and_wall()
    # a shift of the depths that differs from view to view is forgiven by the fit per frame alone
    shifted = true.depths + np.linspace(0.1, 0.7, len(true.depths))[:, None, None]
    metrics = measure(Views(shifted, true.intrinsics, true.extrinsics), true, 0.1).metrics
    assert metrics["abs_rel_frame_affine"] == pytest.approx(0, abs=1e-9)
    assert metrics["abs_rel"] > metrics["abs_rel_scale_translation"] > 0.01
    # one shift of all points in their cameras by the fit of scale and translation
    mask = true.depths > 0
    fitted = measure(Views(true.depths + 0.5, true.intrinsics, true.extrinsics), true, 0.1)
    assert fitted.metrics["abs_rel_scale_translation"] < fitted.metrics["abs_rel"]
    assert fitted.details["frame_affine"]["shift"] == pytest.approx([0.5] * 4)
    assert fitted.details["points"] == np.count_nonzero(mask)


def test_errors_get_worse_with_noise(rng):
    _, true = ball_and_wall(views=2)
    noise = rng.normal(size=true.depths.shape)
    results = [
        measure(Views(true.depths * (1 + level * noise), true.intrinsics, true.extrinsics), true, 0.1).metrics
        for level in (0.01, 0.05)
    ]
    for name in ("accuracy", "completeness", "chamfer", "abs_rel"):
        assert results[0][name] < results[1][name], name
    assert results[0]["normal_consistency"] > results[1]["normal_consistency"]
    # mean |1 + 0.01 n - 1| of a standard normal n is 0.01 sqrt(2 / pi); the fitted scale takes nothing from it
    assert results[0]["abs_rel"] == pytest.approx(0.01 * np.sqrt(2 / np.pi), rel=0.05)


def test_one_frame_has_no_relative_pose():
    _, true = ball_and_wall(views=1)
    result = measure(true, true, icp_threshold=0.1)
    assert result.metrics["rotation_error_deg"] is None
    assert "at least 2 frames" in result.reasons["rotation_error_deg"]
    assert result.metrics["accuracy"] == pytest.approx(0, abs=1e-9)


def test_a_prediction_on_one_line_has_no_alignment():
    _, true = ball_and_wall(views=2, size=28)
    rays_in_parallel = true.intrinsics * [[1e12], [1e12], [1.0]]
    line = Views(true.depths, rays_in_parallel, np.stack([true.extrinsics[0]] * 2))
    result = measure(line, true, icp_threshold=0.1)
    assert result.metrics["accuracy"] is None
    assert "Sim(3)" in result.reasons["accuracy"]
    assert result.metrics["abs_rel"] == pytest.approx(0, abs=1e-12)
    assert result.metrics["accuracy_raw"] > 0.1


def test_bad_predictions_are_refused():
    _, true = ball_and_wall(views=2, size=28)
    holes = true.depths.copy()
    holes[0, 5, 5] = np.nan
    with pytest.raises(ValueError, match="must be finite, got 1 values in depths"):
        measure(Views(holes, true.intrinsics, true.extrinsics), true, 0.1)
    with pytest.raises(ValueError, match="one shape"):
        measure(Views(true.depths[:1], true.intrinsics[:1], true.extrinsics[:1]), true, 0.1)
    stretched = true.extrinsics * [2, 2, 2, 1]
    with pytest.raises(ValueError, match=r"rotations in extrinsics, got \|R R\^T - I\| = 3 and det R = 8"):
        measure(Views(true.depths, true.intrinsics, stretched), true, 0.1)
    single = Views(true.depths[:1], true.intrinsics[:1], true.extrinsics[:1])
    with pytest.raises(ValueError, match="at least 3 pixels must have true depth, got 0"):
        measure(single, Views(single.depths * 0, single.intrinsics, single.extrinsics), 0.1)


def test_without_depth_the_cameras_measure_what_they_do_beside_it():
    _, true = ball_and_wall(views=4)
    angle = np.radians(7)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    turned = true.extrinsics.copy()
    turned[1] = turn @ turned[1]
    pred = Views(true.depths, true.intrinsics, turned)
    whole = measure(pred, true, 0.1)
    bare = measure(pred, Views(true.depths * 0, true.intrinsics, true.extrinsics), 0.1)
    assert set(bare.metrics) == set(whole.metrics)
    defined = {name: value for name, value in bare.metrics.items() if value is not None}
    assert defined == {name: whole.metrics[name] for name in defined}
    # of six pairs three have the camera that was turned by 7 degrees
    assert defined["rotation_error_deg"] == pytest.approx(3.5)
    assert {"trajectory_error", "pose_auc_30", "translation_error_deg"} < set(defined)
    assert bare.details["points"] == 0 and "abs_rel" in bare.reasons


def test_cameras_that_only_turn_leave_depth_and_rotations():
    _, true = ball_and_wall()
    turning = np.concatenate([true.extrinsics[:, :, :3], np.zeros((len(true.extrinsics), 3, 1))], axis=2)
    result = measure(true, Views(true.depths, true.intrinsics, turning, translation_known=False), 0.1)
    defined = {name for name, value in result.metrics.items() if value is not None}
    assert defined == {name for name in METRICS if name.startswith(("abs_rel", "delta", "point", "rotation_error"))}
    assert set(result.metrics) == set(METRICS) == defined | set(result.reasons)
    assert "only how they turn" in result.reasons["chamfer"]
    assert result.metrics["rotation_error_deg"] == pytest.approx(0, abs=1e-6)


RAW = {name for name, metric in METRICS.items() if metric.alignment == "raw"}


@pytest.mark.parametrize(("unit", "per_metre"), [("m", 1.0), ("mm", 1000.0)])
def test_raw_values_of_metres_are_compared_in_metres(unit, per_metre):
    _, metres = ball_and_wall(views=2, size=28)
    moved = metres.extrinsics * [1, 1, 1, per_metre]
    true = Views(per_metre * metres.depths, metres.intrinsics, moved, unit=unit)
    pred = Views(1.1 * metres.depths, metres.intrinsics, metres.extrinsics, scale="metric")
    result = measure(pred, true, icp_threshold=0.1 * per_metre)
    assert result.metrics["abs_rel_raw"] == pytest.approx(0.1)
    assert result.metrics["point_rel_raw"] == pytest.approx(0.1)
    # the cameras are right, in metres
    assert result.metrics["camera_centre_error_raw"] == pytest.approx(0, abs=1e-9 * per_metre)
    assert result.details["unit"] == per_metre


@pytest.mark.parametrize(
    ("scale", "unit", "reason"),
    [
        ("free", "m", "predicts depths and translations up to scale, not in metres"),
        ("metric", "scene", "predicted in metres, the scene's unit is 'scene' and not m or mm"),
    ],
)
def test_raw_values_without_a_common_unit_are_not_defined(rng, scale, unit, reason):
    _, true = ball_and_wall(views=2, size=28)
    pred = Views(true.depths, true.intrinsics, true.extrinsics, scale=scale)
    result = measure(pred, replace(true, unit=unit), 0.1)
    assert {name for name, value in result.metrics.items() if value is None and name != "trajectory_error"} == RAW
    assert all(reason in result.reasons[name] for name in RAW)
