"""Patterns, atlas, relief and the user's own texture maps; no renderer needed."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from subspace3d.scenes.materials.atlas import (
    GLASS_CELL,
    PALETTE,
    MaterialSpec,
    bake_atlas,
    bake_material,
    cell_uv,
    draw_texture,
)
from subspace3d.scenes.materials.patterns import LATTICE_SIZE, PATTERNS
from subspace3d.scenes.materials.texture_maps import find_textures, load_maps, srgb_to_linear

PLAIN = MaterialSpec(
    "clouds", [[0.1] * 3, [0.5] * 3, [0.9] * 3], [1.0] * 3, 4.0, 1.0, 0.0, [0.0, 0.0], 1.0, 0.5, 5, 0.0, 0.5, 0.0
)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_bakes_to_colours_with_contrast(name):
    surface = bake_material(dataclasses.replace(PLAIN, pattern=name, scale=6.0), 64)
    assert surface.color.shape == (64, 64, 3) and surface.color.dtype == np.float32
    assert surface.color.min() >= 0 and surface.color.max() < 1 and surface.color.std() > 0.03
    assert np.array_equal(surface.color, bake_material(dataclasses.replace(PLAIN, pattern=name, scale=6.0), 64).color)


def test_atlas_cells_do_not_overlap():
    corners = np.array([[0.0, 0.0], [1.0, 1.0]])
    cells = [cell_uv(cell, corners) for cell in range(PALETTE + 4)]
    for index, first in enumerate(cells):
        assert first.min() >= 0 and first.max() <= 1
        for second in cells[:index]:
            assert np.any((first[1] <= second[0]) | (second[1] <= first[0]))


def test_relief_tilts_normals_against_the_slope_of_the_pattern():
    """n is along (-dh/du, -dh/dv, 1), h = relief / scale * t: t is differentiated anew, at a 2000th of a texel."""
    spec = dataclasses.replace(PLAIN, pattern="grating", relief=0.05, rotation=30.0, scale=3.0, aspect=1.4)
    size, step = 256, 0.5 / 256 / 1000
    lattice = np.random.default_rng(spec.noise_seed).random((LATTICE_SIZE, LATTICE_SIZE))
    axis = (np.arange(size) + 0.5) / size - 0.5
    u, v = np.meshgrid(axis, axis)

    def height(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        cos, sin = np.cos(np.deg2rad(30.0)), np.sin(np.deg2rad(30.0))
        x, y = (cos * u - sin * v) * 3.0, (sin * u + cos * v) * 3.0 * 1.4
        return 0.05 / 3.0 * PATTERNS["grating"](x, y, spec.detail, lattice)

    slope = np.stack([(height(u + step, v) - height(u - step, v)), (height(u, v + step) - height(u, v - step))], -1)
    slope /= 2 * step
    normal = bake_material(spec, size).normal
    assert np.allclose(np.linalg.norm(normal, axis=-1), 1, atol=1e-6)
    found = -normal[..., :2] / normal[..., 2:]
    # the baked slope is a difference over two texels: error t''' / 6 / size^2, with |t'''| < (2 pi 6)^3 / 2
    bound = 0.05 / 3.0 * (2 * np.pi * 3 * 2 * 1.4) ** 3 / 12 / size**2 + 1e-5
    assert np.abs(found - slope)[2:-2, 2:-2].max() < bound
    assert np.abs(slope).max() > 5 * bound


def test_roughness_and_metal_follow_the_pattern():
    spec = dataclasses.replace(PLAIN, pattern="tiles", roughness_span=0.4, metallic=0.5, metallic_span=-0.6)
    surface = bake_material(spec, 64)
    assert np.corrcoef(surface.roughness.ravel(), surface.metallic.ravel())[0, 1] < -0.99
    assert surface.roughness.max() - surface.roughness.min() == pytest.approx(0.4, abs=0.1)
    flat = bake_material(PLAIN, 16)
    assert np.ptp(flat.roughness) == 0 and np.ptp(flat.metallic) == 0 and (flat.normal[..., 2] == 1).all()


def test_presets_draw_the_documented_shares_of_glass_and_metal():
    def shares(preset: str) -> tuple[float, float]:
        parts = [material for seed in range(60) for material in draw_texture(seed, preset).materials[:PALETTE]]
        return np.mean([m.transmission for m in parts]), np.mean([m.metallic > 0 for m in parts])

    # 1200 materials: a share p has a standard deviation below sqrt(p (1 - p) / 1200); four of them
    for preset, glass, metal in (("paper", 0.1, 0.4), ("generic", 0.03, 0.17)):
        found = shares(preset)
        for share, expected in zip(found, (glass, metal)):
            assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / 1200)
    # release: 0.2 are metal, and with probability 1/2 a palette has 0.4 of its materials made metallic; palettes are 60
    found = shares("release")
    assert found[0] == 0 and abs(found[1] - (0.2 + 0.5 * 0.4 * 0.8)) < 4 * 0.16 / np.sqrt(60) + 0.05
    texture = draw_texture(1, "paper")
    assert 1.4 <= texture.ior <= 1.6 and texture.materials[GLASS_CELL].transmission == 1


@pytest.fixture
def library(tmp_path, rng):
    for name in ("stone", "cloth"):
        (tmp_path / name).mkdir()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / name / "basecolor.png")
    normal = np.full((32, 32, 3), (191, 191, 219), np.uint8)  # x and y both 0.5: tilted to the right and up
    Image.fromarray(normal).save(tmp_path / "stone/normal.png")
    Image.fromarray(np.full((32, 32), 51, np.uint8)).save(tmp_path / "stone/roughness.png")
    Image.fromarray(rng.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(tmp_path / "Rock012_4K_Color.jpg")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "Rock012_4K_Metalness.jpg")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "holiday.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "Rock012_4K_Displacement.jpg")
    return tmp_path


def test_a_folder_of_texture_maps_is_read_by_its_names(library):
    found = {material.name: set(material.files) for material in find_textures(library)}
    assert found == {
        "Rock012_4K": {"basecolor", "metallic"},
        "cloth": {"basecolor"},
        "holiday": {"basecolor"},
        "stone": {"basecolor", "normal", "roughness"},
    }
    maps = load_maps(library, "stone", 32)
    stored = np.asarray(Image.open(library / "stone/basecolor.png")) / 255
    assert np.allclose(maps["basecolor"], srgb_to_linear(stored), atol=1e-6)
    assert np.allclose(maps["roughness"], 0.2) and np.allclose(
        maps["normal"][0, 0], [0.5, 0.5, np.sqrt(0.5)], atol=0.01
    )


def test_materials_come_from_the_folder_and_their_normals_turn_with_them(library):
    names = [material.name for material in find_textures(library)]
    texture = draw_texture(0, "paper", names)
    assert {material.maps for material in texture.materials[:PALETTE]} <= set(names)
    for rotation in (0.0, 90.0):
        surface = bake_material(dataclasses.replace(PLAIN, maps="stone", rotation=rotation), 16, library)
        # up in the map is against v; a pattern turned by 90 degrees has its x along -v and its y along u
        expected = [0.5, -0.5] if rotation == 0 else [-0.5, -0.5]
        assert np.allclose(surface.normal[..., :2], expected, atol=0.02)
        assert np.allclose(surface.roughness, 0.2)
    atlas = bake_atlas(texture, 32, {0, 1}, library)
    assert atlas.color[:32, :32].std() >= 0 and (atlas.color[64:, :32] == 0.5).all()


def test_bad_folders_of_texture_maps_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="textures: no such folder"):
        find_textures(tmp_path / "none")
    with pytest.raises(ValueError, match="textures must hold base colour images"):
        find_textures(tmp_path)
    (tmp_path / "a_basecolor.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="a_basecolor\\.png is not a whole image"):
        load_maps(tmp_path, "a", 16)
