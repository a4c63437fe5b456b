"""The texture attribute: a palette of PBR materials, baked into one texture atlas.

Part i of a scene wears material ``i % PALETTE``, so the palette does not depend on how many parts there are. Each
material has its own random stream. Patterns are functions on [0, 1]^2 of a part's own (u, v); with a folder of texture
maps each material is one of them instead.

The atlas is 4 x 9 cells: columns 0..4 hold the palette, columns 5..8 four cells of double size for floor, walls, roof,
and window glass (or what a task shows there).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from subspace3d.scenes.materials.patterns import LATTICE_SIZE, PATTERNS, fractal, noise
from subspace3d.scenes.materials.texture_maps import load_maps

PALETTE = 20
FLOOR_CELL, WALL_CELL, ROOF_CELL, GLASS_CELL = range(PALETTE, PALETTE + 4)
_ROWS, _COLUMNS = 4, 9
_STEEPEST = 1.5  # slope of relief: what a normal map can still show
_LARGEST_KEPT = 256  # texels along a cell
_SCENE_STREAM = 1000  # spawn key of what is drawn once per palette


@dataclass(frozen=True)
class MaterialSpec:
    """A pattern t(u, v) in [0, 1] that blends three linear RGB colours, and the surface's reflection."""

    pattern: str  # a key of PATTERNS, or "maps"
    colors: list[list[float]]  # 3 linear RGB colours, at t = 0, 1/2, 1
    tint: list[float]  # linear RGB, multiplies the colours
    scale: float  # pattern periods along u
    aspect: float  # periods along v over periods along u
    rotation: float  # degrees
    offset: list[float]
    contrast: float
    detail: float  # pattern-specific: line width, warp or irregularity, in [0, 1]
    noise_seed: int
    metallic: float
    roughness: float
    transmission: float  # 1: glass
    relief: float = 0.0  # height of t = 1 over t = 0, in periods; negative: t = 1 lies deeper
    roughness_span: float = 0.0  # roughness at t = 1 minus roughness at t = 0
    metallic_span: float = 0.0
    hue_noise: float = 0.0  # how far low-frequency noise moves each colour channel, relative
    maps: str | None = None  # the material's name in the folder of texture maps

    def __hash__(self) -> int:
        return self.noise_seed


@dataclass(frozen=True)
class TextureSpec:
    """Materials 0..PALETTE-1 of the parts, then those of floor, walls, roof and window glass."""

    materials: list[MaterialSpec]
    ior: float = 1.5  # of all glass in the scene
    glass_slabs: list[bool] = field(
        default_factory=list
    )  # whether thin slab i is of window glass rather than of a palette material


@dataclass
class Surface:
    """A baked material or atlas: n rows and m columns of texels."""

    color: np.ndarray  # float32 [n, m, 3], linear RGB
    roughness: np.ndarray  # float32 [n, m]
    metallic: np.ndarray  # float32 [n, m]
    transmission: np.ndarray  # float32 [n, m]
    normal: np.ndarray  # float32 [n, m, 3], unit; x along u, y along v, z outward


def draw_texture(seed: int, preset: str, library: Sequence[str] = ()) -> TextureSpec:
    """Draw every material from its own child stream of ``seed``.

    Args:
        seed (int): of the texture stream.
        preset (str): paper, release or generic.
        library (sequence of str): names of texture-map materials to draw from; empty: procedural patterns.
    """

    def stream(key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key,)))

    materials = [_draw_material(stream(i), preset, i, library) for i in range(PALETTE + 3)]
    scene = stream(_SCENE_STREAM)
    if preset == "release":
        materials[:PALETTE] = _modify_reflection(scene, materials[:PALETTE])
    materials.append(_draw_window_glass(scene))
    return TextureSpec(materials, scene.uniform(1.4, 1.6), (scene.random(2) < 0.8).tolist())


def _draw_material(rng: np.random.Generator, preset: str, index: int, library: Sequence[str]) -> MaterialSpec:
    is_part = index < PALETTE
    pattern = sorted(PATTERNS)[int(rng.integers(len(PATTERNS)))]
    colors = rng.uniform(0.02, 1, (3, 3)) ** 1.6
    if rng.random() < 0.5:  # shades of one colour, as most real materials are
        colors = colors[:1] * np.array([[0.35], [1.0], [0.7]]) + 0.15 * colors * np.array([[0.2], [1.0], [0.6]])
    tint = rng.uniform(0.6, 1, 3)
    scale = float(np.exp(rng.uniform(np.log(1.5), np.log(8.0)))) * (1 if is_part else 3)
    metallic, roughness, transmission = _draw_reflection(rng, preset, is_part)
    aspect = float(np.exp(rng.uniform(np.log(0.5), np.log(2.0))))
    rotation, offset = rng.uniform(0, 360), rng.uniform(0, 10, 2).tolist()
    contrast, detail, noise_seed = rng.uniform(0.6, 1), rng.uniform(0, 1), int(rng.integers(2**53))
    steep = 0.05 if preset == "generic" else 0.12
    relief = rng.uniform(-steep, steep) if rng.random() < 0.6 else 0.0
    roughness_span, metallic_span = rng.uniform(-0.3, 0.3), rng.uniform(-1, 1)
    if metallic in (0.0, 1.0) or transmission:
        metallic_span = 0.0
    hue_noise = rng.uniform(0, 0.4)
    maps = None
    if library:
        # pictures are seen whole, or repeat a few times
        pattern, scale, aspect = "maps", scale / 3, 1.0
        maps = library[int(rng.integers(len(library)))]
    return MaterialSpec(
        pattern, np.clip(colors, 0.01, 0.95).tolist(), tint.tolist(), scale, aspect, rotation, offset, contrast, detail,
        noise_seed, metallic, roughness, transmission, relief, 0.0 if transmission else roughness_span, metallic_span,
        hue_noise, maps,
    )  # fmt: skip


