"""Rendered pixels against geometry worked out by hand, in every variant that works here."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from subspace3d.geometry import look_at
from subspace3d.mitsuba_variant import VARIANTS, check_variant, choose_variant, find_llvm, load_mitsuba, probe
from subspace3d.scenes.cameras import CameraSpec
from subspace3d.scenes.geometry.objects import BlockSpec, BoxSpec, GeometrySpec, PartSpec
from subspace3d.scenes.geometry.shapes import build_mesh
from subspace3d.scenes.lights import LampSpec, LightingSpec, place_in_room
from subspace3d.scenes.materials.atlas import TextureSpec
from subspace3d.scenes.render import SceneRenderer, _lamp, tone_map
from subspace3d.scenes.sampler import SceneSpec, sample_scene, scene_seeds

SIZE = 24


def test_scalar_works_and_the_choice_is_the_fastest_that_does():
    report = probe()
    assert report["variants"]["scalar"] == "works"
    assert report["chosen"] == next(name for name in VARIANTS if report["variants"][name] == "works")
    assert choose_variant("auto") == report["chosen"]
    with pytest.raises(ValueError, match="variant must be auto or one of"):
        choose_variant("opengl")


def test_a_library_that_is_no_llvm_is_reported_not_fatal(tmp_path, monkeypatch):
    (tmp_path / "libLLVM.so").write_bytes(b"not a library")
    monkeypatch.setenv("DRJIT_LIBLLVM_PATH", str(tmp_path / "libLLVM.so"))
    assert check_variant.__wrapped__("llvm") != ""


def test_llvm_15_is_refused_before_it_ends_a_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = sorted(Path("/usr/lib").glob("*/libLLVM-15.so*"))
    if not libraries:
        pytest.skip("needs LLVM 15 among the system's libraries")
    monkeypatch.setenv("DRJIT_LIBLLVM_PATH", str(libraries[0]))
    assert check_variant.__wrapped__("llvm") != ""


def test_the_library_is_found_where_its_package_lies_outside_this_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of --user, or of the environment below one with its packages."""
    monkeypatch.delenv("DRJIT_LIBLLVM_PATH", raising=False)
    found = find_llvm()
    monkeypatch.setattr(sys, "prefix", "/nowhere")
    assert find_llvm() == found
    assert found is None or Path(found).is_file()


@pytest.fixture(params=[name for name in VARIANTS if not check_variant(name)])
def variant(request):
    return request.param


def upright(kind: str, light: LightingSpec, positions: list[list[float]], hfov: float = 50.0) -> SceneSpec:
    """A primitive that fills [-1, 1]^3, plain white, seen from ``positions`` towards the origin."""
    zero = [0.0, 0.0, 0.0]
    part = PartSpec(kind, [1.0, 1.0, 1.0], zero, zero, zero, zero, [0.0] * 6, 0)
    texture = sample_scene(scene_seeds(0, 0, 0, "all"), "paper", 1).texture
    white = dataclasses.replace(
        texture.materials[0], colors=[[0.9] * 3] * 3, tint=[1.0] * 3, metallic=0.0, roughness=1.0, transmission=0.0,
        relief=0.0, roughness_span=0.0, metallic_span=0.0, hue_noise=0.0,
    )  # fmt: skip
    extrinsics = [look_at(np.array(position), np.zeros(3)).tolist() for position in positions]
    return SceneSpec(
        TextureSpec([white] * len(texture.materials)),
        GeometrySpec([BoxSpec(zero, [2.0, 2.0, 2.0], [part])], None),
        CameraSpec(hfov, zero, 0.0, {}, positions, extrinsics),
        light,
    )


def renderer_of(spec: SceneSpec, variant: str) -> SceneRenderer:
    return SceneRenderer(spec, build_mesh(spec.geometry), SIZE, variant)


GREY = LightingSpec([0.5] * 3, [0.5] * 3, [])


def test_depth_of_a_plane_is_the_same_in_every_pixel(variant):
    """The face x = -1 of a cube seen from x = -2.5 with 50 degrees: z-depth 1.5 everywhere; ray length would not be."""
    spec = upright("cube", GREY, [[-2.5, 0.0, 0.0], [0.0, 0.0, 2.4]])
    depths = renderer_of(spec, variant).depths()
    assert depths.shape == (2, SIZE, SIZE) and depths.dtype == np.float32
    assert np.abs(depths[0] - 1.5).max() < 1e-5 and np.abs(depths[1] - 1.4).max() < 1e-5


