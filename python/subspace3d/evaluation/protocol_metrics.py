"""What each published protocol measures on one scene. `protocols` says where each comes from and how it differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, Similarity, umeyama
from subspace3d.evaluation.depth import frame_affine_errors
from subspace3d.evaluation.fusion import fuse, one_per_voxel, spread_points
from subspace3d.evaluation.point_cloud import F_THRESHOLD, MovedCloud, PointCloud, f_score, icp, one_way
from subspace3d.evaluation.pose import (
    camera_centres,
    consensus_alignment,
    moved_cameras,
    rotation_angles,
    step_errors,
    trajectory_error,
)
from subspace3d.evaluation.scene_metrics import (
    NO_POSES,
    ONLY_TURNS,
    PER_METRE,
    SceneResult,
    Views,
    metric_unit,
    valid_mask,
)
from subspace3d.evaluation.video_depth import video_depth_errors

ICP_THRESHOLDS = {"mm": 100.0}  # by the unit's name: that of DTU
ICP_THRESHOLD = 0.1
MOST_DEPTH = 70.0  # metres
SURFACE = (
    "accuracy", "accuracy_median", "completeness", "completeness_median", "normal_consistency",
    "normal_consistency_median",
)  # fmt: skip
CENTRE_SHARE = 224 / 512  # of the width, and as many pixels of the height
VOXEL = 4.0 / 512.0
TRUNCATION = 0.04
SURFACE_POINTS = 1_000_000
DTU_DENSITY = 0.2  # mm
DTU_CAP = 20.0  # mm

Pair = Literal["first_from_second", "second_from_first", "world"]


@dataclass
class Measured:
    """A prediction and the truth, and what several protocols need of them; each is found once, on first use.

    Args:
        pred (Views): prediction in any world frame and unit.
        true (Views): truth; its unit is the unit of all distances.
    """

    pred: Views
    true: Views

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        return valid_mask(self.true)

    @cached_property
    def pred_cloud(self) -> PointCloud:
        return PointCloud(self.pred.points(self.mask))

    @cached_property
    def true_cloud(self) -> PointCloud:
        return PointCloud(self.true.points(self.mask))

    @cached_property
    def similarity(self) -> Similarity:
        return umeyama(self.pred_cloud.points, self.true_cloud.points)

    @property
    def icp_threshold(self) -> float:
        return ICP_THRESHOLDS.get(self.true.unit, ICP_THRESHOLD)

    @cached_property
    def depth_errors(self) -> dict[str, tuple[float, float]]:
        metre = PER_METRE.get(self.true.unit)
        most = None if metre is None else metre * MOST_DEPTH
        return video_depth_errors(self.pred.depths, self.true.depths, self.mask, most, metre or 1.0)


def measure_vggt(scene: Measured) -> SceneResult:
    """AUC of poses; surfaces after Umeyama's Sim(3) alone."""
    result = SceneResult()
    _poses(result, scene, "first_from_second", (3, 5, 15, 30))
    names = ("accuracy", "completeness", "overall")

    def measured() -> dict[str, float]:
        return _surface(MovedCloud(scene.pred_cloud, scene.similarity), scene.true_cloud, names)

    _tried(result, names, measured, scene)
    return result


def measure_pi3(scene: Measured) -> SceneResult:
    """AUC of poses, trajectory, surfaces after Sim(3) and ICP, video depth."""
    result = SceneResult()
    _poses(result, scene, "second_from_first", (5, 15, 30))
    _trajectory(result, scene)
    _aligned_surface(result, scene)
    _video_depth(result, scene, ("scale", "scale_shift"))
    return result


def measure_cut3r(scene: Measured) -> SceneResult:
    """Trajectory, surfaces of the images' centres after medians and ICP, video depth."""
    result = SceneResult()
    _trajectory(result, scene)
    _tried(result, SURFACE, lambda: _centre_surface(scene))
    _video_depth(result, scene, ("scale", "scale_shift", "metric"))
    return result