def _draw_reflection(rng: np.random.Generator, preset: str, is_part: bool) -> tuple[float, float, float]:
    """(metallic, roughness, transmission): dielectric, metal, anything between, or glass."""
    shares = {"paper": (0.5, 0.2, 0.2, 0.1), "release": (0.8, 0.2, 0, 0), "generic": (0.8, 0.1, 0.07, 0.03)}[preset]
    kind = rng.choice(4, p=shares if is_part else (1, 0, 0, 0))
    share, shine = rng.random(2)
    if kind == 0:
        return 0.0, 0.2 + 0.8 * shine, 0.0
    if kind == 1:
        return 0.6 + 0.4 * share, 0.001 + 0.4 * shine, 0.0
    if kind == 2:
        return share, 0.001 + 0.999 * shine, 0.0
    return 0.0, 0.001 + 0.1 * shine, 1.0


def _modify_reflection(rng: np.random.Generator, materials: list[MaterialSpec]) -> list[MaterialSpec]:
    """In half of the palettes make each material metallic or shiny with probability 0.4, a fifth of them strongly."""
    modified, strong = rng.random() < 0.5, rng.random() < 0.2
    result = []
    for material in materials:
        chosen = rng.random() < 0.4
        metallic = rng.uniform(0.6, 1) if strong else rng.uniform(0.001, 1)
        roughness = rng.uniform(0, 0.05) if strong else rng.uniform(0.001, 0.2)
        if modified and chosen:
            material = replace(material, metallic=metallic, roughness=roughness, roughness_span=0.0, metallic_span=0.0)
        result.append(material)
    return result


def _draw_window_glass(rng: np.random.Generator) -> MaterialSpec:
    plain = [[0.95, 0.95, 0.95]] * 3
    tint = rng.uniform(0.85, 1, 3).tolist()
    seed = int(rng.integers(2**53))
    return MaterialSpec(
        "clouds", plain, tint, 1.0, 1.0, 0.0, [0.0, 0.0], 0.0, 0.0, seed, 0.0, rng.uniform(0.001, 0.1), 1.0
    )


def cell_uv(cell: int, uv: np.ndarray) -> np.ndarray:
    """Atlas coordinates [N, 2] of a material's own (u, v) [N, 2] in [0, 1]; both with v down the image's rows."""
    column, row, span = _cell(cell)
    inset = 0.02  # keeps bilinear look-ups inside the cell
    inner = inset + (1 - 2 * inset) * uv
    return (np.array([column, row]) + span * inner) / np.array([_COLUMNS, _ROWS])


