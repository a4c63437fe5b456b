"""Printed faces: flat pictures of people on a plate in a room, filmed by a camera that is held almost still.

What the picture shows is round and what it is is flat: a model that trusts the semantics gets the geometry wrong.

Lengths in the scene's unit (the room's longest side is 2). Training and in-domain test show different people under the
same distribution: a plate flat on a wall, filmed from 0.25 within 5 degrees of its normal. The cross-domain test stands
for prints in somebody's hand: faded monochrome prints (if they are drawn), bent, tilted, filmed by a telephone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from subspace3d.geometry import look_at
from subspace3d.scenes.draft import Draft
from subspace3d.scenes.geometry.mesh import Mesh, Patch, grid_uv, merge, triangulate
from subspace3d.scenes.geometry.objects import RoomSpec
from subspace3d.scenes.geometry.rooms import half_extent
from subspace3d.scenes.geometry.shapes import SceneMeshes
from subspace3d.scenes.geometry.structures import cuboid_patches, room_meshes
from subspace3d.scenes.lights import draw_lighting
from subspace3d.scenes.materials.atlas import FLOOR_CELL, GLASS_CELL, PALETTE, ROOF_CELL, WALL_CELL, draw_texture
from subspace3d.scenes.materials.texture_maps import read_picture, srgb_to_linear
from subspace3d.scenes.sampler import SceneSpec, Seeds
from subspace3d.scenes.tasks.face_pictures import draw_portrait
from subspace3d.scenes.trajectories import TREMOR, WALK, draw_micro

PICTURE_CELL = GLASS_CELL  # this room has no window
_PLATE = (0.3, 0.4)  # width and height
_EXTENT = [20.0, 20.0, 12.0]  # of the room, layout units
_WALK = replace(WALK, points=10, step=0.01)
_CENTER_Z = 0.05
_GRID = 24  # quads along the plate


@dataclass(frozen=True)
class FaceGeometry:
    """A plate of 0.3 x 0.4 whose picture looks along -x, and boxes on the wall behind it."""

    room: RoomSpec
    center: list[float]
    yaw: float  # degrees, about the vertical
    pitch: float  # degrees, about the plate's horizontal
    bend: float  # degrees of the arc that the plate's width makes; 0: flat
    thickness: float
    boxes: list[list[list[float]]]  # center and size of each
    picture: str  # file name below the folder of pictures, or portrait-<seed>


def draw_faces(seeds: Seeds, split: str, scene: int, views: int, resolution: int, pictures: Path | None) -> Draft:
    """Draw one video.

    Args:
        seeds (Seeds): of the four attributes; the person belongs to texture.
        split (str): train, test or cross.
        scene (int): number of the scene; scenes go through the pictures of their split in turn.
        views (int): frames.
        resolution (int): width of the images in pixels; twice that many texels of the picture are kept.
        pictures (Path | None): folder of face images; none: drawn ones.
    """
    cross = split == "cross"
    texture = draw_texture(seeds.texture, "paper")
    print_stock = replace(
        texture.materials[PICTURE_CELL], roughness=0.6, transmission=0.0, colors=[[0.8] * 3] * 3, tint=[1.0] * 3
    )
    texture = replace(texture, materials=[*texture.materials[:PICTURE_CELL], print_stock])
    name, picture = _choose_picture(seeds.texture, split, scene, max(256, min(2 * resolution, 1024)), pictures)
    geometry = _draw_geometry(np.random.default_rng(seeds.geometry), cross, name)
    camera_rng = np.random.default_rng(seeds.camera)
    center, (_, normal, _) = np.array(geometry.center), _axes(geometry)
    if cross:
        distance, angles = camera_rng.uniform(0.3, 0.45), camera_rng.uniform(-20, 20, 2)
    else:
        distance, angles = 0.25, camera_rng.choice([-5.0, 0.0, 5.0], 2)
    position = center + distance * _turned(normal, *angles)
    camera = draw_micro(camera_rng, TREMOR if cross else _WALK, look_at(position, center), center, views)
    lighting = draw_lighting(np.random.default_rng(seeds.lighting), "paper", cross, room=True)
    lighting = replace(lighting, shining=[], lamps=[lamp for lamp in lighting.lamps if lamp.kind == "point"])
    cells = {*range(len(geometry.boxes)), 0, FLOOR_CELL, WALL_CELL, ROOF_CELL, PICTURE_CELL}
    meshes = SceneMeshes(_build(geometry), None, cells)
    return Draft(
        SceneSpec(texture, geometry, camera, lighting),
        meshes,
        {PICTURE_CELL: picture},
        nearest=0.1,
        depth_scale=5e-5,  # reaches 3.3, more than the room is long
        counts=None if split == "train" else lambda points: on_plate(points, geometry),
    )


def on_plate(points: np.ndarray, geometry: FaceGeometry) -> np.ndarray:
    """Whether world points [..., 3] lie on the picture, bent or not."""
    right, normal, up = _axes(geometry)
    offset = points - np.array(geometry.center)
    sag = _PLATE[0] / 2 * np.tan(np.deg2rad(geometry.bend) / 4)
    inside = (np.abs(offset @ right) <= _PLATE[0] / 2) & (np.abs(offset @ up) <= _PLATE[1] / 2)
    return inside & (offset @ normal <= 1e-3) & (offset @ normal >= -sag - 1e-3)


def _choose_picture(seed: int, split: str, scene: int, size: int, folder: Path | None) -> tuple[str, np.ndarray]:
    if folder is None:
        return f"portrait-{seed}", srgb_to_linear(draw_portrait(seed, size, print_style=split == "cross"))
    files = find_pictures(folder)
    # three of five for training, one each for the tests, so that nobody is in two splits
    chosen = {"train": (0, 1, 2), "test": (3,), "cross": (4,)}[split]
    own = [file for index, file in enumerate(files) if index % 5 in chosen]
    file = own[scene % len(own)]
    return file.relative_to(folder).as_posix(), srgb_to_linear(read_picture(file, size))


def find_pictures(folder: Path) -> list[Path]:
    """Every png and jpg at or below ``folder``, sorted.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds fewer than 5 images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"pictures: no such folder: {folder}")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < 5:
        raise ValueError(f"pictures must hold at least 5 images, so that each split has its own, got {len(files)}")
    return files