def measure_da3(scene: Measured) -> SceneResult:
    """AUC of poses; surfaces fused from the depth maps, seen from predicted and from true cameras."""
    result = SceneResult()
    _poses(result, scene, "world", (3, 5, 15, 30))
    posed = ("f_score_posed", "overall_posed")
    unposed = ("f_score", "precision", "recall", "accuracy", "completeness", "overall")

    @cache
    def aligned() -> tuple[Similarity, Array, Array]:
        alignment = _consensus(scene)
        truth = Views(_visible_depths(scene.true, scene), scene.true.calibration, scene.true.poses)
        return alignment, alignment.scale * _visible_depths(scene.pred, scene), _fused_points(truth)

    def own() -> dict[str, float]:
        intrinsics = scene.pred.calibration
        alignment, depths, truth = aligned()
        cameras = moved_cameras(scene.pred.poses, alignment)
        values = f_scores(_fused_points(Views(depths, intrinsics, cameras)), truth)
        return {name: values[name] for name in unposed}

    def given() -> dict[str, float]:
        _, depths, truth = aligned()
        values = f_scores(_fused_points(Views(depths, scene.true.calibration, scene.true.poses)), truth)
        return {"f_score_posed": values["f_score"], "overall_posed": values["overall"]}

    _tried(result, unposed, own)
    _tried(result, posed, given)
    if scene.true.unit == "mm":
        _tried(result, ("overall_dtu",), lambda: _dtu(scene))
    else:
        result.undefined(("overall_dtu",), f"DTU's limits are in millimetres, the scene's unit is {scene.true.unit}")
    return result


def measure_authors(scene: Measured) -> SceneResult:
    """Surfaces after Sim(3) and ICP; depth with one scale and shift a frame, fitted to the truth."""
    result = SceneResult()
    _aligned_surface(result, scene)
    names = ("abs_rel_frame_affine", "delta_frame_affine")

    def measured() -> dict[str, float]:
        error, share, _, _ = frame_affine_errors(scene.pred.depths, scene.true.depths, scene.mask)
        return dict(zip(names, (error, share)))

    _tried(result, names, measured)
    return result


# ---- poses -----------------------------------------------------------------------------------------------------------


def pair_errors(pred: Array, true: Array, pair: Pair) -> tuple[Array, Array]:
    """Rotation and translation errors in degrees of all frame pairs i < j, E being camera-from-world.

    ``first_from_second``: of ``E_i E_j^-1``. ``second_from_first``: of ``E_j E_i^-1``. ``world``: of ``F_i^-1 F_j``
    with ``F = E E_0^-1``, which is no pose of one camera relative to another. The direction of the translation counts
    up to its sign: 0 to 90 degrees, and 90 where either has no length.

    Args:
        pred (Array): [S, 3, 4] predicted camera-from-world.
        true (Array): [S, 3, 4] true camera-from-world.
        pair (str): one of the above.
    """
    (turns, moves), (true_turns, true_moves) = (_pair_poses(extrinsics, pair) for extrinsics in (pred, true))
    rotation = rotation_angles(turns, true_turns)
    cross = np.linalg.norm(np.cross(moves, true_moves), axis=1)
    dot = np.abs(np.einsum("pi,pi->p", moves, true_moves))
    direction = np.degrees(np.arctan2(cross, dot))
    return rotation, np.where((cross == 0) & (dot == 0), 90.0, direction)


def _pair_poses(extrinsics: Array, pair: Pair) -> tuple[Array, Array]:
    first, second = np.triu_indices(len(extrinsics), k=1)
    poses = np.concatenate([extrinsics, np.tile([[[0.0, 0, 0, 1]]], (len(extrinsics), 1, 1))], axis=1)
    inverse = np.linalg.inv(poses)
    if pair == "world":
        poses, inverse = poses @ inverse[0], poses[0] @ inverse
        combined = inverse[first] @ poses[second]
    elif pair == "first_from_second":
        combined = poses[first] @ inverse[second]
    else:
        combined = poses[second] @ inverse[first]
    return combined[:, :3, :3], combined[:, :3, 3]


def auc(rotation: Array, direction: Array, threshold_deg: int) -> float:
    """``mean over t = 1, ..., T of the share of pairs with max(rotation, direction) < t``, and <= t at t = T."""
    worse = np.maximum(rotation, direction)
    shares = np.mean(worse[:, None] < np.arange(1, threshold_deg + 1), axis=0)
    shares[-1] = np.mean(worse <= threshold_deg)
    return float(shares.mean())


def _poses(result: SceneResult, scene: Measured, pair: Pair, thresholds: tuple[int, ...]) -> None:
    names = tuple(f"auc_{threshold}" for threshold in thresholds)
    if scene.pred.extrinsics is None:
        result.undefined(names, NO_POSES)
    elif len(scene.true.poses) < 2:
        result.undefined(names, "relative poses need at least 2 frames, got 1")
    elif not scene.true.translation_known:
        result.undefined(names, ONLY_TURNS)
    else:
        errors = pair_errors(scene.pred.poses, scene.true.poses, pair)
        result.metrics |= {name: auc(*errors, threshold) for name, threshold in zip(names, thresholds)}


