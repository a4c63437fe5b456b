"""Point-to-point ICP, nearest-neighbour distances and normal consistency of two point clouds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, Similarity, umeyama

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

ICP_TOLERANCE = 1e-6
ICP_ITERATIONS = 30
ICP_SOURCE_POINTS = 25_000
NORMAL_NEIGHBOURS = 30
F_THRESHOLD = 0.05
MOST_QUERIES = 50_000
NORMAL_QUERIES = 20_000  # a normal costs ten times a distance
_NORMALS_AT_ONCE = 50_000  # bounds the memory of the gathered neighbours to 36 MB


@dataclass
class PointCloud:
    """Points with a search tree, and normals of those that were asked for; each is found once, on first use.

    Args:
        points (Array): float64 [n, 3].
    """

    points: Array

    def __post_init__(self) -> None:
        self.points = np.ascontiguousarray(self.points, np.float64)
        if self.points.ndim != 2 or self.points.shape[1] != 3 or len(self.points) == 0:
            raise ValueError(f"points must be [n >= 1, 3], got {self.points.shape}")
        finite = np.isfinite(self.points)
        if not finite.all():
            bad = np.count_nonzero(~finite.all(axis=1))
            raise ValueError(f"points must be finite, got {bad} of {len(self.points)} that are not")

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def tree(self) -> cKDTree:
        from scipy.spatial import cKDTree

        # split at the middle of a cell instead of the median: as fast for near queries, 40 times faster for far ones;
        # leaves of 48 points are looked through a quarter faster than the usual 16, far from them by two fifths
        return cKDTree(self.points, leafsize=48, balanced_tree=False, compact_nodes=False)

    @cached_property
    def _known_normals(self) -> Array:
        # zeros where unknown: memory that nobody looks at is never touched
        return np.zeros(self.points.shape)

    def at(self, indices: NDArray[np.intp]) -> Array:
        """Rows of ``points``."""
        return self.points[indices]

    def nearest(self, queries: Array) -> tuple[Array, NDArray[np.intp]]:
        """Distance to and index of the nearest point, for every row of ``queries`` [m, 3]; on all cores."""
        distances, indices = self.tree.query(queries, workers=-1)
        return distances, indices

    def normals(self, indices: NDArray[np.intp]) -> Array:
        """``argmin_|n|=1 sum_k (n . (x_k - mean x))^2`` over the 30 points x_k nearest to a point, itself included.

        The same as Open3D's estimate_normals with a KNN of 30, but only where it is asked for.

        Args:
            indices (NDArray): [m] rows of ``points``.

        Returns:
            Array: [m, 3] unit vectors of unknown sign.
        """
        normals = self._known_normals
        missing = np.unique(indices[~normals[indices].any(axis=1)])
        count = min(NORMAL_NEIGHBOURS, len(self.points))
        for start in range(0, len(missing), _NORMALS_AT_ONCE):
            part = missing[start : start + _NORMALS_AT_ONCE]
            _, neighbours = self.tree.query(self.points[part], k=range(1, count + 1), workers=-1)
            centred = self.points[neighbours]
            centred -= centred.mean(axis=1, keepdims=True)
            normals[part] = np.linalg.eigh(centred.transpose(0, 2, 1) @ centred)[1][:, :, 0]
        return normals[indices]


@dataclass(frozen=True)
class MovedCloud:
    """``cloud`` after ``motion``, with the tree and the normals of ``cloud``: neither is found anew.

    Args:
        cloud (PointCloud): [n, 3].
        motion (Similarity): into the frame that this cloud is in.
    """

    cloud: PointCloud
    motion: Similarity

    def __len__(self) -> int:
        return len(self.cloud)

    def at(self, indices: NDArray[np.intp]) -> Array:
        """Moved rows of the cloud's points."""
        return self.motion.apply(self.cloud.at(indices))

    def nearest(self, queries: Array) -> tuple[Array, NDArray[np.intp]]:
        """As `PointCloud.nearest`."""
        distances, indices = self.cloud.nearest(self.motion.inverse().apply(queries))
        return self.motion.scale * distances, indices

    def normals(self, indices: NDArray[np.intp]) -> Array:
        """As `PointCloud.normals`."""
        return self.cloud.normals(indices) @ self.motion.rotation.T


@dataclass(frozen=True)
class IcpResult:
    """A rigid motion found by ICP.

    Args:
        motion (Similarity): scale 1.
        fitness (float): share of source points with a target point within the threshold, at the end.
        inlier_rmse (float): root mean square distance of those pairs, in units of the points.
    """

    motion: Similarity
    fitness: float
    inlier_rmse: float


