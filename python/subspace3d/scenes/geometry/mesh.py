"""Triangle meshes made of grids, each in its cell of the texture atlas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from subspace3d.scenes.materials.atlas import cell_uv


@dataclass
class Mesh:
    """Triangles in world coordinates; V vertices, F faces."""

    vertices: np.ndarray  # float64 [V, 3]
    normals: np.ndarray  # float64 [V, 3], outward, unit
    uv: np.ndarray  # float64 [V, 2], in the texture atlas
    faces: np.ndarray  # int64 [F, 3], counter-clockwise seen from outside


@dataclass
class Patch:
    """A grid of vertices; row and column order such that d/drow x d/dcolumn points outward.

    (u, v) turns as (column, row) does: normal maps rely on it.
    """

    points: np.ndarray  # [R, C, 3]
    uv: np.ndarray  # [R, C, 2] in [0, 1]
    periodic: bool  # first and last column coincide


def rotation_matrix(degrees: list[float]) -> np.ndarray:
    """R = R_z R_y R_x [3, 3] for angles about x, y, z in degrees."""
    cx, cy, cz = np.cos(np.deg2rad(degrees))
    sx, sy, sz = np.sin(np.deg2rad(degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def grid_uv(rows: int, columns: int) -> np.ndarray:
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    return np.stack([u, v], -1)


def _grid_faces(rows: int, columns: int) -> np.ndarray:
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    right, below, across = corner + 1, corner + columns, corner + columns + 1
    return np.concatenate([np.stack([corner, below, across], 1), np.stack([corner, across, right], 1)])


def triangulate(patch: Patch, cell: int) -> Mesh:
    rows, columns = patch.points.shape[:2]
    return Mesh(
        patch.points.reshape(-1, 3),
        _grid_normals(patch.points, patch.periodic).reshape(-1, 3),
        cell_uv(cell, patch.uv.reshape(-1, 2)),
        _grid_faces(rows, columns),
    )


def _grid_normals(points: np.ndarray, periodic: bool) -> np.ndarray:
    """Area-weighted mean of the adjacent quads' normals; rows that shrink to a point share one normal."""
    quads = np.cross(points[1:, 1:] - points[:-1, :-1], points[:-1, 1:] - points[1:, :-1])
    normals = np.zeros_like(points)
    for rows in (slice(None, -1), slice(1, None)):
        for columns in (slice(None, -1), slice(1, None)):
            normals[rows, columns] += quads
    if np.abs(points[0] - points[-1]).max() < 1e-9 < np.ptp(points[0], axis=0).max():  # closed along the rows too
        normals[0] = normals[-1] = normals[0] + normals[-1]
    if periodic:
        normals[:, 0] = normals[:, -1] = normals[:, 0] + normals[:, -1]
        for row in (0, -1):
            if np.ptp(points[row], axis=0).max() < 1e-9:
                normals[row] = normals[row].sum(axis=0)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return normals / np.maximum(length, 1e-30)


def merge(meshes: Sequence[Mesh]) -> Mesh:
    offsets = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.normals for mesh in meshes]),
        np.concatenate([mesh.uv for mesh in meshes]),
        np.concatenate([mesh.faces + offset for mesh, offset in zip(meshes, offsets)]),
    )
