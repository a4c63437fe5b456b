"""A coloured plane seen by any camera, in closed form; what readers make of it is checked against it."""

from __future__ import annotations

import numpy as np

NORMAL = np.array([0.2, -0.1, -1.0])
OFFSET = -2.0  # NORMAL . X = OFFSET: about 2 m in front of the origin
FREQUENCY = np.array([[3.0, 1.0, 0.5], [0.5, 2.5, 1.0], [1.0, -2.0, 2.0]])


def rotation(x: float, y: float, z: float = 0.0) -> np.ndarray:
    """Rotation about z, then y, then x, in radians."""
    about = []
    for axis, angle in enumerate((x, y, z)):
        matrix, (i, j) = np.eye(3), [(1, 2), (2, 0), (0, 1)][axis]
        matrix[i, i] = matrix[j, j] = np.cos(angle)
        matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
        about.append(matrix)
    return about[0] @ about[1] @ about[2]


def camera_path(views: int, reach: float = 0.3) -> list[np.ndarray]:
    """w2c [3, 4] of cameras that move sideways and turn a little; no two alike."""
    poses = []
    for index in range(views):
        share = index / max(1, views - 1) - 0.5
        turn = rotation(0.2 * share, -0.3 * share, 0.4 * share)
        centre = reach * np.array([2 * share, share**2, -share])
        poses.append(np.c_[turn, -turn @ centre])
    return poses


def camera_matrix(width: int, height: int) -> np.ndarray:
    """Pixels from the corner, with a principal point off the middle and fx other than fy."""
    return np.array([[1.1 * width, 0, 0.53 * width], [0, 1.15 * width, 0.46 * height], [0, 0, 1]])


def view(intrinsic: np.ndarray, extrinsic: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] and z-depth float64 [H, W] of the plane."""
    rays = _rays(intrinsic, height, width) @ extrinsic[:, :3]
    centre = -extrinsic[:, :3].T @ extrinsic[:, 3]
    depth = (OFFSET - NORMAL @ centre) / (rays @ NORMAL)
    return color(centre + depth[..., None] * rays), depth


def color(points: np.ndarray) -> np.ndarray:
    return np.rint(127 + 120 * np.sin(points @ FREQUENCY.T)).astype(np.uint8)


def world_points(depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray) -> np.ndarray:
    points = depth[..., None] * _rays(intrinsic, *depth.shape)
    return (points - extrinsic[:, 3]) @ extrinsic[:, :3]


def plane_error(depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray) -> float:
    """Largest distance of the points of a depth map from the plane, where depth is valid."""
    points = world_points(depth, intrinsic, extrinsic)[depth > 0]
    return float(np.abs(points @ NORMAL - OFFSET).max() / np.linalg.norm(NORMAL))


def color_error(image: np.ndarray, depth: np.ndarray, intrinsic: np.ndarray, extrinsic: np.ndarray) -> float:
    """Largest difference between an image and the plane's colour at its points, where depth is valid."""
    expected = color(world_points(depth, intrinsic, extrinsic))
    return float(np.abs(image.astype(int) - expected)[depth > 0].max())


def _rays(intrinsic: np.ndarray, height: int, width: int) -> np.ndarray:
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(intrinsic).T
