"""Clothed bodies: articulated smooth bodies in patterned cloth, seen from all around.

96 cameras at elevation 0 and distance 1.1 look at the middle of the body, every 3.75 degrees, with a field of view of
49.13 degrees; the body's longest side is 0.8. Training and in-domain test are adults in shirts and trousers in calm
poses; the cross-domain test has other proportions (children, heavy people), skirts and loose cloth of other patterns,
long hair, and wide poses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from subspace3d.geometry import look_at
from subspace3d.scenes.cameras import CameraSpec
from subspace3d.scenes.draft import Draft
from subspace3d.scenes.geometry.mesh import Mesh
from subspace3d.scenes.geometry.shapes import SceneMeshes
from subspace3d.scenes.geometry.surface_nets import gradient, surface_nets
from subspace3d.scenes.lights import LightingSpec
from subspace3d.scenes.materials.atlas import TextureSpec, cell_uv, draw_texture
from subspace3d.scenes.sampler import SceneSpec, Seeds
from subspace3d.scenes.tasks.skeleton import BodySpec, Bones, draw_body, pose

DISTANCE = 1.1
HFOV = 49.13
LONGEST_SIDE = 0.8
_CELL = 1 / 72  # of the grid that finds the surface, body heights; halved at detail 2
_BLEND = 0.035  # width over which limbs melt into each other
_CLOTH_PATTERNS = {
    "train": ("checker", "clouds", "marble", "plaid", "spots", "stripes"),
    "cross": ("cells", "grating", "hexagons", "knit", "photo", "text", "tiles", "weave"),
}
_TEXTURE_REACH = (0.12, 0.5)  # radius and length of a limb that shows a material from edge to edge


@dataclass(frozen=True)
class BodyGeometry:
    body: BodySpec
    room: None = None


def draw_bodies(seeds: Seeds, split: str, views: int, arc: float = 360.0, detail: int = 1) -> Draft:
    """Draw one person.

    Args:
        seeds (Seeds): of the four attributes.
        split (str): train, test or cross.
        views (int): cameras around the body.
        arc (float): degrees of the ring that they fill.
        detail (int): divides the grid cell of the surface.
    """
    cross = split == "cross"
    rng = np.random.default_rng(seeds.geometry)
    geometry = BodyGeometry(draw_body(rng, cross))
    lighting_rng = np.random.default_rng(seeds.lighting)
    level = lighting_rng.uniform(0.55, 0.75)
    lighting = LightingSpec([level] * 3, [level] * 3, [], background="white")
    mesh, cells = build_body(geometry.body, _CELL / detail)
    texture = _draw_texture(seeds.texture, cross)
    camera = azimuth_ring(views, DISTANCE, HFOV, arc)
    return Draft(SceneSpec(texture, geometry, camera, lighting), SceneMeshes(mesh, None, cells))


def azimuth_ring(views: int, distance: float, hfov: float, arc: float = 360.0) -> CameraSpec:
    """``views`` cameras at elevation 0, every ``arc / views`` degrees around the vertical axis, facing the origin."""
    angles = np.deg2rad(arc) * np.arange(views) / views
    positions = distance * np.stack([np.cos(angles), np.sin(angles), np.zeros(views)], 1)
    extrinsics = [look_at(position, np.zeros(3)).tolist() for position in positions]
    return CameraSpec(hfov, [0.0] * 3, 0.0, {"distance": [distance]}, positions.tolist(), extrinsics)


def _draw_texture(seed: int, cross: bool) -> TextureSpec:
    texture = draw_texture(seed, "generic")
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2000,)))
    patterns = _CLOTH_PATTERNS["cross" if cross else "train"]
    materials = [
        replace(material, metallic=0.0, transmission=0.0, metallic_span=0.0, roughness_span=0.0)
        for material in texture.materials
    ]
    skin = np.array([0.80, 0.52, 0.40]) * rng.uniform(0.25, 1.0)
    hair = np.array([0.45, 0.30, 0.18]) * rng.uniform(0.05, 1.2)
    for cell, color, rough in ((0, skin, 0.5), (1, hair, 0.6)):
        materials[cell] = replace(
            materials[cell], pattern="clouds", colors=[(color * share).tolist() for share in (0.9, 1.0, 1.08)],
            tint=[1.0] * 3, hue_noise=0.0, roughness=rough, relief=0.0 if cell == 0 else 0.1, scale=6.0,
        )  # fmt: skip
    for cell in (2, 3, 4):
        pattern = patterns[int(rng.integers(len(patterns)))]
        scale = rng.uniform(4, 10)
        materials[cell] = replace(
            materials[cell], pattern=pattern, roughness=rng.uniform(0.6, 1.0), scale=scale, aspect=1.0
        )
    return replace(texture, materials=materials)


def build_body(body: BodySpec, cell: float) -> tuple[Mesh, set[int]]:
    """The body's mesh, its longest side LONGEST_SIDE around the origin, and the atlas cells it wears."""
    bones = pose(body)

    def field(points: np.ndarray) -> np.ndarray:
        return _melt(points, bones)[0]

    low = (np.minimum(bones.start, bones.end) - bones.radii.max(axis=1)[:, None]).min(axis=0) - 3 * cell
    high = (np.maximum(bones.start, bones.end) + bones.radii.max(axis=1)[:, None]).max(axis=0) + 3 * cell
    vertices, faces = surface_nets(field, low, high, cell)
    normals = gradient(field, vertices, cell / 2)
    labels = _melt(vertices[faces].mean(axis=1), bones)[1]
    mesh, cells = _unwrap(vertices, normals, faces, labels, bones)
    center = (mesh.vertices.min(axis=0) + mesh.vertices.max(axis=0)) / 2
    mesh.vertices = (mesh.vertices - center) * (LONGEST_SIDE / np.ptp(mesh.vertices, axis=0).max())
    return mesh, cells


