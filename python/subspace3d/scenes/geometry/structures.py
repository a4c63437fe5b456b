"""Meshes of what is not a displaced primitive: wire cages, sticks and slabs, the ground, the shell of a room."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from subspace3d.scenes.geometry.mesh import Mesh, Patch, grid_uv, rotation_matrix, triangulate
from subspace3d.scenes.geometry.objects import CageSpec, GroundSpec, RoomSpec, WindowSpec
from subspace3d.scenes.geometry.rooms import half_extent, wall_frame
from subspace3d.scenes.materials.atlas import FLOOR_CELL, GLASS_CELL, ROOF_CELL, WALL_CELL

_WIRE_SIDES = 6
_PANE = 0.02  # thickness of a window pane, layout units


def cage_patches(cage: CageSpec) -> list[Patch]:
    """A thin prism along every edge of the cage, in layout units."""
    start, end = _cage_edges(cage.kind, cage.subdivisions)
    turn, half = rotation_matrix(cage.rotation), np.array(cage.size) / 2
    start, end = ((points * half) @ turn.T + np.array(cage.center) for points in (start, end))
    return [wire_patch(a, b, cage.thickness) for a, b in zip(start, end)]


def _cage_edges(kind: str, subdivisions: int) -> tuple[np.ndarray, np.ndarray]:
    """Both ends [E, 3] of the edges of a cage that fills [-1, 1]^3."""
    if kind == "cube":
        steps = np.linspace(-1, 1, 2**subdivisions + 1)
        grids = []
        for axis in range(3):
            for side in (-1.0, 1.0):
                first, second = np.meshgrid(steps, steps, indexing="ij")
                grids.append(np.roll(np.stack([np.full_like(first, side), first, second], -1), axis, axis=-1))
    else:
        phi = np.linspace(0, 2 * np.pi, 9)
        theta = np.linspace(0, np.pi, 9) if kind == "sphere" else np.linspace(0, 2 * np.pi, 5)
        theta, phi = np.meshgrid(theta, phi, indexing="ij")
        if kind == "sphere":
            grid = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1)
        else:
            ring = 0.7 + 0.3 * np.cos(theta)
            grid = np.stack([ring * np.cos(phi), ring * np.sin(phi), 0.3 * np.sin(theta)], -1)
        grids = [grid]
    pairs = set()
    for grid in grids:
        grid = grid.round(9) + 0.0  # no negative zeros: the same point must compare equal
        for first, second in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
            for a, b in zip(first.reshape(-1, 3).tolist(), second.reshape(-1, 3).tolist()):
                if a != b:
                    pairs.add((tuple(min(a, b)), tuple(max(a, b))))
    edges = np.array(sorted(pairs))
    return edges[:, 0], edges[:, 1]


def wire_patch(start: np.ndarray, end: np.ndarray, thickness: float) -> Patch:
    """An open hexagonal tube from ``start`` to ``end``."""
    along = (end - start) / np.linalg.norm(end - start)
    first = np.cross(along, np.eye(3)[np.abs(along).argmin()])
    first /= np.linalg.norm(first)
    second = np.cross(first, along)
    angle = np.linspace(0, 2 * np.pi, _WIRE_SIDES + 1)
    ring = thickness / 2 * (np.cos(angle)[:, None] * first + np.sin(angle)[:, None] * second)
    return Patch(np.stack([start + ring, end + ring]), grid_uv(2, _WIRE_SIDES + 1), periodic=True)


def cuboid_patches(
    center: Sequence[float] | np.ndarray, size: Sequence[float] | np.ndarray, turn: np.ndarray
) -> list[Patch]:
    """The six faces of a cuboid; their (u, v) keep the proportions of the longest side."""
    half, longest = np.array(size) / 2, max(size)
    patches = []
    for face in range(6):
        axis, sign = face // 2, 1.0 if face % 2 == 0 else -1.0
        down, right = np.zeros(3), np.zeros(3)
        # (axis + 1) x (axis + 2) = axis: rows and columns in this order make the face look outward
        along, across = ((axis + 1) % 3, (axis + 2) % 3) if sign > 0 else ((axis + 2) % 3, (axis + 1) % 3)
        down[along], right[across] = 2 * half[along], 2 * half[across]
        middle = np.zeros(3)
        middle[axis] = sign * half[axis]
        patches.append(quad_patch(middle - down / 2 - right / 2, down, right, 1 / longest))
    for patch in patches:
        patch.points = patch.points @ turn.T + np.array(center)
    return patches


def quad_patch(corner: np.ndarray, down: np.ndarray, right: np.ndarray, per_length: float | None = None) -> Patch:
    """A rectangle from its top left corner and edges, seen from ``down`` x ``right``.

    (u, v) fill [0, 1]^2, or grow by ``per_length`` for every unit of length.
    """
    points = np.array([[corner, corner + right], [corner + down, corner + down + right]])
    uv = grid_uv(2, 2)
    if per_length is not None:
        uv = uv * np.array([np.linalg.norm(right), np.linalg.norm(down)]) * per_length
    return Patch(points, uv, periodic=False)


def ground_meshes(ground: GroundSpec, floor: float) -> list[Mesh]:
    """The disc under the objects at height ``floor``, and its walls; normalised units."""
    angle = np.linspace(0, 2 * np.pi, 65)
    rim = np.stack([np.cos(angle), np.sin(angle)], -1)
    points = np.zeros((2, 65, 3))
    points[1, :, :2] = rim * ground.radius
    points[..., 2] = floor
    uv = np.stack([np.full((65, 2), 0.5), 0.5 + 0.5 * rim * np.array([1, -1])])
    meshes = [triangulate(Patch(points, uv, periodic=True), FLOOR_CELL)]
    if ground.wall_height > 0:
        half, height = ground.wall_distance, ground.wall_height
        for side in range(4):
            turn = rotation_matrix([0.0, 0.0, ground.wall_azimuth + 90 * side])
            corner = np.array([half, half, floor + height]) @ turn.T
            down, right = np.array([0, 0, -height]), np.array([0, -2 * half, 0]) @ turn.T
            meshes.append(triangulate(quad_patch(corner, down, right, 1 / (2 * half)), WALL_CELL))
    return meshes


def room_meshes(room: RoomSpec) -> list[Mesh]:
    """Floor, roof, four walls and what fills the window; normalised units, seen from inside."""
    half = half_extent(room)
    across, back, height = np.diag(2 * half)
    low = -half
    meshes = [
        triangulate(quad_patch(low, across, back, 0.5), FLOOR_CELL),
        triangulate(quad_patch(low + height, back, across, 0.5), ROOF_CELL),
    ]
    for wall in range(4):
        hole = room.window if room.window is not None and room.window.wall == wall else None
        corner, along, up, _ = wall_frame(wall, half)
        for left, right, bottom, top in _around(hole):
            start = corner + left * along + top * up
            patch = quad_patch(start, (bottom - top) * up, (right - left) * along, 0.5)
            patch.uv = patch.uv + np.array([left * np.linalg.norm(along), (1 - top) * np.linalg.norm(up)]) * 0.5
            meshes.append(triangulate(patch, WALL_CELL))
    if room.window is not None:
        meshes += _window_meshes(room.window, half, 2 / max(room.extent))
    return meshes


def _around(hole: WindowSpec | None) -> list[tuple[float, float, float, float]]:
    """(left, right, bottom, top) of the rectangles that are left of a wall, as shares of it."""
    if hole is None:
        return [(0, 1, 0, 1)]
    (left, bottom), (right, top) = hole.low, hole.high
    return [(0, left, 0, 1), (right, 1, 0, 1), (left, right, 0, bottom), (left, right, top, 1)]


def _window_meshes(window: WindowSpec, half: np.ndarray, scale: float) -> list[Mesh]:
    corner, along, up, outward = wall_frame(window.wall, half)
    low = corner + window.low[0] * along + window.low[1] * up
    high = corner + window.high[0] * along + window.high[1] * up
    meshes = []
    if window.pane:
        thickness = _PANE * scale * outward
        center, size = (low + high + thickness) / 2, np.abs(high - low + thickness)
        meshes += [triangulate(patch, GLASS_CELL) for patch in cuboid_patches(center, size, np.eye(3))]
    for bar in range(1, window.bars + 1):
        share = bar / (window.bars + 1)
        for edge in (along, up):
            axis = edge / np.linalg.norm(edge)
            run = np.dot(high - low, axis) * axis
            start = low + share * (high - low - run)
            meshes.append(triangulate(wire_patch(start, start + run, window.bar_thickness * scale), ROOF_CELL))
    return meshes
