"""From a `GeometrySpec` to triangle meshes: primitives with height-field surfaces, then structures and surroundings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from subspace3d.scenes.geometry.heightfield import displacement, lookup
from subspace3d.scenes.geometry.mesh import Mesh, Patch, grid_uv, merge, rotation_matrix, triangulate
from subspace3d.scenes.geometry.objects import FIELDS, BoxSpec, GeometrySpec, PartSpec
from subspace3d.scenes.geometry.structures import cage_patches, cuboid_patches, ground_meshes, room_meshes
from subspace3d.scenes.materials.atlas import FLOOR_CELL, GLASS_CELL, PALETTE, ROOF_CELL, WALL_CELL

# quads at detail 1
_ELLIPSOID = (28, 56)  # along latitude and longitude
_TORUS = (20, 48)  # around the tube and around the axis
_TUBE = 0.3  # radius of a torus' tube over its outer radius
_CUBE = 14  # along an edge
_CYLINDER = (14, 56)  # along the axis and around it
_CAP = 8  # along a cap's radius


@dataclass
class SceneMeshes:
    """What the cameras see."""

    objects: Mesh
    shining: Mesh | None  # sticks that shine
    cells: set[int]  # of the atlas that the objects wear


def build_mesh(
    geometry: GeometrySpec,
    detail: int = 1,
    glass_slabs: Sequence[bool] = (),
    shining: Collection[int] = (),
) -> SceneMeshes:
    """Build everything, and scale it so that the objects' longest side is 2, centred on the origin.

    In a room the longest side of the room is 2 instead. Piece i of the scene, counted over the parts of all boxes and
    on through cages and blocks, wears material ``i % PALETTE``.

    Args:
        geometry (GeometrySpec): what to build.
        detail (int): multiplies the number of quads along every edge of a primitive.
        glass_slabs (sequence of bool): whether the i-th thin slab is of window glass.
        shining (collection of int): numbers of the sticks that shine.
    """
    pieces = [part for box in geometry.boxes for part in fill_box(box, detail)]
    pieces += [cage_patches(cage) for cage in geometry.cages]
    first_block = len(pieces)
    pieces += [cuboid_patches(block.center, block.size, rotation_matrix(block.rotation)) for block in geometry.blocks]
    sticks = [i for i, block in enumerate(geometry.blocks, first_block) if block.kind == "stick"]
    panes = [i for i, block in enumerate(geometry.blocks, first_block) if block.thin]
    bright = {piece for number, piece in enumerate(sticks) if number in shining}
    glass = {piece for piece, is_glass in zip(panes, glass_slabs) if is_glass}

    points = np.concatenate([patch.points.reshape(-1, 3) for piece in pieces for patch in piece])
    low, high = points.min(axis=0), points.max(axis=0)
    center, scale = (low + high) / 2, 2 / (high - low).max()
    if geometry.room is not None:
        center, scale = np.zeros(3), 2 / max(geometry.room.extent)
    objects, shining_meshes, cells = [], [], set()
    for index, piece in enumerate(pieces):
        cell = GLASS_CELL if index in glass else index % PALETTE
        for patch in piece:
            patch.points = (patch.points - center) * scale
        meshes = [triangulate(patch, cell) for patch in piece]
        if index in bright:
            shining_meshes += meshes
        else:
            objects += meshes
            cells.add(cell)
    if geometry.ground is not None:
        objects += ground_meshes(geometry.ground, float((low[2] - center[2]) * scale))
        cells |= {FLOOR_CELL, WALL_CELL}
    if geometry.room is not None:
        objects += room_meshes(geometry.room)
        cells |= {FLOOR_CELL, WALL_CELL, ROOF_CELL, GLASS_CELL}
    return SceneMeshes(merge(objects), merge(shining_meshes) if shining_meshes else None, cells)


def fill_box(box: BoxSpec, detail: int) -> list[list[Patch]]:
    group: list[list[Patch]] = []
    for spec in box.parts:
        turn, move = rotation_matrix(spec.group_rotation), np.array(spec.group_translation)
        for part in group:
            for patch in part:
                patch.points = patch.points @ turn.T + move
        group.append(_primitive(spec, detail))
    points = np.concatenate([patch.points.reshape(-1, 3) for part in group for patch in part])
    low, high = points.min(axis=0), points.max(axis=0)
    stretch = np.array(box.size) / (high - low)
    for part in group:
        for patch in part:
            patch.points = (patch.points - (low + high) / 2) * stretch + np.array(box.center)
    return group


def _primitive(spec: PartSpec, detail: int) -> list[Patch]:
    grids = np.random.default_rng(spec.height_seed).uniform(-1, 1, (FIELDS, 5, 5))
    fields = grids * np.array(spec.amplitudes)[:, None, None]
    axes = np.array(spec.semi_axes)
    build = {"ellipsoid": _ellipsoid, "cube": _cube, "cylinder": _cylinder, "torus": _torus}[spec.kind]
    turn, move = rotation_matrix(spec.rotation), np.array(spec.translation)
    patches = build(axes, fields, detail)
    for patch in patches:
        patch.points = patch.points @ turn.T + move
    return patches


def _ellipsoid(axes: np.ndarray, fields: np.ndarray, detail: int) -> list[Patch]:
    rows, columns = _ELLIPSOID[0] * detail, _ELLIPSOID[1] * detail
    theta, phi = np.meshgrid(np.linspace(0, np.pi, rows + 1), np.linspace(0, 2 * np.pi, columns + 1), indexing="ij")
    unit = np.stack([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], -1)
    return [_displaced(unit * axes, unit / axes, fields[0])]


def _torus(axes: np.ndarray, fields: np.ndarray, detail: int) -> list[Patch]:
    rows, columns = _TORUS[0] * detail, _TORUS[1] * detail
    theta, phi = np.meshgrid(np.linspace(2 * np.pi, 0, rows + 1), np.linspace(0, 2 * np.pi, columns + 1), indexing="ij")
    around = np.stack([np.cos(phi), np.sin(phi), np.zeros_like(phi)], -1)
    tube = np.cos(theta)[..., None] * around + np.sin(theta)[..., None] * np.array([0.0, 0.0, 1.0])
    shape = axes * np.array([1, 1, 1 / _TUBE])
    return [_displaced(((1 - _TUBE) * around + _TUBE * tube) * shape, tube / shape, fields[0])]


def _displaced(points: np.ndarray, normal: np.ndarray, field: np.ndarray) -> Patch:
    rows, columns = points.shape[:2]
    normal = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    points = points + normal * displacement(field, rows, columns)[..., None]
    return Patch(points, grid_uv(rows, columns), periodic=True)


def _cube(axes: np.ndarray, fields: np.ndarray, detail: int) -> list[Patch]:
    count = _CUBE * detail + 1
    first, second = np.meshgrid(np.linspace(-1, 1, count), np.linspace(-1, 1, count), indexing="ij")
    patches = []
    for face in range(6):
        axis, sign = face // 2, 1.0 if face % 2 == 0 else -1.0
        points = np.empty((count, count, 3))
        # (axis + 1) x (axis + 2) = axis, so the negative face swaps them to keep its outward orientation
        along, across = ((axis + 1) % 3, (axis + 2) % 3) if sign > 0 else ((axis + 2) % 3, (axis + 1) % 3)
        points[..., along] = first * axes[along]
        points[..., across] = second * axes[across]
        points[..., axis] = sign * (axes[axis] + displacement(fields[face], count, count))
        patches.append(Patch(points, grid_uv(count, count), periodic=False))
    return patches


def _cylinder(axes: np.ndarray, fields: np.ndarray, detail: int) -> list[Patch]:
    rows, columns = _CYLINDER[0] * detail, _CYLINDER[1] * detail
    height, phi = np.meshgrid(np.linspace(1, -1, rows + 1), np.linspace(0, 2 * np.pi, columns + 1), indexing="ij")
    unit = np.stack([np.cos(phi), np.sin(phi), height], -1)
    patches = [_displaced(unit * axes, unit / axes * np.array([1, 1, 0]), fields[0])]
    for side, sign in ((1, 1.0), (2, -1.0)):
        radius, angle = np.meshgrid(
            np.linspace(0, 1, _CAP * detail + 1), np.linspace(0, sign * 2 * np.pi, columns + 1), indexing="ij"
        )
        x, y = radius * np.cos(angle), radius * np.sin(angle)
        uv = np.stack([0.5 + 0.5 * x, 0.5 - sign * 0.5 * y], -1)
        fade = np.clip((1 - radius) / 0.5, 0, 1)  # the rim stays where the side ends
        lift = lookup(fields[side], uv[..., 1], uv[..., 0]) * fade
        points = np.stack([x * axes[0], y * axes[1], sign * (axes[2] + lift)], -1)
        patches.append(Patch(points, uv, periodic=True))
    return patches
