"""Micro-baseline paths against SciPy's splines, and the ranges of all presets' cameras."""

import itertools

import numpy as np
import pytest

from subspace3d.geometry import look_at
from subspace3d.scenes.cameras import BASE_DISTANCE
from subspace3d.scenes.geometry.mesh import rotation_matrix
from subspace3d.scenes.sampler import sample_scene, scene_seeds
from subspace3d.scenes.trajectories import FRAMES, TREMOR, WALK, draw_micro, natural_spline, slerp_path


@pytest.mark.parametrize("points", [3, 7, 10])
def test_path_is_the_natural_cubic_spline(rng, points):
    interpolate = pytest.importorskip("scipy.interpolate")
    values = rng.normal(size=(points, 3))
    exact = interpolate.CubicSpline(np.arange(points), values, bc_type="natural")(np.linspace(0, points - 1, 42))
    assert np.allclose(natural_spline(values, 42), exact, atol=1e-12)


def test_rotations_are_slerped(rng):
    transform = pytest.importorskip("scipy.spatial.transform")
    keys = transform.Rotation.from_euler("xyz", rng.uniform(-60, 60, (6, 3)), degrees=True)
    exact = transform.Slerp(np.arange(6), keys)(np.linspace(0, 5, 42)).as_matrix()
    assert np.allclose(slerp_path(keys.as_matrix(), 42), exact, atol=1e-12)
    still = np.stack([np.eye(3)] * 3)
    assert np.allclose(slerp_path(still, 5), np.eye(3))


def test_walk_has_the_documented_steps_and_turns(rng):
    first = look_at(np.array([0.0, -2.0, 0.3]), np.zeros(3))
    widest = []
    for _ in range(50):
        camera = draw_micro(rng, WALK, first, np.zeros(3), FRAMES)
        control = np.array(camera.control["positions"])
        steps = np.linalg.norm(np.diff(control, axis=0), axis=1)
        assert len(control) == 7 and steps.max() <= 0.03
        rotations = np.array(camera.control["rotations"]).reshape(-1, 3, 3)
        for before, after in itertools.pairwise(rotations):
            # at most one degree about each axis: at most sqrt(3) degrees, to second order
            assert np.rad2deg(np.arccos((np.trace(after @ before.T) - 1) / 2)) < np.sqrt(3) * 1.02
        positions = np.array(camera.positions)
        assert np.allclose(positions[[0, -1]], control[[0, -1]])
        widest.append(np.linalg.norm(positions[:, None] - positions, axis=-1).max())
        extrinsics = np.array(camera.extrinsics_w2c)
        assert np.allclose(np.einsum("sji,sj->si", extrinsics[..., :3], -extrinsics[..., 3]), positions)
    # a Monte-Carlo of the documented sampler gives a median of 0.045; spread of 50 draws' median about 0.003
    assert 0.03 < np.median(widest) < 0.06


def test_tremor_is_two_to_four_percent_of_the_distance_seen_through_a_telephone(rng):
    for distance in (0.5, 3.0):
        first = look_at(np.array([0.0, -distance, 0.0]), np.zeros(3))
        camera = draw_micro(rng, TREMOR, first, np.zeros(3), FRAMES)
        positions = np.array(camera.positions)
        widest = np.linalg.norm(positions[:, None] - positions, axis=-1).max()
        assert 0.02 - 1e-9 <= widest / distance <= 0.04 + 1e-9
        assert camera.aspect == pytest.approx(4 / 3) and 48 <= camera.hfov <= 50


def test_turns_compose_on_the_left():
    """With one control step the last rotation is a small turn in camera axes of the first."""
    rng = np.random.default_rng(3)
    first = look_at(np.array([1.0, -2.0, 0.5]), np.zeros(3))
    camera = draw_micro(rng, WALK, first, np.zeros(3), 2)
    rng = np.random.default_rng(3)
    rotation = first[:, :3]
    for _ in range(6):
        rng.uniform(size=3)
        rotation = rotation_matrix(rng.uniform(-1, 1, 3).tolist()) @ rotation
    assert np.allclose(np.array(camera.extrinsics_w2c)[-1, :, :3], rotation)


def test_release_ranges_depend_on_what_varies():
    for scene in range(20):
        for attribute, (low, high), spread in (
            ("camera", (0.7, 2.0), True), ("texture", (0.85, 1.5), False), ("lighting", (0.7, 1.0), True),
        ):  # fmt: skip
            seeds = scene_seeds(0, scene, 0, attribute)
            spec = sample_scene(seeds, "release", 30, attribute)
            distance = np.linalg.norm(spec.camera.positions, axis=1) / BASE_DISTANCE
            assert low - 1e-9 <= distance.min() and distance.max() <= high + 1e-9
            assert any(spec.camera.target) == spread and len(spec.camera.control["radii"]) == 6
            lamps = spec.lighting.lamps
            if attribute == "lighting":
                assert 2 <= len(lamps) <= 3 and all(lamp.kind == "sun" and 0.1 <= lamp.energy <= 0.3 for lamp in lamps)
                assert spec.lighting.sky == [1e-3] * 3 and np.linalg.norm(spec.camera.target) < 0.08
            else:
                assert not lamps and 0.55 <= spec.lighting.sky[0] <= 0.75


@pytest.mark.parametrize("dataset", range(9))
def test_release_geometry_data_sets_form_a_grid(dataset):
    most, complexity = (3, 5, 7)[dataset % 3], dataset // 3
    for scene in range(5):
        geometry = sample_scene(
            scene_seeds(0, dataset, scene, "geometry"), "release", 1, "geometry", dataset=dataset
        ).geometry
        assert 2 * (most - 2) <= len(geometry.boxes) <= 2 * most
        for box in geometry.boxes:
            large = box.size[0] > 4
            allowed = (
                range(1 + 3 * complexity, 4 + 3 * complexity)
                if large
                else range(1 + 2 * complexity, 3 + 2 * complexity)
            )
            assert len(box.parts) in allowed
            assert all(part.kind != "torus" for part in box.parts)
