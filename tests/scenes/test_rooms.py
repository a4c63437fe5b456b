"""The indoor regime: layout, shell, cameras and lamps; no renderer needed."""

import numpy as np
import pytest

from subspace3d.scenes.geometry.objects import RoomSpec, WindowSpec
from subspace3d.scenes.geometry.rooms import half_extent, obstacles, wall_frame
from subspace3d.scenes.geometry.shapes import build_mesh
from subspace3d.scenes.geometry.structures import room_meshes
from subspace3d.scenes.lights import LampSpec, LightingSpec, place_in_room
from subspace3d.scenes.room_cameras import draw_room_cameras
from subspace3d.scenes.sampler import sample_scene, scene_seeds

SCENES = 6


def draw(attribute: str, dataset: int, scene: int, views: int = 8):
    return sample_scene(scene_seeds(0, dataset, scene, attribute), "paper", views, attribute, regime="room")


def corners(things: list) -> np.ndarray:
    center, half = (np.array([getattr(thing, name) for thing in things]) for name in ("center", "size"))
    return np.stack([center - half / 2, center + half / 2], 1)


def test_furniture_stands_in_the_room_and_does_not_interpenetrate():
    for scene in range(SCENES):
        geometry = draw("all", 0, scene).geometry
        half = np.array(geometry.room.extent) / 2
        caged = {id(box) for box in geometry.boxes for cage in geometry.cages if inside(box, cage)}
        free = corners([box for box in geometry.boxes if id(box) not in caged] + geometry.cages)
        slabs = [block for block in geometry.blocks if block.kind == "slab"]
        free = np.concatenate([free, corners(slabs)]) if slabs else free
        assert len(free) >= 5
        assert (free[:, 0] >= -half - 1e-9).all() and (free[:, 1] <= half + 1e-9).all()
        for index, first in enumerate(free):
            for second in free[:index]:
                assert np.any((first[1] <= second[0] + 1e-9) | (second[1] <= first[0] + 1e-9))


def inside(box, cage) -> bool:
    return bool(np.all(np.abs(np.array(box.center) - cage.center) + np.array(box.size) / 2 <= np.array(cage.size) / 2))


def test_counts_and_sizes_follow_the_documented_ranges():
    rooms = [draw("all", 0, scene, 1).geometry for scene in range(40)]
    extents = np.array([geometry.room.extent for geometry in rooms])
    assert extents[:, :2].min() >= 17 and extents[:, :2].max() <= 30
    assert extents[:, 2].min() >= 10 and extents[:, 2].max() <= 15
    windows = sum(geometry.room.window is not None for geometry in rooms)
    cages = sum(bool(geometry.cages) for geometry in rooms)
    # 40 draws of probability 0.8: 32 with a standard deviation of 2.5; four of them
    assert abs(windows - 32) <= 10 and abs(cages - 32) <= 10
    for geometry in rooms:
        sticks = [block for block in geometry.blocks if block.kind == "stick"]
        assert 5 <= len(sticks) <= 22 and len(geometry.cages) <= 3
        for stick in sticks:
            section = sorted(stick.size)[:2]
            assert section[0] >= 0.1 and section[1] <= 0.8


def test_cameras_keep_their_distance_whichever_of_the_two_is_drawn_first():
    """Camera data sets draw cameras around fixed furniture; geometry data sets draw furniture around fixed cameras."""
    for attribute in ("camera", "geometry"):
        distances = []
        for scene in range(SCENES):
            spec = draw(attribute, 0, scene)
            boxes, half = obstacles(spec.geometry), half_extent(spec.geometry.room)
            positions = np.array(spec.camera.positions)
            assert (np.abs(positions) <= half).all()
            if attribute == "geometry":  # sticks are placed without a look at anything
                things = [*spec.geometry.boxes, *spec.geometry.cages]
                boxes = corners(things) * 2 / max(spec.geometry.room.extent)
            outside = np.maximum(np.maximum(boxes[:, None, 0] - positions, positions - boxes[:, None, 1]), 0)
            distances.append(np.linalg.norm(outside, axis=-1).min())
        assert min(distances) > 0 and np.median(distances) > 0.1