def _cell(cell: int) -> tuple[int, int, int]:
    if cell < PALETTE:
        return cell % 5, cell // 5, 1
    double = cell - PALETTE
    return 5 + 2 * (double // 2), 2 * (double % 2), 2


def bake_atlas(
    texture: TextureSpec,
    cell_size: int,
    used: set[int],
    library: Path | None = None,
    pictures: Mapping[int, np.ndarray] | None = None,
) -> Surface:
    """Bake the materials ``used`` into one atlas of 4 n x 9 n texels, n = ``cell_size``.

    Args:
        texture (TextureSpec): the materials.
        cell_size (int): texels along a cell of the palette.
        used (set of int): cells to bake; the others stay grey.
        library (Path | None): folder of the texture maps that materials name.
        pictures (dict): cell -> linear RGB float [h, w, 3] that replaces the colours of its material.
    """
    rows, columns = _ROWS * cell_size, _COLUMNS * cell_size
    atlas = _flat(rows, columns)
    for cell in sorted(used):
        column, row, span = _cell(cell)
        size = span * cell_size
        # small cells are kept for the data set's next scene, which often has the same materials
        bake = _bake_and_keep if cell_size <= _LARGEST_KEPT else bake_material
        block = bake(texture.materials[cell], size, library)
        place = np.s_[row * cell_size : row * cell_size + size, column * cell_size : column * cell_size + size]
        for name in ("color", "roughness", "metallic", "transmission", "normal"):
            getattr(atlas, name)[place] = getattr(block, name)
        if pictures and cell in pictures:
            atlas.color[place] = _stretch(pictures[cell], size)
    return atlas


def _flat(rows: int, columns: int) -> Surface:
    normal = np.zeros((rows, columns, 3), np.float32)
    normal[..., 2] = 1
    roughness, metallic, transmission = (np.full((rows, columns), value, np.float32) for value in (0.5, 0.0, 0.0))
    return Surface(np.full((rows, columns, 3), 0.5, np.float32), roughness, metallic, transmission, normal)


def _stretch(picture: np.ndarray, size: int) -> np.ndarray:
    rows = ((np.arange(size) + 0.5) * picture.shape[0] / size).astype(int)
    columns = ((np.arange(size) + 0.5) * picture.shape[1] / size).astype(int)
    return picture[np.ix_(rows, columns)].astype(np.float32)


def bake_material(spec: MaterialSpec, size: int, library: Path | None = None) -> Surface:
    """One material as ``size`` x ``size`` texels.

    Raises:
        ValueError: the material names texture maps and ``library`` does not hold them.
    """
    axis = (np.arange(size) + 0.5) / size - 0.5
    u, v = np.meshgrid(axis, axis)
    cos, sin = np.cos(np.deg2rad(spec.rotation)), np.sin(np.deg2rad(spec.rotation))
    x = (cos * u - sin * v) * spec.scale + spec.offset[0]
    y = (sin * u + cos * v) * spec.scale * spec.aspect + spec.offset[1]
    result = _flat(size, size)
    result.transmission[:] = spec.transmission
    lattice = np.random.default_rng(spec.noise_seed).random((LATTICE_SIZE, LATTICE_SIZE))
    if spec.maps is not None:
        if library is None:
            raise ValueError(f"textures must be given for a material that names the maps {spec.maps!r}")
        slope_x, slope_y = _bake_maps(result, spec, load_maps(library, spec.maps, max(size, 256)), x, y)
    else:
        value = np.clip(PATTERNS[spec.pattern](x, y, spec.detail, lattice), 0, 1)
        result.color[:] = _blend(spec, value, x, y, lattice)
        result.roughness[:] = np.clip(spec.roughness + spec.roughness_span * (value - 0.5), 0.001, 1)
        result.metallic[:] = np.clip(spec.metallic + spec.metallic_span * (value - 0.5), 0, 1)
        # slopes along u and v; one texel is 1 / size of the cell, and so scale / size periods
        slope_v, slope_u = (spec.relief * size / spec.scale * axis for axis in np.gradient(value))
        result.normal[:] = _normals(slope_u, slope_v)
        return result
    result.normal[:] = _normals(cos * slope_x + sin * slope_y, cos * slope_y - sin * slope_x)
    return result


_bake_and_keep = functools.lru_cache(maxsize=PALETTE + 4)(bake_material)


def _normals(slope_u: np.ndarray, slope_v: np.ndarray) -> np.ndarray:
    steepness = np.hypot(slope_u, slope_v)
    shrink = -np.minimum(1, _STEEPEST / np.maximum(steepness, 1e-9))
    up = 1 / np.sqrt(1 + (shrink * steepness) ** 2)
    return np.stack([shrink * up * slope_u, shrink * up * slope_v, up], -1)


def _blend(spec: MaterialSpec, value: np.ndarray, x: np.ndarray, y: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    value = (0.5 + (value - 0.5) * spec.contrast) * 2
    first, second, third = np.array(spec.colors)
    lower = np.minimum(value, 1)[..., None]
    upper = np.maximum(value - 1, 0)[..., None]
    color = first + (second - first) * lower + (third - second) * upper
    # nothing real is perfectly even: a faint mottling also gives plain areas something to match
    mottle = 0.85 + 0.3 * fractal(x * 3, y * 3, lattice, 2)[..., None]
    if spec.hue_noise:
        phase = 1.5 * noise(x * 0.6, y * 0.6, lattice)[..., None] + np.arange(3) / 3
        mottle = mottle * (1 + spec.hue_noise * np.sin(2 * np.pi * phase))
    if spec.transmission > 0:
        color = 0.75 + 0.25 * color
    return np.clip(color * mottle * np.array(spec.tint), 0, 0.98)


def _bake_maps(
    result: Surface, spec: MaterialSpec, maps: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Fill ``result`` from texture maps that repeat at every unit of (x, y); return the slopes along x and y."""
    size = len(maps["basecolor"])
    row, column = (np.floor((axis % 1) * size).astype(int) % size for axis in (y, x))
    result.color[:] = np.clip(maps["basecolor"][row, column] * np.array(spec.tint), 0, 0.98)
    result.roughness[:] = np.clip(maps["roughness"][row, column], 0.001, 1) if "roughness" in maps else spec.roughness
    result.metallic[:] = maps["metallic"][row, column] if "metallic" in maps else spec.metallic
    if "normal" not in maps:
        return np.zeros_like(x), np.zeros_like(x)
    normal = maps["normal"][row, column]
    steepness = np.maximum(normal[..., 2], 0.1)
    # the maps' y points up, the rows of an image go down
    return -normal[..., 0] / steepness, normal[..., 1] / steepness
