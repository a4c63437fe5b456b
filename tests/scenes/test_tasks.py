"""The three tasks: their shapes against exact ones, their splits, and what is rendered of them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from subspace3d.commands.generate import GenerateConfig, run
from subspace3d.files import read_json
from subspace3d.formats.scene import load_scene
from subspace3d.scenes.geometry.surface_nets import gradient, surface_nets
from subspace3d.scenes.sampler import scene_seeds
from subspace3d.scenes.tasks.bodies import DISTANCE, HFOV, LONGEST_SIDE, azimuth_ring, build_body
from subspace3d.scenes.tasks.face_pictures import draw_portrait
from subspace3d.scenes.tasks.faces import draw_faces, on_plate
from subspace3d.scenes.tasks.glass import VesselSpec, build_vessel, draw_glass, smooth_profile
from subspace3d.scenes.tasks.skeleton import draw_body


def volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Of a closed mesh whose faces look outward, by the divergence theorem."""
    corners = vertices[faces]
    return float(np.einsum("ni,ni->n", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6)


def is_closed(faces: np.ndarray) -> bool:
    """Every edge is used as often in one direction as in the other (twice each where two sheets touch)."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    key, back = edges[:, 0] * (faces.max() + 1) + edges[:, 1], edges[:, 1] * (faces.max() + 1) + edges[:, 0]
    return np.array_equal(np.sort(key), np.sort(back))


def test_surface_nets_find_a_torus():
    def torus(points: np.ndarray) -> np.ndarray:
        ring = np.linalg.norm(points[:, :2], axis=1) - 0.7
        return np.hypot(ring, points[:, 2]) - 0.25

    cell = 0.04
    vertices, faces = surface_nets(torus, np.full(3, -1.1), np.full(3, 1.1), cell)
    assert is_closed(faces)
    # the means lie within a cell^2 / (8 r) of the surface, and a Newton step squares that: (cell^2 / 2)^2 / (2 r)
    assert np.abs(torus(vertices)).max() < cell**4 / 8 / 0.25 * 2
    # chords of length up to 2 cells cut off l^2 / (8 r) of the tube's radius
    assert volume(vertices, faces) == pytest.approx(2 * np.pi**2 * 0.7 * 0.25**2, rel=2 * (2 * cell) ** 2 / 8 / 0.25**2)
    normal = gradient(torus, vertices, cell)
    outward = vertices - 0.7 * np.concatenate(
        [vertices[:, :2] / np.linalg.norm(vertices[:, :2], axis=1, keepdims=True), np.zeros((len(vertices), 1))], 1
    )
    assert (np.einsum("ni,ni->n", normal, outward) > 0.24).all()


@pytest.mark.parametrize("cross", [False, True])
def test_bodies_are_closed_in_front_of_any_pose(cross):
    for seed in range(2):
        body = draw_body(np.random.default_rng(seed), cross)
        mesh, cells = build_body(body, 1 / 40)
        assert np.ptp(mesh.vertices, axis=0).max() == pytest.approx(LONGEST_SIDE)
        assert np.allclose(mesh.vertices.max(axis=0) + mesh.vertices.min(axis=0), 0, atol=1e-9)
        assert cells == {0, 1, 2, 3, 4}
        # charts double vertices on their seams; joined again by position the mesh is closed
        _, joined = np.unique(mesh.vertices.round(12), axis=0, return_inverse=True)
        assert is_closed(joined.ravel()[mesh.faces]) and volume(mesh.vertices, mesh.faces) > 0
        assert np.allclose(np.linalg.norm(mesh.normals, axis=1), 1) and 0 <= mesh.uv.min() <= mesh.uv.max() <= 1


def test_an_arc_of_the_ring_has_its_first_cameras():
    ring, arc = azimuth_ring(18, DISTANCE, HFOV), azimuth_ring(6, DISTANCE, HFOV, 120)
    np.testing.assert_allclose(arc.extrinsics_w2c, ring.extrinsics_w2c[:6], atol=1e-12)
    for values, words in (({"task": "bodies", "arc": 0.0}, "in"), ({"task": "glass", "arc": 90.0}, "bodies only")):
        with pytest.raises(ValueError, match=f"arc must be .*{words}"):
            GenerateConfig(out=Path("scenes"), **values)


def test_azimuth_ring_is_the_documented_protocol():
    camera = azimuth_ring(96, DISTANCE, HFOV)
    positions = np.array(camera.positions)
    assert np.allclose(np.linalg.norm(positions, axis=1), 1.1) and np.allclose(positions[:, 2], 0)
    turns = np.rad2deg(np.unwrap(np.arctan2(positions[:, 1], positions[:, 0])))
    assert np.allclose(np.diff(turns), 3.75)
    # a 35 mm lens before a 32 mm sensor
    assert pytest.approx(2 * np.rad2deg(np.arctan(16 / 35)), abs=0.01) == HFOV
    assert np.allclose(np.array(camera.extrinsics_w2c)[..., 3], [0, 0, 1.1])


def test_portraits_differ_by_person_and_style():
    first, again, other = draw_portrait(1, 64), draw_portrait(1, 64), draw_portrait(2, 64)
    assert first.shape == (64, 48, 3) and first.min() >= 0 and first.max() <= 1
    assert np.array_equal(first, again) and np.abs(first - other).mean() > 0.05
    grey = draw_portrait(1, 64, print_style=True)
    assert np.ptp(grey / np.array([1.0, 0.95, 0.85]), axis=-1).max() < 1e-6


def test_a_vessel_holds_its_glass():
    """A straight beaker: pi R^2 H minus the hollow pi (R - w)^2 (H - b), and the rounded rim."""
    radius, height, wall, bottom = 0.2, 0.5, 0.02, 0.04
    profile = np.array([0.0, 0.25, 0.5, 1.0])
    vessel = VesselSpec("beaker", [0.0, 0.0, 0.0], [radius] * 4, (height * profile).tolist(), wall, bottom, [0.0] * 3)
    mesh = build_vessel(vessel, 12)
    _, joined = np.unique(mesh.vertices.round(9), axis=0, return_inverse=True)
    faces = joined.ravel()[mesh.faces]
    solid = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])]
    assert is_closed(solid)
    exact = np.pi * (radius**2 * height - (radius - wall) ** 2 * (height - bottom))
    rim = np.pi * (2 * radius - wall) * wall * wall / 4
    # 64 sides lose a 600th of every circle; the rim has three corners, and the hollow's first step is a cone
    assert volume(mesh.vertices, mesh.faces) == pytest.approx(exact + rim, rel=0.03)


def test_profiles_pass_through_their_points_without_overshoot():
    values = np.array([1.0, 1.0, 0.95, 0.45, 0.36, 0.4])
    fine = smooth_profile(values, np.linspace(0, 5, 501))
    assert np.allclose(fine[::100], values) and fine.max() <= 1 + 0.01 and fine.min() >= 0.35


@pytest.mark.parametrize("split", ["train", "cross"])
def test_glass_stands_apart_on_the_table(split):
    kinds = set()
    for scene in range(8):
        geometry = draw_glass(scene_seeds(0, 0, scene, "all"), split, 2).spec.geometry
        circles = [(vessel.center, max(vessel.radii)) for vessel in geometry.vessels if not any(vessel.tilt)]
        kinds |= {vessel.kind for vessel in geometry.vessels}
        for index, (first, r) in enumerate(circles):
            assert np.hypot(*first[:2]) < 1.3
            for second, s in circles[:index]:
                assert np.hypot(first[0] - second[0], first[1] - second[1]) > r + s
    assert kinds == {"train": {"bottle", "jar", "cup"}, "cross": {"goblet", "bowl", "flask"}}[split]


def test_the_mask_of_a_print_is_its_plate():
    for split, scene in (("test", 0), ("cross", 1)):
        draft = draw_faces(scene_seeds(0, 1, scene, "all"), split, scene, 2, 32, None)
        front = draft.meshes.objects.vertices[: 25 * 25]
        geometry = draft.spec.geometry
        assert on_plate(geometry.center + 0.999 * (front - geometry.center), geometry).all()
        assert not on_plate(np.array(geometry.center) + np.array([[0, 0, 0.25], [0.2, 0, 0]]), geometry).any()
        assert (geometry.bend > 0) == (split == "cross")
    plain = dataclasses.replace(geometry, yaw=0.0, pitch=0.0, bend=0.0)
    edge = np.array(plain.center) + np.array([[0.0, 0.149, 0.199], [0.0, 0.151, 0.0], [0.0, 0.0, 0.201]])
    assert on_plate(edge, plain).tolist() == [True, False, False]


def test_every_split_shows_its_own_pictures(tmp_path):
    for index in range(7):
        Image.fromarray(np.full((8, 6, 3), 30 * index, np.uint8)).save(tmp_path / f"{index}.png")
    shown = {
        split: {
            draw_faces(scene_seeds(0, 0, scene, "all"), split, scene, 1, 32, tmp_path).spec.geometry.picture
            for scene in range(8)
        }
        for split in ("train", "test", "cross")
    }
    assert shown == {"train": {"0.png", "1.png", "2.png", "5.png", "6.png"}, "test": {"3.png"}, "cross": {"4.png"}}


def test_tasks_are_rendered_with_their_splits(tmp_path):
    small = {"out": tmp_path, "scenes": 1, "views": 2, "resolution": 48, "spp": 1, "workers": 1}
    for task in ("faces", "bodies", "glass"):
        folders = run(GenerateConfig(task=task, **small))
        assert [folder.name for folder in folders] == [f"{task}_train", f"{task}_test", f"{task}_cross"]
        for folder in folders:
            scene = load_scene(folder / "scene_0000")
            assert scene.provenance["task"] == task and folder.name.endswith(scene.provenance["split"])
            assert {"texture", "geometry", "camera", "lighting", "seeds"} <= set(scene.provenance)
            assert (scene.depths > 0).mean() > 0.05 and scene.images.std() > 5
    # a flat print: its points lie in one plane, to the step of the stored depth
    scene = load_scene(tmp_path / "faces_test/scene_0000")
    assert read_json(tmp_path / "faces_test/scene_0000/scene.json")["frames"][0]["mask"] == "mask/0000.png"
    row, column = np.nonzero(scene.depths[0])
    pixel = np.stack([column + 0.5, row + 0.5, np.ones(len(row))])
    points = np.linalg.inv(scene.intrinsics[0]) @ pixel * scene.depths[0][row, column]
    spread = np.linalg.svd(points - points.mean(axis=1, keepdims=True))[1] / np.sqrt(len(row))
    assert spread[2] < 5e-5 and spread[1] > 0.02
    white = load_scene(tmp_path / "bodies_train/scene_0000")
    # one sample per pixel: only where it and the centre ray fall on different sides of the outline do they disagree
    assert (white.images[white.depths == 0] == 255).all(axis=-1).mean() > 0.97
    assert (white.images[:, 0] == 255).all()
