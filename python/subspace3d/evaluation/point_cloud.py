"""Point-to-point ICP, nearest-neighbour distances and normal consistency of two point clouds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array, Similarity

if TYPE_CHECKING:
    from scipy.spatial import cKDTree

ICP_TOLERANCE = 1e-6
ICP_ITERATIONS = 30
ICP_SOURCE_POINTS = 25_000
NORMAL_NEIGHBOURS = 30
MOST_QUERIES = 50_000
_NORMALS_AT_ONCE = 50_000  # bounds the memory of the gathered neighbours to 36 MB
_SYSTEM_LIBRARIES = "libusb-1.0-0 libgl1 libgomp1 libx11-6"


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
        bad = int(np.count_nonzero(~np.isfinite(self.points).all(axis=1)))
        if bad:
            raise ValueError(f"points must be finite, got {bad} of {len(self.points)} that are not")

    def __len__(self) -> int:
        return len(self.points)

    @cached_property
    def tree(self) -> cKDTree:
        from scipy.spatial import cKDTree

        # split at the middle of a cell instead of the median: as fast for near queries, 40 times faster for far ones
        return cKDTree(self.points, balanced_tree=False, compact_nodes=False)

    @cached_property
    def _known_normals(self) -> Array:
        return np.full(self.points.shape, np.nan)

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
        missing = np.unique(indices[np.isnan(normals[indices, 0])])
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


def import_open3d() -> Any:
    """The module open3d.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
        ImportError: it is installed, but a system library is missing; names the packages.
    """
    try:
        import open3d
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'point cloud metrics need {error.name}: pip install "subspace3d[eval]"', name=error.name
        ) from error
    except (ImportError, OSError) as error:
        raise ImportError(
            f"Open3D is installed but does not load ({error}); on Debian and Ubuntu its system libraries come with: "
            f"apt-get install -y {_SYSTEM_LIBRARIES}"
        ) from error
    return open3d


def icp(source: Array, target: Array, threshold: float, max_source_points: int = ICP_SOURCE_POINTS) -> IcpResult:
    """Rigid ``argmin_{R, t} sum |R x + t - nn(R x + t)|^2`` over pairs closer than ``threshold``, point to point.

    Open3D's registration_icp from the identity, stopped when fitness and RMSE both change by less than 1e-6, or after
    30 iterations. No scale is fitted, so align with `umeyama` before.

    Args:
        source (Array): float64 [n, 3], the prediction, already near ``target``. Of more than ``max_source_points``
            rows every (n // max_source_points)-th or so takes part; six parameters need no more.
        target (Array): float64 [m, 3], the truth; all of it takes part.
        threshold (float): largest distance of a pair, in units of the points.
        max_source_points (int): see ``source``.

    Raises:
        ValueError: ``threshold`` or ``max_source_points`` is not positive.
        ImportError: Open3D cannot be imported.
    """
    if not threshold > 0 or max_source_points < 1:
        raise ValueError(f"threshold and max_source_points must be positive, got {threshold} and {max_source_points}")
    open3d = import_open3d()
    registration = open3d.pipelines.registration
    clouds = [
        open3d.geometry.PointCloud(open3d.utility.Vector3dVector(np.ascontiguousarray(points, np.float64)))
        for points in (source[subsample(len(source), max_source_points)], target)
    ]
    result = registration.registration_icp(
        clouds[0],
        clouds[1],
        threshold,
        np.eye(4),
        registration.TransformationEstimationPointToPoint(),
        registration.ICPConvergenceCriteria(ICP_TOLERANCE, ICP_TOLERANCE, ICP_ITERATIONS),
    )
    matrix = np.asarray(result.transformation)
    motion = Similarity(1.0, matrix[:3, :3].copy(), matrix[:3, 3].copy())
    return IcpResult(motion, float(result.fitness), float(result.inlier_rmse))


def subsample(count: int, most: int) -> NDArray[np.intp]:
    """Indices of at most ``most`` of ``count`` rows, evenly spaced; all of them when there are no more."""
    if count <= most:
        return np.arange(count)
    return np.arange(most) * count // most


def surface_distances(
    pred: PointCloud | MovedCloud, true: PointCloud | MovedCloud, most_queries: int = MOST_QUERIES
) -> dict[str, float]:
    """``accuracy = mean_p min_q |p - q|``, ``completeness = mean_q min_p |p - q|``, p predicted, q true.

    The medians beside them, ``chamfer = (accuracy + completeness) / 2``, and over the same nearest pairs the normal
    consistency of either direction (1 is best), ``normal_consistency_accuracy = mean_p |n_p . n_q(p)|`` and
    ``normal_consistency_completeness = mean_q |n_q . n_p(q)|``, and their mean ``normal_consistency``. No distance is
    capped and no point is dropped from the minima; the means and medians of a cloud of more than ``most_queries``
    points are over that many evenly spaced ones.

    Args:
        pred (PointCloud | MovedCloud): prediction, aligned with ``true``.
        true (PointCloud | MovedCloud): truth; its unit is the unit of the distances.
        most_queries (int): bounds the time; a mean moves by less than its spread / sqrt(most_queries).
    """
    accuracy, forward = _one_way(pred, true, most_queries)
    completeness, backward = _one_way(true, pred, most_queries)
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_median": float(np.median(accuracy)),
        "completeness": float(completeness.mean()),
        "completeness_median": float(np.median(completeness)),
        "chamfer": float(accuracy.mean() + completeness.mean()) / 2,
        "normal_consistency": (forward + backward) / 2,
        "normal_consistency_accuracy": forward,
        "normal_consistency_completeness": backward,
    }


def _one_way(
    source: PointCloud | MovedCloud, target: PointCloud | MovedCloud, most_queries: int
) -> tuple[Array, float]:
    """Distances from ``source`` to the nearest points of ``target``, and the mean |n . n'| of these pairs."""
    chosen = subsample(len(source), most_queries)
    distances, nearest = target.nearest(source.at(chosen))
    agreement = np.einsum("ij,ij->i", source.normals(chosen), target.normals(nearest))
    return distances, float(np.abs(agreement).mean())
