"""Four independent streams, meshes and camera paths; no renderer needed."""

import dataclasses
import json

import numpy as np
import pytest

from subspace3d.choices import ATTRIBUTES
from subspace3d.scenes.cameras import BASE_DISTANCE, closed_spline
from subspace3d.scenes.geometry.heightfield import displacement
from subspace3d.scenes.geometry.objects import KINDS, BoxSpec, GeometrySpec, PartSpec
from subspace3d.scenes.geometry.shapes import build_mesh
from subspace3d.scenes.lights import LampSpec, LightingSpec, environment_image
from subspace3d.scenes.sampler import PRESETS, REGIMES, TRAJECTORIES, sample_scene, scene_seeds


def one_part(kind: str, axes: list[float], amplitude: float = 0.0) -> GeometrySpec:
    """A scene of one upright primitive; its box keeps the proportions of ``axes``."""
    zero = [0.0, 0.0, 0.0]
    part = PartSpec(kind, axes, zero, zero, zero, zero, [amplitude] * 6, 7)
    return GeometrySpec([BoxSpec(zero, [2 * axis for axis in axes], [part])], None)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "all"])
def test_only_the_named_attribute_varies_within_a_data_set(attribute, trajectory, regime, preset):
    """Every drawn value of the other three is the same in all scenes of a data set, and differs between data sets."""

    def draw(dataset: int, scene: int) -> dict:
        seeds = scene_seeds(3, dataset, scene, attribute)
        return sample_scene(
            seeds, preset, 3, attribute, regime=regime, trajectory=trajectory, dataset=dataset
        ).as_dict()

    first, second, other = draw(0, 0), draw(0, 1), draw(1, 0)
    for name in ATTRIBUTES:
        varies = attribute in (name, "all")
        assert (first[name] != second[name]) == varies
        assert first[name] != other[name]
    assert first == draw(0, 0)
    assert first == json.loads(json.dumps(first, allow_nan=False))


def test_seeds_differ_between_attributes_and_redraws_touch_one_stream():
    seeds = {attribute: scene_seeds(0, 0, 0, attribute) for attribute in ATTRIBUTES}
    assert len({value for seed in seeds.values() for value in dataclasses.astuple(seed)}) == 16
    for attribute, base in seeds.items():
        again = scene_seeds(0, 0, 0, attribute, attempt=1)
        changed = [name for name in ATTRIBUTES if getattr(base, name) != getattr(again, name)]
        assert changed == ["geometry" if attribute == "geometry" else "camera"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="attribute must be one of"):
        scene_seeds(0, 0, 0, "colour")
    with pytest.raises(ValueError, match="dataset_index must be at least 0, got -1"):
        scene_seeds(0, -1, 0, "texture")
    with pytest.raises(ValueError, match="preset must be one of"):
        sample_scene(scene_seeds(0, 0, 0, "texture"), "indoor", 2)
    with pytest.raises(ValueError, match=r"regime must be one of .* got 'city'"):
        sample_scene(scene_seeds(0, 0, 0, "texture"), "paper", 2, regime="city")