def test_boundary_cameras_lie_on_planes_and_look_at_the_origin(rng):
    half = np.array([1.0, 0.7, 0.4])
    camera = draw_room_cameras(rng, half, np.zeros((0, 2, 3)), 48)
    positions, extrinsics = np.array(camera.positions), np.array(camera.extrinsics_w2c)
    inset = camera.control["inset"][0]
    assert 0.012 <= inset <= 0.03
    boundary = np.arange(48) % 4 != 3
    planes = np.abs(np.abs(positions[boundary]) - (half - inset)).min(axis=1)
    upper = np.abs(positions[boundary, 2] - 0.7 * (half[2] - inset))
    assert np.minimum(planes, upper).max() < 1e-9
    in_camera = extrinsics[boundary, :, 3]
    assert np.abs(in_camera[:, :2]).max() < 1e-9 and in_camera[:, 2].min() > 0
    around = extrinsics[~boundary]
    assert (np.abs(positions[~boundary]) <= half / 2).all()
    # pitch and roll within 10 degrees: the image's down axis is within acos(cos^2 10) of world down
    assert (-around[:, 1, 2] >= np.cos(np.deg2rad(10)) ** 2 - 1e-9).all()
    for rotation in extrinsics[:, :, :3]:
        assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) == pytest.approx(1)


def test_the_shell_faces_inward_and_the_window_is_a_hole_in_its_wall():
    window = WindowSpec(2, [0.2, 0.3], [0.6, 0.8], pane=False, bars=0, bar_thickness=0.1)
    areas = {}
    for name, room in (("whole", RoomSpec([20.0, 16.0, 10.0], None)), ("holed", RoomSpec([20.0, 16.0, 10.0], window))):
        vertices, faces, offset = [], [], 0
        for mesh in room_meshes(room):
            vertices.append(mesh.vertices)
            faces.append(mesh.faces + offset)
            offset += len(mesh.vertices)
        points = np.concatenate(vertices)[np.concatenate(faces)]
        normal = np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]) / 2
        areas[name] = np.linalg.norm(normal, axis=1).sum()
        assert (np.einsum("ni,ni->n", normal, points.mean(axis=1)) < 0).all()
    # normalised by 10: 2 x 1.6 x 1
    assert areas["whole"] == pytest.approx(2 * (2 * 1.6 + 2 * 1 + 1.6 * 1))
    assert areas["whole"] - areas["holed"] == pytest.approx(0.4 * 2 * 0.5 * 1)


def test_walls_are_seen_from_inside():
    half = np.array([1.0, 0.8, 0.5])
    for wall in range(4):
        corner, along, up, outward = wall_frame(wall, half)
        assert np.allclose(np.cross(along, up) / np.linalg.norm(np.cross(along, up)), -outward)
        center = corner + along / 2 + up / 2
        assert np.allclose(center, outward * (half @ np.abs(outward)))


def test_lamps_are_placed_relative_to_the_room():
    lamps = [
        LampSpec("sun", [0.0, 0.5, 1.0], [1.0] * 3, 5.0, 0.0),
        LampSpec("point", [0.5, -0.5, 0.5], [1.0] * 3, 1.0, 0.0),
        LampSpec("area", [0.4, 0.0, 0.0], [1.0] * 3, 1.0, 0.5),
    ]
    lighting = LightingSpec([0.1] * 3, [0.1] * 3, lamps)
    window = WindowSpec(0, [0.2, 0.2], [0.6, 0.8], pane=False, bars=0, bar_thickness=0.1)
    sun, bulb, area = place_in_room(lighting, RoomSpec([20.0, 10.0, 10.0], window)).lamps
    assert sun.position == [1.0, 0.0, 0.5]  # outside the wall at x max, from above
    assert bulb.position == [0.5, -0.25, 0.25]
    assert area.position[2] == pytest.approx(0.5, abs=0.01) and area.target == [0.4, 0.0, 0.0]
    assert len(place_in_room(lighting, RoomSpec([20.0, 10.0, 10.0], None)).lamps) == 2


def test_sticks_that_shine_and_slabs_of_glass_are_told_apart_from_the_rest():
    spec = next(
        spec
        for spec in (draw("all", 0, scene, 1) for scene in range(50))
        if any(block.thin for block in spec.geometry.blocks)
    )
    plain = build_mesh(spec.geometry)
    sticks = sum(block.kind == "stick" for block in spec.geometry.blocks)
    mixed = build_mesh(spec.geometry, 1, [True, True], [0, sticks])
    assert plain.shining is None and len(mixed.shining.vertices) == 6 * 4
    assert len(mixed.objects.vertices) + 24 == len(plain.objects.vertices)
