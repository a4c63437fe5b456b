"""From a `GeometrySpec` to one triangle mesh: primitives with height-field surfaces, each part in its atlas cell."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from subspace3d.scenes.geometry import FIELDS, BoxSpec, GeometrySpec, GroundSpec, PartSpec
from subspace3d.scenes.materials import GROUND_CELL, PALETTE, WALL_CELL, cell_uv

_ELLIPSOID = (28, 56)  # quads along latitude and longitude
_CUBE = 14  # quads along an edge
_CYLINDER = (14, 56)  # along the axis and around it
_CAP = 8  # quads along a cap's radius


@dataclass
class Mesh:
    """Triangles in world coordinates; V vertices, F faces."""

    vertices: np.ndarray  # float64 [V, 3]
    normals: np.ndarray  # float64 [V, 3], outward, unit
    uv: np.ndarray  # float64 [V, 2], in the texture atlas
    faces: np.ndarray  # int64 [F, 3], counter-clockwise seen from outside


@dataclass
class _Patch:
    """A grid of vertices; row and column order such that d/drow x d/dcolumn points outward."""

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


def build_mesh(geometry: GeometrySpec) -> Mesh:
    """Build every part, stretch each group into its box, scale the objects to a longest side of 2 around the origin.

    Part number i of the scene, counted over all boxes, wears material ``i % PALETTE``.
    """
    groups = [_fill_box(box) for box in geometry.boxes]
    points = np.concatenate([patch.points.reshape(-1, 3) for group in groups for part in group for patch in part])
    low, high = points.min(axis=0), points.max(axis=0)
    center, scale = (low + high) / 2, 2 / (high - low).max()
    meshes = []
    for index, part in enumerate(part for group in groups for part in group):
        for patch in part:
            patch.points = (patch.points - center) * scale
            meshes.append(_triangulate(patch, index % PALETTE))
    if geometry.ground is not None:
        meshes += _ground_meshes(geometry.ground, float((low[2] - center[2]) * scale))
    return _merge(meshes)


def _fill_box(box: BoxSpec) -> list[list[_Patch]]:
    group: list[list[_Patch]] = []
    for spec in box.parts:
        turn, move = rotation_matrix(spec.group_rotation), np.array(spec.group_translation)
        for part in group:
            for patch in part:
                patch.points = patch.points @ turn.T + move
        group.append(_primitive(spec))
    points = np.concatenate([patch.points.reshape(-1, 3) for part in group for patch in part])
    low, high = points.min(axis=0), points.max(axis=0)
    stretch = np.array(box.size) / (high - low)
    for part in group:
        for patch in part:
            patch.points = (patch.points - (low + high) / 2) * stretch + np.array(box.center)
    return group


def _primitive(spec: PartSpec) -> list[_Patch]:
    grids = np.random.default_rng(spec.height_seed).uniform(-1, 1, (FIELDS, 5, 5))
    fields = grids * np.array(spec.amplitudes)[:, None, None]
    axes = np.array(spec.semi_axes)
    build = {"ellipsoid": _ellipsoid, "cube": _cube, "cylinder": _cylinder}[spec.kind]
    turn, move = rotation_matrix(spec.rotation), np.array(spec.translation)
    patches = build(axes, fields)
    for patch in patches:
        patch.points = patch.points @ turn.T + move
    return patches


def _ellipsoid(axes: np.ndarray, fields: np.ndarray) -> list[_Patch]:
    rows, columns = _ELLIPSOID
    theta, phi = np.meshgrid(np.linspace(0, np.pi, rows + 1), np.linspace(0, 2 * np.pi, columns + 1), indexing="ij")
    unit = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1)
    normal = unit / axes
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    points = unit * axes + normal * displacement(fields[0], rows + 1, columns + 1)[..., None]
    return [_Patch(points, _grid_uv(rows + 1, columns + 1), periodic=True)]


def _cube(axes: np.ndarray, fields: np.ndarray) -> list[_Patch]:
    first, second = np.meshgrid(np.linspace(-1, 1, _CUBE + 1), np.linspace(-1, 1, _CUBE + 1), indexing="ij")
    patches = []
    for face in range(6):
        axis, sign = face // 2, 1.0 if face % 2 == 0 else -1.0
        points = np.empty((_CUBE + 1, _CUBE + 1, 3))
        # (axis + 1) x (axis + 2) = axis, so the negative face swaps them to keep its outward orientation
        along, across = ((axis + 1) % 3, (axis + 2) % 3) if sign > 0 else ((axis + 2) % 3, (axis + 1) % 3)
        points[..., along] = first * axes[along]
        points[..., across] = second * axes[across]
        points[..., axis] = sign * (axes[axis] + displacement(fields[face], _CUBE + 1, _CUBE + 1))
        patches.append(_Patch(points, _grid_uv(_CUBE + 1, _CUBE + 1), periodic=False))
    return patches


def _cylinder(axes: np.ndarray, fields: np.ndarray) -> list[_Patch]:
    rows, columns = _CYLINDER
    height, phi = np.meshgrid(np.linspace(1, -1, rows + 1), np.linspace(0, 2 * np.pi, columns + 1), indexing="ij")
    ring = np.stack([np.cos(phi) * axes[0], np.sin(phi) * axes[1]], -1)
    normal = np.stack([np.cos(phi) / axes[0], np.sin(phi) / axes[1]], -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    ring = ring + normal * displacement(fields[0], rows + 1, columns + 1)[..., None]
    patches = [_Patch(np.concatenate([ring, height[..., None] * axes[2]], -1), _grid_uv(rows + 1, columns + 1), True)]
    for side, sign in ((1, 1.0), (2, -1.0)):
        radius, angle = np.meshgrid(
            np.linspace(0, 1, _CAP + 1), np.linspace(0, sign * 2 * np.pi, columns + 1), indexing="ij"
        )
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        uv = np.stack([0.5 + 0.5 * x, 0.5 + 0.5 * y], -1)
        fade = np.clip((1 - radius) / 0.5, 0, 1)  # the rim stays where the side ends
        lift = _lookup(fields[side], uv[..., 1], uv[..., 0]) * fade
        points = np.stack([x * axes[0], y * axes[1], sign * (axes[2] + lift)], -1)
        patches.append(_Patch(points, uv, periodic=True))
    return patches


@functools.cache
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


def _lookup(grid: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    field = _upsample() @ grid @ _upsample().T
    y, x = np.clip(v, 0, 1) * 35, np.clip(u, 0, 1) * 35
    i, j = np.minimum(y.astype(int), 34), np.minimum(x.astype(int), 34)
    y, x = y - i, x - j
    top = field[i, j] * (1 - x) + field[i, j + 1] * x
    return top * (1 - y) + (field[i + 1, j] * (1 - x) + field[i + 1, j + 1] * x) * y


def _grid_uv(rows: int, columns: int) -> np.ndarray:
    v, u = np.meshgrid(np.linspace(0, 1, rows), np.linspace(0, 1, columns), indexing="ij")
    return np.stack([u, v], -1)


def _grid_faces(rows: int, columns: int) -> np.ndarray:
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    right, below, across = corner + 1, corner + columns, corner + columns + 1
    return np.concatenate([np.stack([corner, below, across], 1), np.stack([corner, across, right], 1)])


def _triangulate(patch: _Patch, cell: int) -> Mesh:
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
    if periodic:
        normals[:, 0] = normals[:, -1] = normals[:, 0] + normals[:, -1]
        for row in (0, -1):
            if np.ptp(points[row], axis=0).max() < 1e-9:
                normals[row] = normals[row].sum(axis=0)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return normals / np.maximum(length, 1e-30)


def _ground_meshes(ground: GroundSpec, floor: float) -> list[Mesh]:
    angle = np.linspace(0, 2 * np.pi, 65)
    rim = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = np.zeros((2, 65, 3))
    points[1, :, :2] = rim * ground.radius
    points[..., 2] = floor
    uv = np.stack([np.full((65, 2), 0.5), 0.5 + 0.5 * rim])
    meshes = [_triangulate(_Patch(points, uv, periodic=True), GROUND_CELL)]
    if ground.wall_height > 0:
        half = ground.wall_distance
        for side in range(4):
            turn = rotation_matrix([0.0, 0.0, ground.wall_azimuth + 90 * side])
            top = floor + ground.wall_height
            corners = np.array([[[half, -half, top], [half, half, top]], [[half, -half, floor], [half, half, floor]]])
            uv = np.array([[[0, 1], [1, 1]], [[0, 0], [1, 0]]]) * np.array([1, ground.wall_height / (2 * half)])
            meshes.append(_triangulate(_Patch(corners[:, ::-1] @ turn.T, uv, periodic=False), WALL_CELL))
    return meshes


def _merge(meshes: list[Mesh]) -> Mesh:
    offsets = np.cumsum([0] + [len(mesh.vertices) for mesh in meshes[:-1]])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.normals for mesh in meshes]),
        np.concatenate([mesh.uv for mesh in meshes]),
        np.concatenate([mesh.faces + offset for mesh, offset in zip(meshes, offsets)]),
    )