def _trajectory(result: SceneResult, scene: Measured) -> None:
    names = ("ate", "rpe_translation", "rpe_rotation_deg")

    def measured() -> dict[str, float]:
        ate = trajectory_error(scene.pred.centres(), scene.true.centres())
        return dict(zip(names, (ate, *step_errors(scene.pred.poses, scene.true.poses))))

    _tried(result, names, measured, scene)


# ---- surfaces --------------------------------------------------------------------------------------------------------


def _tried(
    result: SceneResult, names: tuple[str, ...], measured: Callable[[], dict[str, float]], scene: Measured | None = None
) -> None:
    """Add what ``measured`` returns, or say why there is nothing."""
    if scene is not None and not scene.true.translation_known:
        result.undefined(names, ONLY_TURNS)
        return
    try:
        result.add(measured())
    except ValueError as error:
        result.undefined(names, str(error))


def _surface(pred: PointCloud | MovedCloud, true: PointCloud | MovedCloud, names: tuple[str, ...]) -> dict[str, float]:
    accuracy, forward = one_way(pred, true)
    completeness, backward = one_way(true, pred)
    values = {
        "accuracy": accuracy.mean(),
        "accuracy_median": np.median(accuracy),
        "completeness": completeness.mean(),
        "completeness_median": np.median(completeness),
        "overall": (accuracy.mean() + completeness.mean()) / 2,
        "normal_consistency": (forward.mean() + backward.mean()) / 2,
        "normal_consistency_median": (np.median(forward) + np.median(backward)) / 2,
    }
    return {name: float(values[name]) for name in names}


def _aligned_surface(result: SceneResult, scene: Measured) -> None:
    def measured() -> dict[str, float]:
        first = scene.similarity
        refined = icp(first.apply(scene.pred_cloud.points), scene.true_cloud, scene.icp_threshold)
        return _surface(MovedCloud(scene.pred_cloud, refined.motion.after(first)), scene.true_cloud, SURFACE)

    _tried(result, SURFACE, measured, scene)


def median_alignment(pred: Array, true: Array) -> Similarity:
    """The scale and shift along z that make two medians of ``pred`` [n, 3] those of ``true`` [n, 3].

    Both clouds are seen from their own first camera. With m the median of z, c the median of each coordinate and r the
    median distance from ``c``: ``x -> (r* / r) (x - (0, 0, m)) + (0, 0, m*)``. A
    median of an even number of values is the lower of the two in the middle.

    Raises:
        ValueError: the predicted points have no spread.
    """
    shifts, spreads = [], []
    for points in (pred, true):
        shift = np.array([0.0, 0.0, _lower_median(points[:, 2])])
        centre = np.array([_lower_median(points[:, axis]) for axis in range(3)])
        shifts.append(shift)
        spreads.append(_lower_median(np.linalg.norm(points - centre, axis=1)))
    spread = min(max(spreads[0], 1e-3), 1e3)
    if spreads[0] == 0:
        raise ValueError("the predicted points must have a spread, got none")
    scale = spreads[1] / spread
    return Similarity(scale, np.eye(3), shifts[1] - scale * shifts[0])


def _lower_median(values: Array) -> float:
    middle = (len(values) - 1) // 2
    return float(np.partition(values, middle)[middle])


