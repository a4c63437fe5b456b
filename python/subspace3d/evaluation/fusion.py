"""Depth maps fused into one surface by a truncated signed distance field, and points spread over it; by Open3D."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from subspace3d.evaluation.alignment import Array

if TYPE_CHECKING:
    from subspace3d.evaluation.scene_metrics import Views

_BLOCK = 16  # voxels along a side of the blocks that are allocated, 32 KB each
_MOST_BLOCKS = 10_000  # a room of 150 square metres at 8 mm; with their neighbours at most about 1.5 GB
_SYSTEM_LIBRARIES = "libusb-1.0-0 libgl1 libgomp1 libx11-6"


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
            f'fused surfaces need {error.name}: pip install "subspace3d[eval]"', name=error.name
        ) from error
    except (ImportError, OSError) as error:
        raise ImportError(
            f"Open3D is installed but does not load ({error}); on Debian and Ubuntu its system libraries come with: "
            f"apt-get install -y {_SYSTEM_LIBRARIES}"
        ) from error
    return open3d


def fuse(views: Views, voxel: float, truncation: float) -> tuple[Array, Array]:
    """The zero level of the depth maps' truncated signed distance field.

    Args:
        views (Views): depth maps (0: none) and cameras; every pixel with depth is used.
        voxel (float): side of a voxel, in the unit of the depths.
        truncation (float): distance from a surface at which the field ends, in the same unit.

    Returns:
        tuple[Array, Array]: corners [n, 3] and triangles [m, 3] (indices of corners); both empty without a surface.

    Raises:
        ValueError: the surface would take more voxels than fit, or a setting is not positive.
        ImportError: Open3D cannot be imported.
    """
    if not (voxel > 0 and truncation > 0):
        raise ValueError(f"voxel and truncation must be positive, got {voxel} and {truncation}")
    blocks = _blocks(views.points(views.depths > 0), voxel)
    if blocks > _MOST_BLOCKS:
        raise ValueError(
            f"the surface must fit into {_MOST_BLOCKS} blocks of {_BLOCK} voxels of {voxel:.4g} a side, got {blocks}: "
            "it is too large for voxels of this size"
        )
    open3d = import_open3d()
    core, reach, ends = open3d.core, truncation / voxel, 2 * float(views.depths.max()) + 1
    grid = open3d.t.geometry.VoxelBlockGrid(
        attr_names=("tsdf", "weight"),
        attr_dtypes=(core.float32, core.float32),
        attr_channels=(1, 1),
        voxel_size=voxel,
        block_resolution=_BLOCK,
        block_count=max(1, 4 * blocks),
    )
    for depth, intrinsic, extrinsic in zip(views.depths, views.calibration, views.poses):
        if not (depth > 0).any():
            continue
        image = open3d.t.geometry.Image(core.Tensor(np.ascontiguousarray(depth[..., None], np.float32)))
        # Open3D puts the centre of the first pixel at (0, 0)
        camera = core.Tensor(np.array(intrinsic, np.float64) - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        pose = core.Tensor(np.concatenate([extrinsic, [[0.0, 0, 0, 1]]]))
        found = grid.compute_unique_block_coordinates(image, camera, pose, 1.0, ends, reach)
        grid.integrate(found, image, camera, pose, 1.0, ends, reach)
    mesh = grid.extract_triangle_mesh(0.0)
    if mesh.is_empty():
        return np.empty((0, 3)), np.empty((0, 3), np.int64)
    corners, triangles = mesh.vertex.positions.numpy().astype(np.float64), mesh.triangle.indices.numpy()
    # threads find the triangles in an order of their own; sorted by their middles they are the same in every run
    return corners, triangles[np.lexsort(corners[triangles].sum(axis=1).T)]


def spread_points(corners: Array, triangles: Array, count: int, seed: int = 42) -> Array:
    """``count`` points [count, 3], uniform over the area of the triangles; none where there is no area.

    With u, v uniform in 0..1 a point is ``(1 - sqrt u) a + sqrt u (1 - v) b + sqrt u v c``.
    """
    if len(triangles) == 0:
        return np.empty((0, 3))
    a, b, c = (corners[triangles[:, side]] for side in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not area.sum() > 0:
        return np.empty((0, 3))
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(area), size=count, p=area / area.sum()))
    root, v = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    return (1 - root) * a[chosen] + root * (1 - v) * b[chosen] + root * v * c[chosen]


def one_per_voxel(points: Array, voxel: float) -> Array:
    """The mean of the points in every voxel that has any; the grid starts half a voxel below the least coordinates."""
    if len(points) == 0:
        return points
    _, cell, counts = _cells(points - (points.min(axis=0) - voxel / 2), voxel)
    return np.stack([np.bincount(cell, weights=points[:, axis]) / counts for axis in range(3)], axis=1)


def _blocks(points: Array, voxel: float) -> int:
    return 0 if len(points) == 0 else len(_cells(points - points.min(axis=0), _BLOCK * voxel)[0])


def _cells(points: Array, size: float) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the cells of this size that hold points, none of them negative, the cell of each point, and counts.

    Raises:
        ValueError: more cells than numbers.
    """
    cells = np.floor(points / size)
    extent = cells.max(axis=0) + 1
    if not extent.prod() < 2**63:
        raise ValueError(f"the points must fit into 2^63 cells of {size:.4g}, got {extent.prod():.3g}")
    rows, columns, layers = cells.astype(np.int64).T
    numbers = (rows * int(extent[1]) + columns) * int(extent[2]) + layers
    return np.unique(numbers, return_inverse=True, return_counts=True)