def icp(source: Array, target: PointCloud, threshold: float, max_source_points: int = ICP_SOURCE_POINTS) -> IcpResult:
    """Rigid ``argmin_{R, t} sum |R x + t - nn(R x + t)|^2`` over pairs closer than ``threshold``, point to point.

    From the identity, stopped when fitness and RMSE both change by less than 1e-6, or after 30 iterations: the rules of
    Open3D's registration_icp, on the search tree that ``target`` has anyway. No scale is fitted, so align with
    `umeyama` before.

    Args:
        source (Array): float64 [n, 3], the prediction, already near ``target``. Of more than ``max_source_points``
            rows every (n // max_source_points)-th or so takes part; six parameters need no more.
        target (PointCloud): the truth; all of it takes part.
        threshold (float): largest distance of a pair, in units of the points.
        max_source_points (int): see ``source``.

    Raises:
        ValueError: ``threshold`` or ``max_source_points`` is not positive.
    """
    if not threshold > 0 or max_source_points < 1:
        raise ValueError(f"threshold and max_source_points must be positive, got {threshold} and {max_source_points}")
    chosen = np.asarray(source, np.float64)[subsample(len(source), max_source_points)]
    motion = Similarity(1.0, np.eye(3), np.zeros(3))
    near, partners, fitness, rmse = _pairs(chosen, target, threshold)
    for _ in range(ICP_ITERATIONS):
        # fewer pairs, or pairs on a line, leave the rotation open
        if np.count_nonzero(near) < 3:
            break
        try:
            step = umeyama(motion.apply(chosen[near]), partners, with_scale=False)
        except ValueError:
            break
        motion, before = step.after(motion), (fitness, rmse)
        near, partners, fitness, rmse = _pairs(motion.apply(chosen), target, threshold)
        if abs(fitness - before[0]) < ICP_TOLERANCE and abs(rmse - before[1]) < ICP_TOLERANCE:
            break
    return IcpResult(motion, fitness, rmse)


def _pairs(points: Array, target: PointCloud, threshold: float) -> tuple[NDArray[np.bool_], Array, float, float]:
    """Which points have a partner, the partners, their share, and their root mean square distance."""
    distances, nearest = target.tree.query(points, distance_upper_bound=threshold, workers=-1)
    near = np.isfinite(distances)
    rmse = float(np.sqrt(np.mean(distances[near] ** 2))) if near.any() else 0.0
    return near, target.at(nearest[near]), float(near.mean()), rmse


def subsample(count: int, most: int) -> NDArray[np.intp]:
    """Indices of at most ``most`` of ``count`` rows, evenly spaced; all of them when there are no more."""
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most


def surface_distances(
    pred: PointCloud | MovedCloud,
    true: PointCloud | MovedCloud,
    most_queries: int = MOST_QUERIES,
    f_threshold: float = F_THRESHOLD,
) -> dict[str, float]:
    """``accuracy = mean_p min_q |p - q|``, ``completeness = mean_q min_p |p - q|``, p predicted, q true.

    The medians beside them, ``chamfer = (accuracy + completeness) / 2``, `f_score`, and over nearest pairs the normal
    consistency of either direction (1 is best), ``normal_consistency_accuracy = mean_p |n_p . n_q(p)|`` and
    ``normal_consistency_completeness = mean_q |n_q . n_p(q)|``, and their mean ``normal_consistency``. No distance is
    capped and no point is dropped from the minima; the means and medians of a cloud of more than ``most_queries``
    points are over that many evenly spaced ones, and normals over at most 20,000.

    Args:
        pred (PointCloud | MovedCloud): prediction, aligned with ``true``.
        true (PointCloud | MovedCloud): truth; its unit is the unit of the distances.
        most_queries (int): bounds the time; a mean moves by less than its spread / sqrt(most_queries).
        f_threshold (float): see `f_score`, in the unit of ``true``.
    """
    accuracy, forward = one_way(pred, true, most_queries)
    completeness, backward = one_way(true, pred, most_queries)
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_median": float(np.median(accuracy)),
        "completeness": float(completeness.mean()),
        "completeness_median": float(np.median(completeness)),
        "chamfer": float(accuracy.mean() + completeness.mean()) / 2,
        "f_score": f_score(accuracy, completeness, f_threshold),
        "normal_consistency": float(forward.mean() + backward.mean()) / 2,
        "normal_consistency_accuracy": float(forward.mean()),
        "normal_consistency_completeness": float(backward.mean()),
    }


def f_score(accuracy: Array, completeness: Array, threshold: float = F_THRESHOLD) -> float:
    """``2 P R / (P + R)``, 0 where both are 0: P, R the shares of either direction's distances below ``threshold``.

    Raises:
        ValueError: ``threshold`` is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    precision, recall = float(np.mean(accuracy < threshold)), float(np.mean(completeness < threshold))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def one_way(
    source: PointCloud | MovedCloud, target: PointCloud | MovedCloud, most_queries: int = MOST_QUERIES
) -> tuple[Array, Array]:
    """Distances from points of ``source`` to the nearest points of ``target``, and ``|n . n'|`` of such pairs.

    Returns:
        tuple: [min(n, most_queries)] and [min(n, most_queries, 20,000)], of evenly spaced points.
    """
    chosen = subsample(len(source), most_queries)
    distances, nearest = target.nearest(source.at(chosen))
    # those of the whole cloud and not of the chosen points, so that raw and aligned distances share their normals
    turned = subsample(len(source), min(NORMAL_QUERIES, most_queries))
    partners = np.full(len(turned), -1)
    _, known, places = np.intersect1d(turned, chosen, assume_unique=True, return_indices=True)
    partners[known] = nearest[places]
    unknown = partners < 0
    if unknown.any():
        partners[unknown] = target.nearest(source.at(turned[unknown]))[1]
    return distances, np.abs(np.einsum("ij,ij->i", source.normals(turned), target.normals(partners)))