def centre_crop(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """``mask`` [S, H, W] inside the square about the middle whose side is 224 / 512 of the width."""
    height, width = mask.shape[1:]
    half = max(1, round(width * CENTRE_SHARE / 2))
    rows = slice(max(0, height // 2 - half), height // 2 + half)
    inside = np.zeros(mask.shape, bool)
    inside[:, rows, width // 2 - half : width // 2 + half] = True
    return mask & inside


def _centre_surface(scene: Measured) -> dict[str, float]:
    if not scene.true.translation_known:
        raise ValueError(ONLY_TURNS)
    fitted = median_alignment(
        scene.pred.first_camera().apply(scene.pred_cloud.points),
        scene.true.first_camera().apply(scene.true_cloud.points),
    )
    to_world = scene.true.first_camera().inverse().after(fitted).after(scene.pred.first_camera())
    inside = centre_crop(scene.mask)
    if np.count_nonzero(inside) < 3:
        raise ValueError(f"the centre must hold at least 3 pixels with depth, got {np.count_nonzero(inside)}")
    pred, true = PointCloud(scene.pred.points(inside)), PointCloud(scene.true.points(inside))
    refined = icp(to_world.apply(pred.points), true, scene.icp_threshold)
    return _surface(MovedCloud(pred, refined.motion.after(to_world)), true, SURFACE)


def _consensus(scene: Measured) -> Similarity:
    if not scene.true.translation_known:
        raise ValueError(ONLY_TURNS)
    return consensus_alignment(camera_centres(scene.pred.poses), camera_centres(scene.true.poses))


def _visible_depths(views: Views, scene: Measured) -> Array:
    """The depths of ``views`` where the truth has some and they are in front of the camera, else 0."""
    return np.where(scene.mask & (views.depths > 0), views.depths, 0.0)


def _fused_points(views: Views) -> Array:
    return one_per_voxel(spread_points(*fuse(views, VOXEL, TRUNCATION), SURFACE_POINTS), VOXEL)


def f_scores(pred: Array, true: Array, threshold: float = F_THRESHOLD) -> dict[str, float]:
    """`f_score` with its precision and recall; accuracy and completeness, the mean distances, and overall, their mean.

    Args:
        pred (Array): [n, 3] predicted points, aligned.
        true (Array): [m, 3] true points.
        threshold (float): in the unit of the points.

    Raises:
        ValueError: either has no points.
    """
    for name, points in (("predicted", pred), ("true", true)):
        if len(points) == 0:
            raise ValueError(f"the {name} surface must have points, got none")
    clouds = PointCloud(pred), PointCloud(true)
    forward, _ = clouds[1].nearest(pred)
    backward, _ = clouds[0].nearest(true)
    precision, recall = float(np.mean(forward < threshold)), float(np.mean(backward < threshold))
    return {
        "f_score": f_score(forward, backward, threshold),
        "precision": precision,
        "recall": recall,
        "accuracy": float(forward.mean()),
        "completeness": float(backward.mean()),
        "overall": float(forward.mean() + backward.mean()) / 2,
    }


def dtu_overall(pred: Array, true: Array, density: float = DTU_DENSITY, cap: float = DTU_CAP) -> float:
    """DTU's overall: the mean of accuracy and completeness, distances of ``cap`` and more left out of either.

    The prediction is thinned first: in a random order every point that is left drops its neighbours within ``density``.

    Args:
        pred (Array): [n, 3] predicted points, aligned.
        true (Array): [m, 3] true points, as dense as they are to count.
        density (float): in the unit of the points.
        cap (float): in the unit of the points.

    Raises:
        ValueError: no distance of one direction is below ``cap``.
    """
    clouds = PointCloud(thinned(pred, density)), PointCloud(true)
    means = []
    for source, target in (clouds, clouds[::-1]):
        distances, _ = target.nearest(source.points)
        near = distances[distances < cap]
        if near.size == 0:
            raise ValueError(f"some points must lie within {cap} of the other surface, got none")
        means.append(float(near.mean()))
    return (means[0] + means[1]) / 2


def thinned(points: Array, density: float, seed: int = 42) -> Array:
    """``points`` [n, 3] without those that lie within ``density`` of one that was kept before, in a random order."""
    order = np.random.default_rng(seed).permutation(len(points))
    points = points[order]
    tree, kept = PointCloud(points).tree, np.ones(len(points), bool)
    for start in range(0, len(points), 100_000):
        found = tree.query_ball_point(points[start : start + 100_000], density, workers=-1)
        for index, neighbours in enumerate(found, start):
            if kept[index]:
                kept[neighbours] = False
                kept[index] = True
    return points[kept]


def _dtu(scene: Measured) -> dict[str, float]:
    alignment = _consensus(scene)
    depths = alignment.scale * _visible_depths(scene.pred, scene)
    moved = Views(depths, scene.pred.calibration, moved_cameras(scene.pred.poses, alignment))
    return {"overall_dtu": dtu_overall(moved.points(depths > 0), thinned(scene.true_cloud.points, DTU_DENSITY))}


# ---- depth -----------------------------------------------------------------------------------------------------------


def _video_depth(result: SceneResult, scene: Measured, alignments: tuple[str, ...]) -> None:
    for alignment in alignments:
        names = (f"abs_rel_{alignment}", f"delta_{alignment}")

        def measured(alignment: str = alignment, names: tuple[str, ...] = names) -> dict[str, float]:
            if alignment == "metric":
                metric_unit(scene.pred, scene.true)
            return dict(zip(names, scene.depth_errors[alignment]))

        _tried(result, names, measured)