def _draw_geometry(rng: np.random.Generator, cross: bool, picture: str) -> FaceGeometry:
    room = RoomSpec(_EXTENT, None)
    wall = half_extent(room)[0]
    thickness = 0.005 if cross else 0.03
    center = [wall - thickness if not cross else rng.uniform(0.3, 0.7), rng.uniform(-0.5, 0.5), _CENTER_Z]
    yaw, pitch = rng.uniform(-25, 25, 2) if cross else (0.0, 0.0)
    bend = rng.uniform(5, 40) if cross else 0.0
    boxes = []
    for _ in range(int(rng.integers(4, 10))):
        size = [rng.uniform(0.02, 0.2), *rng.uniform(0.1, 0.5, 2)]
        spot = [wall - size[0] / 2, rng.uniform(-0.8, 0.8), rng.uniform(-0.4, 0.4)]
        # beside the plate, not under it
        if abs(spot[1] - center[1]) > (size[1] + _PLATE[0]) / 2 or abs(spot[2] - center[2]) > (size[2] + _PLATE[1]) / 2:
            boxes.append([spot, size])
    return FaceGeometry(room, center, float(yaw), float(pitch), float(bend), thickness, boxes, picture)


def _axes(geometry: FaceGeometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The plate's right (as its viewer sees it), normal (towards the viewer) and up."""
    normal = _turned(np.array([-1.0, 0.0, 0.0]), geometry.yaw, geometry.pitch)
    right = np.cross([0.0, 0.0, 1.0], normal)
    right /= np.linalg.norm(right)
    return right, normal, np.cross(normal, right)


def _turned(direction: np.ndarray, yaw: float, pitch: float) -> np.ndarray:
    """``direction`` after a turn about the vertical and a rise, both in degrees."""
    azimuth = np.arctan2(direction[1], direction[0]) + np.deg2rad(yaw)
    elevation = np.arcsin(np.clip(direction[2], -1, 1)) + np.deg2rad(pitch)
    return np.array([np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)])


def _build(geometry: FaceGeometry) -> Mesh:
    right, normal, up = _axes(geometry)
    width, height = _PLATE
    share = np.linspace(-0.5, 0.5, _GRID + 1)
    down, across = np.meshgrid(share, share, indexing="ij")
    bend = np.deg2rad(geometry.bend)
    if bend > 0:
        # the width is an arc whose middle is nearest to the viewer
        radius = width / bend
        x, z = radius * np.sin(across * bend), radius * (np.cos(across * bend) - 1)
    else:
        x, z = across * width, 0 * across
    offset = x[..., None] * right + z[..., None] * normal - down[..., None] * height * up
    front = Patch(np.array(geometry.center) + offset, grid_uv(_GRID + 1, _GRID + 1), periodic=False)
    # the back closes the plate, so that it also looks like a thing from the side
    back = Patch((front.points - geometry.thickness * normal)[:, ::-1], front.uv, periodic=False)
    meshes = [triangulate(front, PICTURE_CELL), triangulate(back, 0)]
    for index, (center, size) in enumerate(geometry.boxes):
        meshes += [triangulate(patch, index % PALETTE) for patch in cuboid_patches(center, size, np.eye(3))]
    return merge([*meshes, *room_meshes(geometry.room)])
