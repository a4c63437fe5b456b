"""All metrics of one scene: a prediction against the truth. docs/evaluation.md defines each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, Similarity, scale_alignment, umeyama
from subspace3d.evaluation.depth import (
    absolute_relative,
    align_scale_translation,
    delta_share,
    fit_grid,
    frame_affine_errors,
    point_errors,
)
from subspace3d.evaluation.point_cloud import (
    F_THRESHOLD,
    ICP_SOURCE_POINTS,
    MOST_QUERIES,
    MovedCloud,
    PointCloud,
    icp,
    subsample,
    surface_distances,
)
from subspace3d.evaluation.pose import (
    AUC_THRESHOLDS_DEG,
    camera_centres,
    pose_auc,
    relative_pose_errors,
    trajectory_error,
)
from subspace3d.geometry import camera_rays, pixel_centres

if TYPE_CHECKING:
    from subspace3d.formats.scene import Scene

ALIGNED_CLOUD = (
    "accuracy", "accuracy_median", "completeness", "completeness_median", "chamfer", "f_score", "normal_consistency",
    "normal_consistency_accuracy", "normal_consistency_completeness", "camera_centre_error",
)  # fmt: skip
RAW_CLOUD = tuple(f"{name}_raw" for name in ALIGNED_CLOUD)
POINTS = (
    "point_rel", "point_rel_raw", "point_delta_0_25", "point_delta_0_25_raw", "abs_rel_scale_translation",
    "delta_1_25_scale_translation",
)  # fmt: skip
DEPTH = (
    "abs_rel", "abs_rel_raw", "abs_rel_frame_affine", "delta_1_25", "delta_1_25_raw", "delta_1_25_frame_affine", *POINTS
)  # fmt: skip
_RAW = (*RAW_CLOUD, *(name for name in DEPTH if name.endswith("_raw")))
NO_POSES = "not predicted: camera poses"
NO_INTRINSICS = "not predicted: intrinsics, and no points either"
ONLY_TURNS = "where the true cameras stand is not known, only how they turn"
PER_METRE = {"m": 1.0, "mm": 1000.0}  # units of a scene, by their name
_ROTATION_TOLERANCE = 0.05  # of R R^T; quaternions in bfloat16 stay below it
RAW_QUERIES = 20_000  # unaligned clouds can be far apart, where every search is slow


@dataclass(frozen=True)
class Views:
    """Depth maps and cameras of S views, predicted or true.

    Args:
        depths (Array): float [S, H, W], z-depth; 0 in a true map marks a pixel without depth.
        intrinsics (Array | None): float64 [S, 3, 3], pixels; None where a model predicts none.
        extrinsics (Array | None): float64 [S, 3, 4], camera-from-world, OpenCV, translation in the unit of the depths;
            None where a model predicts none.
        translation_known (bool): false when only the rotations of the true cameras are known, and translations are 0.
        confidence (Array | None): [S, H, W], higher is surer, of a prediction; no metric uses it.
        points_in_camera (Array | None): [S, H, W, 3], each in the coordinates of the camera that sees it, of a model
            that predicts points and no intrinsics.
        unit (str): of a truth, the name of its unit; ``m`` and ``mm`` are understood.
        scale (str): of a prediction, what it is a multiple of; see `subspace3d.backbones.protocol.Backbone`.
    """

    depths: Array
    intrinsics: Array | None
    extrinsics: Array | None
    translation_known: bool = True
    confidence: Array | None = None
    points_in_camera: Array | None = None
    unit: str = "scene"
    scale: Literal["scene", "metric", "free"] = "scene"

    @classmethod
    def of(cls, scene: Scene) -> Views:
        """The true depths and cameras of a scene, in its unit."""
        return cls(scene.depths, scene.intrinsics, scene.extrinsics, scene.translation_known, unit=scene.unit)

    @property
    def poses(self) -> Array:
        """``extrinsics``.

        Raises:
            ValueError: they are not predicted.
        """
        if self.extrinsics is None:
            raise ValueError(NO_POSES)
        return self.extrinsics

    @property
    def calibration(self) -> Array:
        """``intrinsics``.

        Raises:
            ValueError: they are not predicted.
        """
        if self.intrinsics is None:
            raise ValueError(NO_INTRINSICS)
        return self.intrinsics

    def not_predicted(self) -> tuple[str, ...]:
        """Which of the cameras' fields are None."""
        return tuple(name for name in ("extrinsics", "intrinsics") if getattr(self, name) is None)

    def points(self, mask: NDArray[np.bool_]) -> Array:
        """World points [n, 3] of the pixels in ``mask`` [S, H, W], frame by frame, row by row."""
        return self.to_world(self.camera_points(mask), mask)

    def camera_points(self, mask: NDArray[np.bool_]) -> Array:
        """The same points, each in the coordinates of the camera that sees it: ``d K^-1 (x, y, 1)^T``.

        Raises:
            ValueError: neither intrinsics nor points are predicted.
        """
        if self.points_in_camera is not None:
            return np.asarray(self.points_in_camera[mask], np.float64)
        centres = pixel_centres(*mask.shape[1:])
        points = np.empty((np.count_nonzero(mask), 3))
        for depth, intrinsic, inside, rows in zip(self.depths, self.calibration, mask, _rows(mask)):
            points[rows] = camera_rays(np.asarray(intrinsic, np.float64), centres[inside])
            points[rows] *= depth[inside, None]
        return points

    def to_world(self, camera_points: Array, mask: NDArray[np.bool_]) -> Array:
        """``R^T (x - t)`` of what `camera_points` returned for the same mask."""
        points = np.empty_like(camera_points)
        for extrinsic, rows in zip(self.poses, _rows(mask)):
            np.matmul(camera_points[rows] - extrinsic[:, 3], extrinsic[:, :3], out=points[rows])
        return points

    def first_camera(self) -> Similarity:
        """World to the first camera."""
        return Similarity(1.0, self.poses[0, :, :3], self.poses[0, :, 3])

    def centres(self) -> Array:
        """Camera centres ``-R^T t`` in the world, [S, 3]."""
        return camera_centres(self.poses)


