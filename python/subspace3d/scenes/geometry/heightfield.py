"""Height fields: 5 x 5 random grids as smooth displacements that end at zero along the border."""

from __future__ import annotations

import functools

import numpy as np


def _linear(count: int, size: int) -> np.ndarray:
    """[count, size] matrix that samples ``size`` values at ``count`` evenly spaced points, both ends included."""
    position = np.linspace(0, size - 1, count)
    base = np.minimum(position.astype(int), size - 2)
    matrix = np.zeros((count, size))
    matrix[np.arange(count), base] = 1 - (position - base)
    matrix[np.arange(count), base + 1] = position - base
    return matrix


@functools.cache
def _upsample() -> np.ndarray:
    """[36, 5] matrix M: a 5 x 5 grid G becomes the 36 x 36 height field M G M^T.

    Zero border to 7, bicubic (Catmull-Rom) to 30, outermost ring to zero, bilinear to 36.
    """
    position = np.linspace(0, 6, 30)
    distance = np.abs(position[:, None] - np.arange(7)[None])
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    cubic = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    cubic[[0, -1]] = 0
    return _linear(36, 30) @ cubic[:, 1:6]


@functools.cache
def _sampler(count: int) -> np.ndarray:
    return _linear(count, 36) @ _upsample()


def displacement(grid: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The height field of a 5 x 5 ``grid`` at rows x columns evenly spaced points; 0 along the border."""
    return _sampler(rows) @ grid @ _sampler(columns).T


def lookup(grid: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The height field of a 5 x 5 ``grid`` at any (u, v) in [0, 1]^2, bilinear."""
    field = _upsample() @ grid @ _upsample().T
    y, x = np.clip(v, 0, 1) * 35, np.clip(u, 0, 1) * 35
    i, j = np.minimum(y.astype(int), 34), np.minimum(x.astype(int), 34)
    y, x = y - i, x - j
    top = field[i, j] * (1 - x) + field[i, j + 1] * x
    return top * (1 - y) + (field[i + 1, j] * (1 - x) + field[i + 1, j + 1] * x) * y
