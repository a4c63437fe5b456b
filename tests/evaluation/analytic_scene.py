"""A scene in closed form: a ball in front of a tilted wall, seen by cameras on an arc."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from subspace3d.evaluation.scene_metrics import Views
from subspace3d.formats.scene import write_scene

BALL = np.array([0.2, -0.1, 0.0])
RADIUS = 0.5
WALL = np.array([0.1, 0.2, 1.0]) / np.linalg.norm([0.1, 0.2, 1.0])
WALL_OFFSET = 0.8


def look_at(centre: np.ndarray, target: np.ndarray) -> np.ndarray:
    """OpenCV camera-from-world [3, 4] of a camera at ``centre`` whose z axis meets ``target``."""
    forward = (target - centre) / np.linalg.norm(target - centre)
    right = np.cross([0.0, 1.0, 0.0], forward)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    return np.concatenate([rotation, (-rotation @ centre)[:, None]], axis=1)


def ball_and_wall(views: int = 4, size: int = 56, shift: float = 0.0) -> tuple[np.ndarray, Views]:
    """Images uint8 [S, H, W, 3] and true views; the corner pixels of each map have no depth."""
    intrinsic = np.array([[1.1 * size, 0, size / 2], [0, 1.1 * size, size / 2], [0, 0, 1]])
    rays = np.stack([*np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), np.ones((size, size))], axis=-1)
    rays = rays @ np.linalg.inv(intrinsic).T
    images, depths, extrinsics = [], [], []
    for angle in np.linspace(-0.5, 0.5, views) + shift:
        centre = np.array([2.2 * np.sin(angle), 0.3 * angle - 0.4, -2.2 * np.cos(angle)])
        extrinsic = look_at(centre, np.zeros(3))
        directions = rays @ extrinsic[:, :3]  # z in the camera is 1, so the ray parameter is the z-depth
        wall = (WALL_OFFSET - centre @ WALL) / (directions @ WALL)
        a = (directions**2).sum(-1)
        b = directions @ (centre - BALL)
        root = b**2 - a * ((centre - BALL) @ (centre - BALL) - RADIUS**2)
        depth = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, wall)
        points = centre + depth[..., None] * directions
        depth[:3, :3] = 0
        images.append(np.uint8(127 + 100 * np.sin(5 * points)))
        depths.append(depth)
        extrinsics.append(extrinsic)
    return np.stack(images), Views(np.stack(depths), np.repeat(intrinsic[None], views, 0), np.stack(extrinsics))


def write_analytic_scene(folder: Path, views: int = 4, size: int = 56, shift: float = 0.0, every: int = 1) -> None:
    """Write `ball_and_wall`; only every ``every``-th row and column keeps its depth."""
    images, true = ball_and_wall(views, size, shift)
    masks = np.zeros(true.depths.shape, bool)
    masks[:, ::every, ::every] = True
    depths = true.depths.astype(np.float32)
    write_scene(folder, images, depths, true.intrinsics, true.extrinsics, provenance={}, masks=masks)
