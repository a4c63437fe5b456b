"""Meshes of implicit surfaces by naive surface nets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_STRIDE = 4  # grid points between two at which the field is always sampled
Field = Callable[[np.ndarray], np.ndarray]  # points [N, 3] -> signed distance [N], negative inside


def surface_nets(field: Field, low: np.ndarray, high: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    """Triangles of the surface field = 0 inside the box from ``low`` to ``high`` [3].

    Every cell that the surface crosses has one vertex, the mean of the crossings on its edges; every grid edge that the
    surface crosses joins the vertices of its four cells. Each vertex is then moved onto the surface by a Newton step.

    Returns:
        tuple: vertices float64 [V, 3] and faces int64 [F, 3], counter-clockwise seen from outside.
    """
    count = _STRIDE * np.ceil((high - low) / (cell * _STRIDE)).astype(int) + 1
    axes = [low[axis] + cell * np.arange(count[axis]) for axis in range(3)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    values = _sample_near_surface(field, grid, cell)
    inside = values < 0
    total = np.zeros((*(count - 1), 3))
    number = np.zeros(count - 1)
    for axis in range(3):
        first, second = _pair(values, axis)
        crossed = (first < 0) != (second < 0)
        share = np.where(crossed, first / np.where(crossed, first - second, 1), 0)
        point = _pair(grid, axis)[0] + share[..., None] * cell * np.eye(3)[axis]
        # an edge borders four cells: itself and its neighbours along the other two axes
        for edges in _bordering(axis, count):
            total += np.where(crossed[edges][..., None], point[edges], 0)
            number += crossed[edges]
    used = number > 0
    index = np.full(count - 1, -1)
    index[used] = np.arange(int(used.sum()))
    vertices = total[used] / number[used][:, None]
    faces = np.concatenate([_quads(inside, index, axis) for axis in range(3)])
    normal = gradient(field, vertices, cell / 4)
    return vertices - np.clip(field(vertices), -cell, cell)[:, None] * normal, faces


def _sample_near_surface(field: Field, grid: np.ndarray, cell: float) -> np.ndarray:
    """``field`` on the grid; away from the surface the value of a grid point nearby, which has the same sign.

    A distance changes by at most the length of the way, here sqrt(3) * _STRIDE / 2 cells; half as much again allows for
    fields that are only roughly distances.
    """
    coarse = grid[::_STRIDE, ::_STRIDE, ::_STRIDE]
    known = field(coarse.reshape(-1, 3)).reshape(coarse.shape[:3])
    nearest = [(np.arange(number) + _STRIDE // 2) // _STRIDE for number in grid.shape[:3]]
    values = known[np.ix_(*nearest)]
    near = np.abs(values) < 1.5 * np.sqrt(3) * _STRIDE / 2 * cell
    values[near] = field(grid[near])
    return values


def gradient(field: Field, points: np.ndarray, step: float) -> np.ndarray:
    """Unit gradient [N, 3] by central differences."""
    slope = np.stack([field(points + step * axis) - field(points - step * axis) for axis in np.eye(3)], -1)
    return slope / np.maximum(np.linalg.norm(slope, axis=-1, keepdims=True), 1e-12)


def _pair(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of every grid edge along ``axis``."""
    low, high = [slice(None)] * 3, [slice(None)] * 3
    low[axis], high[axis] = slice(None, -1), slice(1, None)
    return array[tuple(low)], array[tuple(high)]


def _bordering(axis: int, count: np.ndarray) -> list[tuple[slice, ...]]:
    """For each of the four positions around a cell, the edges along ``axis`` that border all cells there."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    result: list[tuple[slice, ...]] = []
    for shift_first in (0, 1):
        for shift_second in (0, 1):
            edges = [slice(None)] * 3
            edges[first] = slice(shift_first, shift_first + count[first] - 1)
            edges[second] = slice(shift_second, shift_second + count[second] - 1)
            result.append(tuple(edges))
    return result


def _quads(inside: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """Two triangles for every crossed grid edge along ``axis``, with the inside behind them."""
    first, second = (axis + 1) % 3, (axis + 2) % 3
    low, high = _pair(inside, axis)
    crossed = low != high
    # edges on the grid's border have fewer than four cells; a closed surface does not cross them
    for other in (first, second):
        ends = [slice(None)] * 3
        for end in (0, -1):
            ends[other] = end  # type: ignore[call-overload]
            crossed[tuple(ends)] = False
    edges = np.argwhere(crossed)
    corners = []
    for shift_first, shift_second in ((0, 0), (-1, 0), (-1, -1), (0, -1)):
        cell = edges.copy()
        cell[:, first] += shift_first
        cell[:, second] += shift_second
        corners.append(index[tuple(cell.T)])
    # first x second = axis: this order of corners faces along the axis, where the surface looks if its inside is low
    quad = np.stack(corners, 1)
    quad[~low[crossed]] = quad[~low[crossed]][:, ::-1]
    return np.concatenate([quad[:, [0, 1, 2]], quad[:, [0, 2, 3]]])
