"""Scenes small enough for unit tests: cameras in front of a textured plane, depth and images in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from subspace3d.formats.scene import write_scene


def plane_views(seed: int, views: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images, depths, intrinsics and extrinsics of ``views`` cameras that look at a tilted plane about 2 units away."""
    rng = np.random.default_rng(seed)
    normal = np.array([*rng.uniform(-0.3, 0.3, 2), -1.0])
    normal /= np.linalg.norm(normal)
    distance = -rng.uniform(1.5, 2.5)
    frequency, phase = rng.uniform(2, 6, (3, 3)), rng.uniform(0, 6, 3)
    focal = size * rng.uniform(0.9, 1.3)
    intrinsic = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
    pixels = np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5), -1)
    rays = np.concatenate([(pixels - size / 2) / focal, np.ones((size, size, 1))], -1)
    images, depths, extrinsics = [], [], []
    for _ in range(views):
        x, y = rng.uniform(-0.2, 0.2, 2)
        about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
        about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
        rotation, centre = about_x @ about_y, rng.uniform(-0.3, 0.3, 3)
        directions = rays @ rotation
        # the ray's z in the camera is 1, so its parameter is the z-depth
        depth = (distance - centre @ normal) / (directions @ normal)
        points = centre + depth[..., None] * directions
        images.append(np.uint8(127 + 120 * np.sin(points @ frequency.T + phase)))
        depths.append(depth)
        extrinsics.append(np.concatenate([rotation, (-rotation @ centre)[:, None]], 1))
    depths = np.stack(depths).astype(np.float32)
    return np.stack(images), depths, np.repeat(intrinsic[None], views, 0), np.stack(extrinsics)


def write_plane_scenes(folder: Path, scenes: int = 3, views: int = 4, size: int = 28, seed: int = 0) -> Path:
    """Write ``scenes`` scene folders below ``folder``."""
    for index in range(scenes):
        write_scene(folder / f"scene_{index:04d}", *plane_views(100 * seed + index, views, size), provenance={})
    return folder