def test_depth_of_a_sphere_is_taken_on_the_centre_ray(variant):
    renderer = renderer_of(upright("ellipsoid", GREY, [[0.0, -3.0, 0.0]]), variant)
    focal = renderer.intrinsics[0, 0, 0]
    x = (np.arange(SIZE) + 0.5 - SIZE / 2) / focal
    square = x[None] ** 2 + x[:, None] ** 2 + 1
    # |z d - (0, 0, 3)| = 1 along d = (x, y, 1)
    root = 9 - 8 * square
    exact = np.where(root > 0, (3 - np.sqrt(np.maximum(root, 0))) / square, 0)
    depth = renderer.depths()[0]
    inner = root > 0.5
    # the inscribed polyhedron lies up to (pi / 28)^2 / 2 below the sphere, seen here under up to 45 degrees
    assert np.abs(depth - exact)[inner].max() < (np.pi / 28) ** 2
    assert np.all(depth[root < -0.1] == 0)


def test_image_agrees_with_depth_and_light_comes_from_where_it_should(variant):
    """A sun from world +x lights the right half of a sphere seen from -y; from +z the upper half."""
    for position, lit in (([10.0, 0, 0], np.s_[:, SIZE // 2 :]), ([0, 0, 10.0], np.s_[: SIZE // 2])):
        sun = LightingSpec([0.01] * 3, [0.01] * 3, [LampSpec("sun", position, [1.0] * 3, 2.0, 0.1)])
        renderer = renderer_of(upright("ellipsoid", sun, [[0.0, -3.0, 0.0]]), variant)
        image, surface = renderer.radiance(16, seed=1)[0, ..., :3].mean(-1), renderer.depths()[0] > 0
        bright = np.zeros_like(surface)
        bright[lit] = True
        assert image[surface & bright].mean() > 5 * image[surface & ~bright].mean()
        assert np.median(image[~surface]) == pytest.approx(0.01, rel=1e-3)


def test_glow_appears_in_the_background_where_its_direction_is(variant):
    glow = LampSpec("glow", [4.0, 9.0, 2.0], [1.0] * 3, 2.0, 0.2)
    light = LightingSpec([0.01] * 3, [0.01] * 3, [glow])
    position = -np.array(glow.position) / np.linalg.norm(glow.position) * 40.0  # the object is a dot from here
    renderer = renderer_of(upright("ellipsoid", light, [position.tolist()], 60.0), variant)
    image = renderer.radiance(4, seed=0)[0, ..., :3].mean(-1)
    image[renderer.depths()[0] > 0] = 0
    weight = np.where(image > 0.5 * image.max(), image, 0)
    row, column = (np.indices(image.shape) * weight).sum(axis=(1, 2)) / weight.sum()
    # a pixel of the environment image is 11 degrees wide, five of these pixels
    assert abs(row - SIZE / 2) < 3 and abs(column - SIZE / 2) < 3


def test_lamp_energy_is_irradiance_at_the_origin(variant):
    """A white face at distance 1 from the origin towards a far lamp gets its energy E: radiance a E / pi."""
    values = []
    for kind, distance in (("sun", 10.0), ("area", 8.0), ("point", 4.0)):
        lamp = LampSpec(kind, [0.0, 0.0, distance], [1.0] * 3, 2.0, 1.0)
        light = LightingSpec([0.0] * 3, [0.0] * 3, [lamp])
        renderer = renderer_of(upright("cube", light, [[0.0, 0.0, 3.0]], 20.0), variant)
        value = renderer.radiance(64, seed=0)[
            0, SIZE // 2 - 4 : SIZE // 2 + 4, SIZE // 2 - 4 : SIZE // 2 + 4, :3
        ].mean()
        # the face is one unit nearer to the lamp than the origin is
        values.append(value * (1 if kind == "sun" else ((distance - 1) / distance) ** 2))
    assert np.allclose(values, np.mean(values), rtol=0.1)
    assert 0.5 < np.mean(values) / (0.9 * 2.0 / np.pi) < 1.5


def test_a_shining_stick_is_a_surface_and_lights_what_is_near(variant):
    dark = LightingSpec([0.0] * 3, [0.0] * 3, [], [0], [0.5, 1.0, 2.0])
    spec = upright("cube", dark, [[0.0, -4.0, 0.0]])
    stick = BlockSpec("stick", [0.0, -1.3, 0.0], [2.0, 0.2, 0.6], [0.0] * 3, thin=False)
    geometry = dataclasses.replace(spec.geometry, blocks=[stick])
    meshes = build_mesh(geometry, shining=[0])
    renderer = SceneRenderer(dataclasses.replace(spec, geometry=geometry), meshes, SIZE, variant)
    depth, image = renderer.depths()[0], renderer.radiance(16, seed=0)[0, ..., :3]
    middle = SIZE // 2
    ahead, below = depth[middle, middle], depth[middle + 5, middle]
    assert below - ahead == pytest.approx(0.4 * 2 / 2.4, rel=1e-3)  # everything is 2.4 deep and becomes 2
    assert np.allclose(image[middle, middle], [0.5, 1.0, 2.0])
    lit = image[middle + 5, middle]
    assert lit[2] > 0.1 and np.allclose(lit / lit[2], [0.25, 0.5, 1.0], rtol=1e-3)
    assert renderer.exposed()[0, middle + 5, middle] and not renderer.exposed()[0, middle, middle]


def test_normal_maps_tilt_the_surface_as_their_images_say(variant, tmp_path):
    """Seen from -y the face of a cube has the image's right up (+z) and its down to the right (+x)."""
    cases = (((191, 128, 238), (0, -1, 1), (0, -1, -1)), ((128, 191, 238), (-1, -1, 0), (1, -1, 0)))
    for index, (pixel, bright, dark) in enumerate(cases):
        folder = tmp_path / str(index)
        folder.mkdir()
        Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(folder / "basecolor.png")
        Image.fromarray(np.full((8, 8, 3), pixel, np.uint8)).save(folder / "normal.png")
        values = []
        for position in (bright, dark):
            sun = LightingSpec([0.0] * 3, [0.0] * 3, [LampSpec("sun", list(map(float, position)), [1.0] * 3, 2.0, 0.0)])
            spec = upright("cube", sun, [[0.0, -3.0, 0.0]], 20.0)
            tilted = [dataclasses.replace(material, maps=".", rotation=0.0) for material in spec.texture.materials]
            spec = dataclasses.replace(spec, texture=TextureSpec(tilted))
            renderer = SceneRenderer(spec, build_mesh(spec.geometry), SIZE, variant, folder)
            values.append(renderer.radiance(16, seed=0)[0, 8:16, 8:16, :3].mean())
        # Lambert's cos(45 - 30) against cos(45 + 30); a rough principled surface is up to a quarter off it
        assert values[0] / values[1] == pytest.approx(np.cos(np.pi / 12) / np.sin(np.pi / 12), rel=0.25)


def test_glass_is_a_surface_and_lamps_are_not(variant):
    lamp = LampSpec("area", [3.5, 6.0, 0.0], [1.0] * 3, 2.0, 4.0)
    spec = upright("ellipsoid", LightingSpec([0.1] * 3, [0.1] * 3, [lamp]), [[0.0, -3.0, 0.0]])
    opaque = renderer_of(spec, variant).depths()
    glass = TextureSpec([dataclasses.replace(material, transmission=1.0) for material in spec.texture.materials])
    renderer = renderer_of(dataclasses.replace(spec, texture=glass), variant)
    assert np.array_equal(renderer.depths(), opaque)
    background = renderer.radiance(4, seed=0)[0, ..., :3][opaque[0] == 0]
    assert background.max() > 1 and np.isfinite(background).all()  # the lamp is seen there


def test_the_same_seed_gives_the_same_radiance(variant):
    spec = sample_scene(scene_seeds(0, 0, 0, "all"), "paper", 2)
    first, again, other = (renderer_of(spec, variant).radiance(4, seed) for seed in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_tone_map_exposes_surfaces_by_percentiles(rng):
    radiance = np.ones((2, 50, 50, 4), np.float32)
    radiance[..., :3] = rng.uniform(2, 4, (2, 50, 50, 3))
    surface = np.ones((2, 50, 50), bool)
    surface[:, :10] = False
    radiance[:, :10, :, :3] = 1000.0  # the background does not count, and saturates
    image = tone_map(radiance, surface)
    assert (image[:, :10] == 255).all()
    assert 0.005 < (image[:, 10:] == 255).mean() < 0.02 and 0.005 < (image[:, 10:] == 0).mean() < 0.02
    brighter = radiance * np.array([7, 7, 7, 1], np.float32)
    assert np.abs(image.astype(int) - tone_map(brighter, surface)).max() <= 1


def test_white_background_is_white_and_edges_are_blends_with_it(variant):
    spec = upright("ellipsoid", dataclasses.replace(GREY, background="white"), [[0.0, -3.0, 0.0]])
    renderer = renderer_of(spec, variant)
    surface, radiance = renderer.depths()[0] > 0, renderer.radiance(16, seed=0)
    image = tone_map(radiance, renderer.exposed())[0]
    alpha = radiance[0, ..., 3]
    assert (image[alpha == 0] == 255).all() and (alpha[surface] > 0.4).all()
    # pi r^2 / 4 of the pixels up to half a pixel around the circle's edge; inside everything is surface
    assert 0 < ((alpha > 0) & (alpha < 1)).sum() < 2 * np.pi * SIZE
    assert alpha.sum() == pytest.approx(surface.sum(), rel=0.05)


def test_every_lamp_has_a_place_and_a_direction():
    """Lamps at the ceiling look straight down."""
    mi = load_mitsuba("scalar")
    for seed in range(4):
        seeds = scene_seeds(seed, 0, 0, "all")
        spec = sample_scene(seeds, "paper", 2, "all", regime="room")
        lamps = place_in_room(spec.lighting, spec.geometry.room).lamps
        placed = [_lamp(mi, lamp)["to_world"].matrix for lamp in lamps if lamp.kind == "area"]
        assert all(np.isfinite(np.array(matrix)).all() for matrix in placed)
