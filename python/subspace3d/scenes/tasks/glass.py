"""Transparent objects: glass bottles, cups and glasses on a textured table; colour images and their true depth.

Lengths in the scene's unit: the table is 2 wide. Training and in-domain test share bottles, jars and cups; the
cross-domain test has stemmed glasses, bowls and flasks of tinted glass, more clutter and harder light.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from subspace3d.geometry import look_at
from subspace3d.scenes.cameras import CameraSpec, Control
from subspace3d.scenes.draft import Draft
from subspace3d.scenes.geometry.mesh import Mesh, Patch, grid_uv, merge, rotation_matrix, triangulate
from subspace3d.scenes.geometry.objects import RANGES, BoxSpec, GroundSpec, draw_box
from subspace3d.scenes.geometry.shapes import SceneMeshes, fill_box
from subspace3d.scenes.geometry.structures import cuboid_patches, ground_meshes
from subspace3d.scenes.lights import LampSpec, LightingSpec
from subspace3d.scenes.materials.atlas import FLOOR_CELL, PALETTE, ROOF_CELL, WALL_CELL, TextureSpec, draw_texture
from subspace3d.scenes.sampler import SceneSpec, Seeds

TABLE_CELL = ROOF_CELL
_FIRST_GLASS = 12  # palette cells from here on are glass
_TABLE = [2.0, 1.6, 0.08]
_TABLE_HEIGHT = 0.8  # of the top above the floor
_TABLES = ("checker", "marble", "planks", "plaid", "tiles", "weave", "wood")
_SEGMENTS = 64  # around a vessel
_STEPS = 12  # of the profile between two control points

# outer radii over heights, both as shares; drawn values scale them
_PROFILES = {
    "bottle": [(1.0, 0.0), (1.0, 0.1), (1.0, 0.5), (0.95, 0.62), (0.45, 0.78), (0.36, 0.9), (0.4, 1.0)],
    "jar": [(0.9, 0.0), (1.0, 0.08), (1.0, 0.7), (0.85, 0.85), (0.88, 1.0)],
    "cup": [(0.75, 0.0), (0.8, 0.08), (0.9, 0.55), (1.0, 1.0)],
    "goblet": [(0.7, 0.0), (0.55, 0.04), (0.13, 0.1), (0.12, 0.42), (0.5, 0.5), (1.0, 0.72), (0.85, 1.0)],
    "bowl": [(0.4, 0.0), (0.5, 0.1), (0.85, 0.5), (1.0, 1.0)],
    "flask": [(1.0, 0.0), (0.98, 0.06), (0.6, 0.45), (0.26, 0.68), (0.24, 0.94), (0.34, 1.0)],
}
_KINDS = {"train": ("bottle", "jar", "cup"), "cross": ("goblet", "bowl", "flask")}
_SIZES = {  # greatest radius and height
    "bottle": ((0.09, 0.14), (0.45, 0.75)), "jar": ((0.1, 0.16), (0.25, 0.45)), "cup": ((0.1, 0.15), (0.2, 0.35)),
    "goblet": ((0.1, 0.15), (0.4, 0.6)), "bowl": ((0.16, 0.26), (0.12, 0.2)), "flask": ((0.15, 0.22), (0.4, 0.6)),
}  # fmt: skip


@dataclass(frozen=True)
class VesselSpec:
    """A hollow body of revolution: wall and bottom of the given thickness, open at the top."""

    kind: str
    center: list[float]  # on the table
    radii: list[float]  # outer, at the control points of its kind
    heights: list[float]
    wall: float
    bottom: float
    tilt: list[float]  # degrees about x, y, z; lying vessels have 90 about x


@dataclass(frozen=True)
class GlassGeometry:
    vessels: list[VesselSpec]
    boxes: list[BoxSpec]  # opaque clutter
    ground: GroundSpec
    room: None = None


def draw_glass(seeds: Seeds, split: str, views: int, detail: int = 1) -> Draft:
    """Draw one table.

    Args:
        seeds (Seeds): of the four attributes.
        split (str): train, test or cross.
        views (int): cameras on the arc.
        detail (int): multiplies the number of quads of the clutter.
    """
    cross = split == "cross"
    texture = _draw_texture(seeds.texture, cross)
    geometry = _draw_geometry(np.random.default_rng(seeds.geometry), cross)
    camera = _draw_camera(np.random.default_rng(seeds.camera), views)
    lighting = _draw_lighting(np.random.default_rng(seeds.lighting), cross)
    cells = {FLOOR_CELL, WALL_CELL, TABLE_CELL}
    table = cuboid_patches([0.0, 0.0, -_TABLE[2] / 2], _TABLE, np.eye(3))
    meshes = [triangulate(patch, TABLE_CELL) for patch in table]
    for index, vessel in enumerate(geometry.vessels):
        cell = _FIRST_GLASS + index % (PALETTE - _FIRST_GLASS)
        meshes.append(build_vessel(vessel, cell))
        cells.add(cell)
    parts = [part for box in geometry.boxes for part in fill_box(box, detail)]
    for index, part in enumerate(parts):
        meshes += [triangulate(patch, index % _FIRST_GLASS) for patch in part]
        cells.add(index % _FIRST_GLASS)
    meshes += ground_meshes(geometry.ground, -_TABLE_HEIGHT)
    return Draft(SceneSpec(texture, geometry, camera, lighting), SceneMeshes(merge(meshes), None, cells))


def _draw_texture(seed: int, cross: bool) -> TextureSpec:
    texture = draw_texture(seed, "generic")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2000,)))
    materials = list(texture.materials)
    for cell in range(PALETTE):
        material = replace(materials[cell], transmission=0.0)
        if cell >= _FIRST_GLASS:
            tint = rng.uniform(0.35, 1, 3) if cross and rng.random() < 0.6 else rng.uniform(0.93, 1, 3)
            material = replace(
                material, pattern="clouds", colors=[[0.95] * 3] * 3, tint=tint.tolist(), contrast=0.0, metallic=0.0,
                roughness=rng.uniform(0.001, 0.1 if cross else 0.03), transmission=1.0, relief=0.0, roughness_span=0.0,
                metallic_span=0.0, hue_noise=0.0,
            )  # fmt: skip
        materials[cell] = material
    if not cross:  # tables of wood, stone or cloth in natural shades
        pattern = _TABLES[int(rng.integers(len(_TABLES)))]
        shade = np.array([0.6, 0.6 - rng.uniform(0.05, 0.25), 0.6 - rng.uniform(0.1, 0.45)]) * rng.uniform(0.3, 1.3)
        colors = [(shade * share).tolist() for share in (0.45, 1.0, 0.75)]
        materials[TABLE_CELL] = replace(
            materials[TABLE_CELL], pattern=pattern, colors=colors, tint=[1.0] * 3, hue_noise=0.1
        )
    return replace(texture, materials=materials)


def _draw_geometry(rng: np.random.Generator, cross: bool) -> GlassGeometry:
    taken: list[tuple[float, float, float]] = []  # circles on the table that are used
    vessels = []
    kinds = _KINDS["cross" if cross else "train"]
    for _ in range(int(rng.integers(3, 7))):
        kind = kinds[int(rng.integers(len(kinds)))]
        radius, height = (rng.uniform(*limits) for limits in _SIZES[kind])
        lying = kind in ("bottle", "jar") and rng.random() < 0.15
        spot = _free_spot(rng, taken, height / 2 + radius if lying else radius)
        if spot is None:
            continue
        profile = np.array(_PROFILES[kind])
        radii = radius * profile[:, 0] * rng.uniform(0.88, 1.0, len(profile))
        tilt = [90.0, 0.0, rng.uniform(0, 360)] if lying else [0.0, 0.0, 0.0]
        wall = rng.uniform(0.05, 0.1) * radius
        bottom = max(rng.uniform(0.03, 0.08) * height, wall)
        lift = float(radii.max()) if lying else 0.0
        heights = (height * profile[:, 1]).tolist()
        vessels.append(VesselSpec(kind, [*spot, lift + 1e-3], radii.tolist(), heights, wall, bottom, tilt))
    boxes = []
    for _ in range(int(rng.integers(2, 5)) if cross else int(rng.integers(0, 3))):
        size = rng.uniform(0.12, 0.35, 3)
        spot = _free_spot(rng, taken, float(np.hypot(size[0], size[1])) / 2)
        if spot is not None:
            center = np.array([*spot, size[2] / 2])
            boxes.append(draw_box(rng, RANGES["generic"], center, size, {1: 2.0, 2: 1.0}))
    ground = GroundSpec(6.0, rng.uniform(2.6, 3.6), rng.uniform(2.0, 3.0), rng.uniform(0, 360))
    return GlassGeometry(vessels, boxes, ground)


def _free_spot(rng: np.random.Generator, taken: list[tuple[float, float, float]], radius: float) -> list[float] | None:
    """A place on the table at which a circle of ``radius`` touches no other; None: there is none."""
    room = np.array(_TABLE[:2]) / 2 * 0.8 - radius
    for _ in range(100):
        x, y = rng.uniform(-room, room)
        if all(np.hypot(x - other[0], y - other[1]) > radius + other[2] for other in taken):
            taken.append((float(x), float(y), radius))
            return [float(x), float(y)]
    return None


def _draw_camera(rng: np.random.Generator, views: int) -> CameraSpec:
    """An arc around the table, as an arm with a depth camera goes: elevation 20 to 60 degrees, distance 1.1 to 1.8."""
    azimuth, span = rng.uniform(0, 360), rng.uniform(90, 200)
    elevations, distances = np.sort(rng.uniform(20, 60, 2)), np.sort(rng.uniform(1.1, 1.8, 2))
    phases, target = rng.uniform(0, 2 * np.pi, 2), np.array([*rng.normal(0, 0.1, 2), 0.15])
    time = np.linspace(0, 1, views)
    swing = 0.5 + 0.5 * np.sin(2 * np.pi * time[:, None] + phases)
    elevation = np.deg2rad(elevations[0] + np.ptp(elevations) * swing[:, 0])
    distance = distances[0] + np.ptp(distances) * swing[:, 1]
    angle = np.deg2rad(azimuth + span * time)
    direction = np.stack([np.cos(elevation) * np.cos(angle), np.cos(elevation) * np.sin(angle), np.sin(elevation)], 1)
    positions = target + distance[:, None] * direction
    extrinsics = [look_at(position, target).tolist() for position in positions]
    control: Control = {
        "azimuth_and_span": [azimuth, span],
        "elevations": elevations.tolist(),
        "distances": distances.tolist(),
        "phases": phases.tolist(),
    }
    return CameraSpec(70.7, target.tolist(), 0.0, control, positions.tolist(), extrinsics)


def _draw_lighting(rng: np.random.Generator, cross: bool) -> LightingSpec:
    level = rng.uniform(0.15, 0.4) if cross else rng.uniform(0.5, 1.0)
    lamps = []
    for _ in range(int(rng.integers(1, 3))):
        angle = rng.uniform(0, 2 * np.pi)
        position = [3 * np.cos(angle), 3 * np.sin(angle), rng.uniform(3.0, 8.0)]
        color = 1 - (0.5 if cross else 0.2) * rng.uniform(0, 1, 3)
        # patches of the sky: what glass focuses of a small lamp would need very many samples
        lamps.append(LampSpec("glow", position, color.tolist(), rng.uniform(1.0, 3.0), rng.uniform(0.3, 0.6)))
    return LightingSpec([level] * 3, [level] * 3, lamps)


def build_vessel(vessel: VesselSpec, cell: int) -> Mesh:
    """The closed surface of the glass: from the bottom inside up to the rim, and down outside to the bottom."""
    heights = np.array(vessel.heights)
    steps = np.linspace(0, len(heights) - 1, _STEPS * (len(heights) - 1) + 1)
    z = np.interp(steps, np.arange(len(heights)), heights)
    outer = smooth_profile(np.array(vessel.radii), steps)
    above = z >= vessel.bottom
    inner_z = np.concatenate([[vessel.bottom, vessel.bottom], z[above], [z[-1]]])
    inner_r = np.concatenate([[0.0], np.maximum(outer[above][:1] - vessel.wall, 1e-3), outer[above] - vessel.wall])
    inner_r = np.maximum(np.append(inner_r, outer[-1] - vessel.wall), 0)
    radius = np.concatenate([inner_r, [outer[-1] - vessel.wall / 2], outer[::-1], [0.0]])
    height = np.concatenate([inner_z, [z[-1] + vessel.wall / 2], z[::-1], [0.0]])
    phi = np.linspace(0, 2 * np.pi, _SEGMENTS + 1)
    points = np.stack(
        [
            radius[:, None] * np.cos(phi),
            radius[:, None] * np.sin(phi),
            np.broadcast_to(height[:, None], (len(height), len(phi))),
        ],
        -1,
    )
    middle = np.array([0.0, 0.0, heights[-1] / 2]) if any(vessel.tilt) else np.zeros(3)
    points = (points - middle) @ rotation_matrix(vessel.tilt).T + np.array(vessel.center)
    return triangulate(Patch(points, grid_uv(len(height), len(phi)), periodic=True), cell)


def smooth_profile(values: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Values at fractional indices ``steps``: cubic Hermite with the slopes of the neighbours, kept monotone."""
    slopes = np.gradient(values)
    inner = np.diff(values)
    for index in range(1, len(values) - 1):
        if inner[index - 1] * inner[index] <= 0:
            slopes[index] = 0
    left = np.minimum(steps.astype(int), len(values) - 2)
    s = steps - left
    return (
        (2 * s**3 - 3 * s**2 + 1) * values[left]
        + (s**3 - 2 * s**2 + s) * slopes[left]
        + (3 * s**2 - 2 * s**3) * values[left + 1]
        + (s**3 - s**2) * slopes[left + 1]
    )