@pytest.mark.parametrize("kind", KINDS)
def test_primitives_are_closed_and_face_outward(kind):
    mesh = build_mesh(one_part(kind, [1.0, 0.7, 0.5])).objects
    corners = mesh.vertices[mesh.faces]
    # the divergence theorem gives the volume of a closed mesh whose faces point outward
    volume = np.einsum("ni,ni->n", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6
    exact = {"ellipsoid": 4 / 3 * np.pi, "cube": 8.0, "cylinder": 2 * np.pi, "torus": 2 * np.pi**2 * 0.7 * 0.3}[
        kind
    ] * 0.35
    # polygons of at least 20 sides inscribed in circles lose up to 2 % of the area
    assert 0.96 * exact <= volume <= exact * (1 + 1e-9)
    assert np.allclose(np.linalg.norm(mesh.normals, axis=1), 1)
    # vertex normals agree with the faces around them
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    solid = np.linalg.norm(normals, axis=1) > 1e-9
    assert np.einsum("ni,nki->nk", normals[solid], mesh.normals[mesh.faces[solid]]).min() > 0
    assert np.allclose(np.ptp(mesh.vertices, axis=0), [2, 1.4, 1], atol=1e-9)
    assert mesh.uv.min() >= 0 and mesh.uv.max() <= 1


def test_height_field_interpolates_its_grid_and_ends_at_zero(rng):
    grid = rng.uniform(-1, 1, (5, 5))
    field = displacement(grid, 61, 61)
    assert np.abs(field[[0, -1]]).max() == 0 and np.abs(field[:, [0, -1]]).max() == 0
    # grid point i lies at (i + 1) / 6 of the way; resampling to 30 and 36 points blurs by at most one step
    knots = field[10:51:10, 10:51:10]
    assert np.abs(knots - grid).max() < 0.35 * np.ptp(grid)
    assert np.corrcoef(knots.ravel(), grid.ravel())[0, 1] > 0.98


def test_displaced_shapes_stay_watertight():
    """Vertices that coincide on the plain shape still coincide: edges between faces do not open."""
    for kind in KINDS:
        plain, bumpy = (build_mesh(one_part(kind, [1, 1, 1], amplitude)).objects for amplitude in (0.0, 0.4))
        _, group = np.unique(plain.vertices.round(9), axis=0, return_inverse=True)
        group = group.ravel()
        mean = np.zeros((group.max() + 1, 3))
        np.add.at(mean, group, bumpy.vertices)
        mean /= np.bincount(group)[:, None]
        assert np.abs(bumpy.vertices - mean[group]).max() < 1e-9


def test_scene_is_normalised():
    for scene in range(3):
        spec = sample_scene(scene_seeds(0, 0, scene, "geometry"), "paper", 1)
        vertices = build_mesh(spec.geometry).objects.vertices
        assert np.ptp(vertices, axis=0).max() == pytest.approx(2)
        assert np.allclose(vertices.max(axis=0) + vertices.min(axis=0), 0, atol=1e-9)


def test_spline_passes_through_its_points_and_closes(rng):
    points = rng.normal(size=(7, 3))
    assert np.allclose(closed_spline(points, 7), points)
    fine = closed_spline(points, 7000)
    assert np.linalg.norm(np.diff(fine, axis=0, append=fine[:1]), axis=1).max() < 0.02


def test_camera_ranges():
    for scene in range(20):
        loop = sample_scene(scene_seeds(0, 0, scene, "camera"), "paper", 16, "camera").camera
        distance = np.linalg.norm(loop.positions, axis=1)
        assert distance.min() >= 0.7 * BASE_DISTANCE - 1e-9 and distance.max() <= 2.0 * BASE_DISTANCE + 1e-9
        assert 45 <= loop.hfov <= 70
        fixed = sample_scene(scene_seeds(0, scene, 0, "texture"), "paper", 16, "texture").camera
        assert fixed.target == [0, 0, 0] and np.linalg.norm(fixed.positions, axis=1).max() <= 1.5 * BASE_DISTANCE + 1e-9
        arc = np.array(sample_scene(scene_seeds(0, 0, scene, "all"), "generic", 16).camera.positions)
        elevation = np.rad2deg(np.arcsin(arc[:, 2] / np.linalg.norm(arc, axis=1)))
        assert elevation.min() >= 10 - 1e-9 and elevation.max() <= 60 + 1e-9
        directions = arc[:, :2] / np.linalg.norm(arc[:, :2], axis=1, keepdims=True)
        assert np.rad2deg(np.arccos((directions @ directions.T).clip(-1, 1))).max() <= 120 + 1e-6


def test_glow_gives_its_energy_to_a_surface_that_faces_it():
    lamp = LampSpec("glow", [0.0, 3.0, 10.0], [1.0, 0.5, 0.25], 2.0, 0.5)
    image = environment_image(LightingSpec([0.0] * 3, [0.0] * 3, [lamp]))
    rows, columns = image.shape[:2]
    theta = (np.arange(rows) + 0.5) / rows * np.pi
    phi = (np.arange(columns) + 0.5) / columns * 2 * np.pi
    normal = np.array(lamp.position) / np.linalg.norm(lamp.position)
    direction = np.stack(
        [np.outer(np.sin(theta), np.sin(phi)), np.outer(np.sin(theta), np.cos(phi)), np.outer(np.cos(theta), phi**0)],
        -1,
    )
    weight = np.maximum(direction @ normal, 0) * np.sin(theta)[:, None] * (np.pi / rows) * (2 * np.pi / columns)
    assert np.allclose((image * weight[..., None]).sum(axis=(0, 1)), [2.0, 1.0, 0.5], rtol=1e-5)