def _melt(points: np.ndarray, bones: Bones) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance [N] to the smooth union of all bones, and the number of the nearest bone [N].

    Two distances a, b join to min(a, b) - max(k - |a - b|, 0)^2 / (4 k).
    """
    result = nearest = None
    label = np.zeros(len(points), dtype=int)
    for index in range(len(bones.start)):
        along = bones.end[index] - bones.start[index]
        share = np.clip((points - bones.start[index]) @ along / (along @ along), 0, 1)
        offset = points - bones.start[index] - share[:, None] * along
        radius = bones.radii[index, 0] + share * (bones.radii[index, 1] - bones.radii[index, 0])
        if bones.folds[index]:
            wave = 60 * points[:, 2] + 4 * np.sin(17 * points[:, 0] + 3 * index) + 5 * np.sin(13 * points[:, 1])
            radius = radius + bones.folds[index] * np.sin(wave)
        distance = np.linalg.norm(offset, axis=1) - radius
        if result is None or nearest is None:
            result, nearest = distance, distance
            continue
        blend = _BLEND * bones.blend[index]
        gap = np.maximum(blend - np.abs(result - distance), 0)
        label = np.where(distance < nearest, index, label)
        nearest = np.minimum(nearest, distance)
        result = np.minimum(result, distance) - gap**2 / (4 * blend)
    assert result is not None
    return result, label


def _unwrap(
    vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, labels: np.ndarray, bones: Bones
) -> tuple[Mesh, set[int]]:
    """Give every bone two charts, front and back half around its axis; vertices on seams are doubled."""
    angles, _ = _around(vertices[faces].mean(axis=1), bones, labels)
    half = (angles >= 0).astype(int)
    # a vertex is doubled for every chart that uses it
    keys = (labels * 2 + half)[:, None] * len(vertices) + faces
    unique, corner = np.unique(keys, return_inverse=True)
    chart, source = unique // len(vertices), unique % len(vertices)
    bone, back = chart // 2, chart % 2
    angle, share = _around(vertices[source], bones, bone)
    middle = np.where(back > 0, np.pi / 2, -np.pi / 2)
    angle = (angle - middle + np.pi) % (2 * np.pi) - np.pi  # around the middle of the chart
    lengths = np.linalg.norm(bones.end - bones.start, axis=1)
    radius = bones.radii.mean(axis=1)
    u = 0.5 - angle / np.pi * np.minimum(radius[bone] / _TEXTURE_REACH[0], 1)
    v = np.clip(share * np.minimum(lengths[bone] / _TEXTURE_REACH[1], 1), 0, 1)
    uv = np.empty((len(unique), 2))
    materials = bones.materials[bone]
    for cell in np.unique(materials):
        own = materials == cell
        uv[own] = cell_uv(int(cell), np.stack([np.clip(u, 0, 1), v], 1)[own])
    mesh = Mesh(vertices[source], normals[source], uv, corner.reshape(faces.shape))
    return mesh, {int(cell) for cell in np.unique(materials)}


def _around(points: np.ndarray, bones: Bones, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Angle around the axis of bone ``label`` in (-pi, pi], and share of the way along it, [N] each."""
    axis = bones.end - bones.start
    length = np.linalg.norm(axis, axis=1, keepdims=True)
    axis = axis / length
    side = np.cross(axis, bones.front)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    front = np.cross(side, axis)
    offset = points - bones.start[label]
    share = np.einsum("ni,ni->n", offset, axis[label]) / length[label, 0]
    angle = np.arctan2(np.einsum("ni,ni->n", offset, front[label]), np.einsum("ni,ni->n", offset, side[label]))
    return angle, share