def _rows(mask: NDArray[np.bool_]) -> list[slice]:
    """For each frame of ``mask`` [S, H, W], where its points lie among those of all frames."""
    ends = np.cumsum(np.count_nonzero(mask, axis=(1, 2))).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


@dataclass
class SceneResult:
    """What `measure` found.

    Args:
        metrics (dict): metric name -> value, None when it is not defined for this scene.
        reasons (dict): metric name -> why its value is None.
        details (dict): counts and the fitted alignment.
        depth_scale (float): true units per predicted unit, as fitted to the depths.
    """

    metrics: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    depth_scale: float = 1.0

    def add(self, values: Mapping[str, float]) -> None:
        """Metrics; one that is not finite is not defined."""
        for name, value in values.items():
            if math.isfinite(value):
                self.metrics[name] = value
            else:
                self.undefined((name,), f"the prediction is so far off that the value is {value}")

    def undefined(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            self.metrics[name] = None
            self.reasons[name] = reason


def valid_mask(true: Views) -> NDArray[np.bool_]:
    """``true depth > 0``, the mask of every metric: no confidence filter, no outlier cut.

    Raises:
        ValueError: fewer than 3 pixels have depth.
    """
    mask = np.isfinite(true.depths) & (true.depths > 0)
    if np.count_nonzero(mask) < 3:
        raise ValueError(f"at least 3 pixels must have true depth, got {np.count_nonzero(mask)} of {mask.size}")
    return mask


def check_measurable(true: Views) -> bool:
    """Whether depth and points can be measured; if not, cameras can.

    Raises:
        ValueError: neither: fewer than 3 pixels have depth, and a single camera has no relative pose.
    """
    try:
        valid_mask(true)
    except ValueError:
        if len(true.poses) < 2:
            raise
        return False
    return True


def metric_unit(pred: Views, true: Views) -> float:
    """Units of ``true`` per unit of ``pred``, if both have a length.

    Raises:
        ValueError: the model does not predict metres, or the scene's unit is not known in metres.
    """
    if pred.scale != "metric":
        raise ValueError("the model predicts depths and translations up to scale, not in metres")
    if true.unit not in PER_METRE:
        raise ValueError(f"predicted in metres, the scene's unit is {true.unit!r} and not {' or '.join(PER_METRE)}")
    return PER_METRE[true.unit]


def measure(pred: Views, true: Views, icp_threshold: float, f_threshold: float = F_THRESHOLD) -> SceneResult:
    """Every metric of one scene; of views without depth those of the cameras alone.

    What needs cameras that are not predicted is None, with that as the reason.

    Args:
        pred (Views): prediction in any world frame and unit; same S, H and W as ``true``.
        true (Views): truth; its unit is the unit of all distances.
        icp_threshold (float): largest correspondence distance of ICP, in true units.
        f_threshold (float): largest distance that counts for the F-score, in true units.

    Raises:
        ValueError: shapes differ, a single view has too few pixels with true depth, or the prediction is not finite
            or has extrinsics without rotations.
        ImportError: SciPy cannot be imported.
    """
    if pred.depths.shape != true.depths.shape:
        raise ValueError(f"depths must have one shape, got {pred.depths.shape} and {true.depths.shape}")
    for name in ("depths", "intrinsics", "extrinsics", "points_in_camera"):
        values = getattr(pred, name)
        bad = 0 if values is None else int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise ValueError(f"the prediction must be finite, got {bad} values in {name} that are not")
    _check_rotations(pred)
    if not check_measurable(true):
        return _measure_without_depth(pred, true)
    mask = valid_mask(true)
    true_camera = true.camera_points(mask)
    true_points = true.to_world(true_camera, mask)
    has_points = pred.intrinsics is not None or pred.points_in_camera is not None
    pred_camera = pred.camera_points(mask) if has_points else None
    # the unit that backbones of the scale "scene" learn: mean distance of the true points from the first camera
    seen = true.first_camera().apply(true_points)
    unit = float(np.sqrt(np.einsum("ij,ij->i", seen, seen)).mean())
    no_unit = ""
    if pred.scale != "scene":
        try:
            unit = metric_unit(pred, true)
        except ValueError as error:
            no_unit = str(error)

    result = SceneResult(details={"frames": len(mask), "points": len(true_points), "unit": unit})
    # NumPy and SciPy leave the interpreter's lock while they work, so two threads are two cores
    with ThreadPoolExecutor(1) as beside:
        depth = beside.submit(_measure_views, pred, true, pred_camera, true_camera, mask, unit)
        cloud = _measure_cloud(pred, true, pred_camera, true_points, mask, unit, icp_threshold, f_threshold)
        for part in (depth.result(), cloud, _measure_cameras(pred, true)):
            result.metrics |= part.metrics
            result.reasons |= part.reasons
            result.details |= part.details
    if no_unit:
        result.undefined(_RAW, no_unit)
        del result.details["unit"]
    result.depth_scale = result.details["depth_scale"]
    result.add({name: value for name, value in result.metrics.items() if value is not None})
    return result


def _check_rotations(pred: Views) -> None:
    """Angles between matrices that do more than turn mean nothing, nor do normals that they stretch."""
    if pred.extrinsics is not None:
        rotations = pred.extrinsics[:, :, :3]
        error = float(np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max())
        least = float(np.linalg.det(rotations).min())
        if error > _ROTATION_TOLERANCE or least < 0:
            raise ValueError(
                "the prediction must have rotations in extrinsics, "
                f"got |R R^T - I| = {error:.2g} and det R = {least:.3g}"
            )


def _measure_without_depth(pred: Views, true: Views) -> SceneResult:
    result = _measure_cameras(pred, true)
    result.undefined(DEPTH + ALIGNED_CLOUD + RAW_CLOUD, "there is no true depth to compare with")
    result.details |= {"frames": len(true.poses), "points": 0}
    return result


def _measure_views(
    pred: Views, true: Views, pred_camera: Array | None, true_camera: Array, mask: NDArray[np.bool_], unit: float
) -> SceneResult:
    """Depth and points of every view on its own."""
    result = SceneResult()
    _measure_depth(result, pred.depths, true.depths, mask, unit)
    if pred_camera is None:
        result.undefined(POINTS, NO_INTRINSICS)
    else:
        _measure_points(result, pred_camera, true_camera, mask, unit)
    return result


def _measure_depth(result: SceneResult, pred: Array, true: Array, mask: NDArray[np.bool_], unit: float) -> None:
    result.metrics["abs_rel_raw"] = absolute_relative(pred * unit, true, mask)
    result.metrics["delta_1_25_raw"] = delta_share(pred * unit, true, mask)
    scale = scale_alignment(pred, true, mask)
    result.metrics["abs_rel"] = absolute_relative(pred * scale, true, mask)
    result.metrics["delta_1_25"] = delta_share(pred * scale, true, mask)
    result.details["depth_scale"] = scale
    error, share, fits, left_out = frame_affine_errors(pred, true, mask)
    result.metrics["abs_rel_frame_affine"] = error
    result.metrics["delta_1_25_frame_affine"] = share
    result.details["frame_affine"] = {
        "scale": [fit.scale for fit in fits],
        "shift": [float(fit.shift[0]) for fit in fits],
        "pixels_without_relative_error": left_out,
    }


def _measure_points(
    result: SceneResult, pred_points: Array, true_points: Array, mask: NDArray[np.bool_], unit: float
) -> None:
    """Errors of the points in the coordinates of their own cameras, and of their z, after one scale and translation."""
    result.metrics["point_rel_raw"], result.metrics["point_delta_0_25_raw"] = point_errors(
        unit * pred_points, true_points
    )
    chosen = fit_grid(mask)
    fit = align_scale_translation(pred_points, true_points, chosen)
    aligned = fit.apply(pred_points)
    result.metrics["point_rel"], result.metrics["point_delta_0_25"] = point_errors(aligned, true_points)
    everywhere = np.ones(len(aligned), bool)
    result.metrics["abs_rel_scale_translation"] = absolute_relative(aligned[:, 2], true_points[:, 2], everywhere)
    result.metrics["delta_1_25_scale_translation"] = delta_share(aligned[:, 2], true_points[:, 2], everywhere)
    result.details["scale_translation"] = {
        "scale": fit.scale,
        "translation": fit.shift.tolist(),
        "fit_points": int(chosen.sum()),
    }


def _measure_cloud(
    pred: Views,
    true: Views,
    pred_camera: Array | None,
    true_points: Array,
    mask: NDArray[np.bool_],
    unit: float,
    icp_threshold: float,
    f_threshold: float,
) -> SceneResult:
    """Surfaces and camera centres in the world."""
    result = SceneResult()
    if not true.translation_known:
        result.undefined(ALIGNED_CLOUD + RAW_CLOUD, ONLY_TURNS)
        return result
    if pred.extrinsics is None or pred_camera is None:
        result.undefined(ALIGNED_CLOUD + RAW_CLOUD, NO_POSES if pred.extrinsics is None else NO_INTRINSICS)
        return result
    pred_points = pred.to_world(pred_camera, mask)
    pred_cloud, true_cloud = PointCloud(pred_points), PointCloud(true_points)
    with ThreadPoolExecutor(1) as beside:
        beside.submit(getattr, pred_cloud, "tree")
        true_cloud.tree  # noqa: B018  # built on first use
    # raw: both clouds seen from their own first camera, the prediction in the unit it was trained in, nothing fitted
    to_unit = Similarity(unit, np.eye(3), np.zeros(3))
    raw = true.first_camera().inverse().after(to_unit).after(pred.first_camera())
    raw_values = surface_distances(MovedCloud(pred_cloud, raw), true_cloud, RAW_QUERIES, f_threshold)
    raw_values["camera_centre_error"] = _mean_distance(raw.apply(pred.centres()), true.centres())
    result.metrics |= {f"{name}_raw": value for name, value in raw_values.items()}
    result.details["queries_raw"] = min(len(true_points), RAW_QUERIES)
    try:
        similarity = umeyama(pred_points, true_points)
    except ValueError as error:
        result.undefined(ALIGNED_CLOUD, f"no Sim(3) alignment: {error}")
        return result
    moving = pred_points[subsample(len(pred_points), ICP_SOURCE_POINTS)]
    refined = icp(similarity.apply(moving), true_cloud, icp_threshold)
    alignment = refined.motion.after(similarity)
    result.metrics |= surface_distances(MovedCloud(pred_cloud, alignment), true_cloud, f_threshold=f_threshold)
    result.metrics["camera_centre_error"] = _mean_distance(alignment.apply(pred.centres()), true.centres())
    result.details |= {
        "scale": alignment.scale,
        "rotation": alignment.rotation.tolist(),
        "translation": alignment.translation.tolist(),
        "icp_fitness": refined.fitness,
        "icp_inlier_rmse": refined.inlier_rmse,
        "icp_source_points": min(len(true_points), ICP_SOURCE_POINTS),
        "queries": min(len(true_points), MOST_QUERIES),
    }
    return result


def _mean_distance(first: Array, second: Array) -> float:
    return float(np.linalg.norm(first - second, axis=1).mean())


def _measure_cameras(pred: Views, true: Views) -> SceneResult:
    result = SceneResult()
    rotation = ("rotation_error_deg", "rotation_error_deg_median")
    translation = ("translation_error_deg", "translation_error_deg_median")
    areas = tuple(f"pose_auc_{threshold}" for threshold in AUC_THRESHOLDS_DEG)
    problem = NO_POSES if pred.extrinsics is None else "relative poses need at least 2 frames, got 1"
    if pred.extrinsics is None or len(true.poses) < 2:
        result.undefined((*rotation, *translation, *areas, "trajectory_error"), problem)
        return result
    errors = relative_pose_errors(pred.poses, true.poses)
    result.details["camera_pairs"] = len(errors.moved)
    result.details["camera_pairs_with_baseline"] = int(errors.moved.sum())
    result.metrics[rotation[0]] = float(errors.rotation_deg.mean())
    result.metrics[rotation[1]] = float(np.median(errors.rotation_deg))
    if len(errors.translation_deg) == 0:
        result.undefined(
            (*translation, *areas, "trajectory_error"),
            "no true camera moves, so the direction of translation is not defined",
        )
        return result
    result.metrics[translation[0]] = float(errors.translation_deg.mean())
    result.metrics[translation[1]] = float(np.median(errors.translation_deg))
    for name, threshold in zip(areas, AUC_THRESHOLDS_DEG):
        result.metrics[name] = pose_auc(errors, threshold)
    try:
        result.metrics["trajectory_error"] = trajectory_error(pred.centres(), true.centres())
    except ValueError as error:
        result.undefined(("trajectory_error",), f"no Sim(3) alignment of the camera centres: {error}")
    return result
