"""Pinhole cameras: rays, projection, unprojection, poses.

Frames and units: cameras have OpenCV axes (x right, y down, z forward). Extrinsics ``[R | t]`` ``[..., 3, 4]`` are
camera-from-world, intrinsics ``K`` ``[..., 3, 3]`` in pixels. The centre of the top-left pixel is (0.5, 0.5). Depth is
z in the camera, in the unit of the translations; 0 marks a pixel without depth.

NumPy arrays and torch tensors alike; torch is only imported for tensors.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np

FLIP = np.diag([1.0, -1.0, -1.0])
"""From the axes of OpenGL (x right, y up, z backward) to those of OpenCV, and back."""
_FAR = 1e3  # units
ArrayOrTensor = TypeVar("ArrayOrTensor", bound=Any)


def intrinsic_matrix(hfov: float, width: int, height: int | None = None) -> np.ndarray:
    """K [3, 3] in pixels: f = (width / 2) / tan(hfov / 2), principal point in the middle.

    Args:
        hfov (float): horizontal field of view, degrees.
        width (int): of the image, pixels.
        height (int | None): of the image, pixels; none: a square.
    """
    focal = width / 2 / np.tan(np.deg2rad(hfov) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, (height or width) / 2], [0, 0, 1]])


def look_at(position: np.ndarray, target: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """Extrinsics [3, 4] of a camera at ``position`` [3] that sees ``target`` [3] straight ahead.

    World z points up in the image unless the camera looks along it; ``roll`` (degrees) then turns the camera about its
    viewing direction.
    """
    forward = target - position
    forward = forward / np.linalg.norm(forward)
    up = np.array([0.0, 0.0, 1.0]) if abs(forward[2]) < 0.999 else np.array([0.0, 1.0, 0.0])
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    cos, sin = np.cos(np.deg2rad(roll)), np.sin(np.deg2rad(roll))
    rotation = np.stack([cos * right + sin * down, cos * down - sin * right, forward])
    return np.concatenate([rotation, (-rotation @ position)[:, None]], axis=1)


def invert_pose(pose: np.ndarray) -> np.ndarray:
    """``[R^T | -R^T t]`` of a rigid ``[R | t]``, [..., 3, 4]: camera-from-world to world-from-camera, or back."""
    transposed = np.swapaxes(pose[..., :3], -1, -2)
    return np.concatenate([transposed, -transposed @ pose[..., 3:]], axis=-1)


def near_origin(extrinsics: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Extrinsics [S, 3, 4] in a world whose origin is the first camera's centre ``c = -R_0^T t_0``: ``t_i + R_i c``.

    Only where a camera is more than 1000 units from the origin: there coordinates lose more than 6e-5 units as float32,
    and half a unit where they are those of a map. The second value is c, or None where all is near and left as it is.
    """
    rotations, translations = extrinsics[:, :, :3], extrinsics[:, :, 3]
    if np.abs(translations).max(initial=0.0) <= _FAR:
        return extrinsics, None
    centre = -rotations[0].T @ translations[0]
    return np.concatenate([rotations, (translations + rotations @ centre)[..., None]], axis=2), centre


def pixel_centres(height: int, width: int) -> np.ndarray:
    """(x, y) of every pixel's centre, float64 [H, W, 2]."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([x, y], axis=-1)


def camera_rays(intrinsic: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """``K^-1 (x, y, 1)^T`` [..., 3], of z = 1, for one camera's ``K`` [3, 3] and ``pixels`` (x, y) [..., 2]."""
    return np.concatenate([pixels, np.ones_like(pixels[..., :1])], axis=-1) @ np.linalg.inv(intrinsic).T


def project(points: np.ndarray, extrinsic: np.ndarray, intrinsic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``z (x, y, 1)^T = K (R X + t)``: pixels (x, y) [..., 2] and depths z [...] of world points [..., 3].

    Points in the plane of the camera (z = 0) have pixels that are not finite, points behind it (z < 0) none that means
    anything: look at z first.
    """
    camera = points @ extrinsic[:, :3].T + extrinsic[:, 3]
    image = camera @ intrinsic.T
    with np.errstate(divide="ignore", invalid="ignore"):
        return image[..., :2] / image[..., 2:], camera[..., 2]


def unproject(depth: ArrayOrTensor, extrinsics: ArrayOrTensor, intrinsics: ArrayOrTensor) -> ArrayOrTensor:
    """``X = R^T (d K^-1 (j + 0.5, i + 0.5, 1)^T - t)`` for the pixel in row i and column j.

    Args:
        depth: [..., H, W] z-depth.
        extrinsics: [..., 3, 4] camera-from-world, translation in the unit of ``depth``.
        intrinsics: [..., 3, 3] in pixels.

    Returns:
        [..., H, W, 3] world points in the unit of ``depth``; a pixel without depth (0) gives the camera's centre.

    Raises:
        ValueError: wrong shapes.
    """
    check_shape("extrinsics", extrinsics, (3, 4))
    check_shape("intrinsics", intrinsics, (3, 3))
    if depth.ndim < 2:
        raise ValueError(f"depth must be [..., H, W], got {tuple(depth.shape)}")
    centres = pixel_centres(*depth.shape[-2:])
    pixels: Any = np.concatenate([centres, np.ones_like(centres[..., :1])], axis=-1)
    library: Any = np
    if not isinstance(depth, np.ndarray):
        import torch

        library, pixels = torch, torch.from_numpy(pixels).to(intrinsics)
    rays = library.einsum("...ij,hwj->...hwi", library.linalg.inv(intrinsics), pixels)
    centred = depth[..., None] * rays - extrinsics[..., None, None, :, 3]
    return library.einsum("...ji,...hwj->...hwi", extrinsics[..., :3], centred)


def check_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``value`` ends in the axes ``shape``."""
    if tuple(value.shape[-len(shape) :]) != shape:
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must be [..., {wanted}], got {tuple(value.shape)}")
