"""Distorted cameras made into pinhole cameras by resampling their images.

A `Projection` maps directions (x, y, 1) in the camera's axes to pixels; the models here are those of nerfstudio's
transforms.json, COLMAP's come from pycolmap (`colmap.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from subspace3d.geometry import camera_rays, pixel_centres

_FACTORS = np.geomspace(4.0, 0.25, 97)  # on the focal length, from the narrowest view to the widest
_BLOCK = 256  # rows that are resampled at once
_STEPS = np.linspace(0, 1, 33)[1:, None]  # from the principal point to the border


@dataclass(frozen=True)
class Projection:
    """Pixels [N, 2] from the corner of the image, of directions (x, y, 1) given as [N, 2].

    Attributes:
        project: the function; directions it is not made for may give NaN.
        key: equal for equal functions.
    """

    project: Callable[[np.ndarray], np.ndarray]
    key: Hashable

    @classmethod
    def linear(cls, intrinsic: np.ndarray) -> Projection:
        """A pinhole camera whose K may have skew."""
        return cls(lambda rays: rays @ intrinsic[:2, :2].T + intrinsic[:2, 2], intrinsic.tobytes())

    def scaled(self, factors: np.ndarray) -> Projection:
        """Of the same image with its width and height multiplied by ``factors`` [2]."""
        return Projection(lambda rays: self.project(rays) * factors, (self.key, tuple(factors)))


def brown(intrinsic: np.ndarray, k: tuple[float, float, float, float], p: tuple[float, float]) -> Projection:
    """x' = x (1 + k1 r^2 + k2 r^4 + k3 r^6 + k4 r^8) + 2 p1 x y + p2 (r^2 + 2 x^2), y' with p1 and p2 exchanged."""

    def project(rays: np.ndarray) -> np.ndarray:
        x, y = rays.T
        r2 = x * x + y * y
        radial = 1 + r2 * (k[0] + r2 * (k[1] + r2 * (k[2] + r2 * k[3])))
        bent = np.stack(
            [
                x * radial + 2 * p[0] * x * y + p[1] * (r2 + 2 * x * x),
                y * radial + 2 * p[1] * x * y + p[0] * (r2 + 2 * y * y),
            ],
            axis=1,
        )
        return bent @ intrinsic[:2, :2].T + intrinsic[:2, 2]

    return Projection(project, ("brown", intrinsic.tobytes(), k, p))


def fisheye(intrinsic: np.ndarray, k: tuple[float, float, float, float]) -> Projection:
    """(x', y') = (x, y) / r * a (1 + k1 a^2 + k2 a^4 + k3 a^6 + k4 a^8) with the angle a = atan r."""

    def project(rays: np.ndarray) -> np.ndarray:
        radius = np.linalg.norm(rays, axis=1, keepdims=True)
        angle = np.arctan(radius)
        a2 = angle * angle
        bent = angle * (1 + a2 * (k[0] + a2 * (k[1] + a2 * (k[2] + a2 * k[3]))))
        return rays * np.where(radius > 0, bent / np.maximum(radius, 1e-12), 1) @ intrinsic[:2, :2].T + intrinsic[:2, 2]

    return Projection(project, ("fisheye", intrinsic.tobytes(), k))


class Undistorter:
    """Resamples the images of one camera into those of the widest pinhole camera without empty pixels.

    Args:
        projection (Projection): of the camera.
        intrinsic (float64 [3, 3]): its focal lengths and principal point; the new ones are these, the focal lengths
            times a factor.
        size (tuple[int, int]): height and width of its images, and of the new ones.

    Raises:
        ValueError: no factor between 0.25 and 4 fills the image.
    """

    def __init__(self, projection: Projection, intrinsic: np.ndarray, size: tuple[int, int]) -> None:
        self.size = size
        self.intrinsic = intrinsic * [[1, 0, 1], [0, 1, 1], [0, 0, 1]]
        factor = self._widest(projection)
        self.intrinsic = self.intrinsic * [[factor, 1, 1], [1, factor, 1], [1, 1, 1]]
        rays = camera_rays(self.intrinsic, pixel_centres(*size))[..., :2]
        # of the centre of the top-left pixel: 0; float32 is exact to 1e-3 of a pixel at 10,000 pixels
        self._at = (projection.project(rays.reshape(-1, 2)).reshape(*size, 2) - 0.5).astype(np.float32)

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3], bilinear."""
        result = np.empty_like(image)
        for start in range(0, self.size[0], _BLOCK):
            result[start : start + _BLOCK] = _bilinear(image, self._at[start : start + _BLOCK])
        return result

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """[H, W], each from the pixel in which its direction lies: depth along z stays what it was."""
        column, row = np.rint(self._at).astype(np.int64).reshape(-1, 2).T
        height, width = self.size
        return values[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)].reshape(self.size)

    def _widest(self, projection: Projection) -> float:
        height, width = self.size
        border = np.concatenate(
            [
                [(x, y) for x in np.linspace(0.5, width - 0.5, 65) for y in (0.5, height - 0.5)],
                [(x, y) for y in np.linspace(0.5, height - 0.5, 65) for x in (0.5, width - 0.5)],
            ]
        )
        rays = camera_rays(self.intrinsic, border)[:, :2]
        centre = self.intrinsic[:2, 2]
        best = None
        for factor in _FACTORS:
            outward = _STEPS[:, None] * (rays / factor)[None]
            with np.errstate(all="ignore"):  # far outside the image a polynomial may be anything
                pixels = projection.project(outward.reshape(-1, 2)).reshape(outward.shape)
                # a model that folds back shows one direction twice
                radius = np.linalg.norm(pixels - centre, axis=-1)
                rises = bool((np.diff(radius, axis=0) > 0).all())
            inside = ((pixels[-1] >= 0) & (pixels[-1] <= (width, height))).all()
            if not (rises and inside):
                if best is not None:
                    break
                continue
            best = float(factor)
        if best is None:
            raise ValueError("the distortion of its camera leaves no pinhole view without empty pixels")
        return best


def _bilinear(image: np.ndarray, at: np.ndarray) -> np.ndarray:
    """uint8 [h, W, 3] of an image at positions (x, y) [h, W, 2]; of the centre of the top-left pixel: 0."""
    height, width = image.shape[:2]
    x, y = np.clip(at[..., 0], 0, width - 1), np.clip(at[..., 1], 0, height - 1)
    left, top = x.astype(np.int64), y.astype(np.int64)
    right, bottom = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    across, down = (x - left)[..., None].astype(np.float32), (y - top)[..., None].astype(np.float32)
    upper = image[top, left] * (1 - across) + image[top, right] * across
    lower = image[bottom, left] * (1 - across) + image[bottom, right] * across
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)
