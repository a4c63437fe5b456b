"""The texture attribute: a palette of procedural materials, baked into one texture atlas.

Part i of a scene wears material ``i % PALETTE``, so the palette does not depend on how many parts there are. Each
material has its own random stream. All patterns are functions on [0, 1]^2 of a part's own (u, v).

The atlas is 4 x 7 cells: columns 0..4 hold the palette, columns 5..6 two cells of double size for ground and walls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PALETTE = 20
GROUND_CELL, WALL_CELL = PALETTE, PALETTE + 1
_ROWS, _COLUMNS = 4, 7
_NOISE_SIZE = 64  # period of the noise lattice


@dataclass(frozen=True)
class MaterialSpec:
    """A pattern t(u, v) in [0, 1] that blends three linear RGB colours, and the surface's reflection."""

    pattern: str
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


@dataclass(frozen=True)
class TextureSpec:
    """Materials 0..PALETTE-1 of the parts, then those of ground and walls."""

    materials: list[MaterialSpec]


def draw_texture(seed: int, preset: str) -> TextureSpec:
    """Draw every material from its own child stream of ``seed``."""
    streams = (np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,))) for i in range(PALETTE + 2))
    return TextureSpec([_draw_material(rng, preset, is_part=i < PALETTE) for i, rng in enumerate(streams)])


def _draw_material(rng: np.random.Generator, preset: str, is_part: bool) -> MaterialSpec:
    pattern = sorted(_PATTERNS)[int(rng.integers(len(_PATTERNS)))]
    colors = rng.uniform(0.02, 1, (3, 3)) ** 1.6
    if rng.random() < 0.5:  # shades of one colour, as most real materials are
        colors = colors[:1] * np.array([[0.35], [1.0], [0.7]]) + 0.15 * colors * np.array([[0.2], [1.0], [0.6]])
    tint = rng.uniform(0.6, 1, 3)
    scale = float(np.exp(rng.uniform(np.log(1.5), np.log(8.0)))) * (1 if is_part else 3)
    metallic, roughness, transmission = _draw_reflection(rng, preset, is_part)
    return MaterialSpec(
        pattern,
        np.clip(colors, 0.01, 0.95).tolist(),
        tint.tolist(),
        scale,
        float(np.exp(rng.uniform(np.log(0.5), np.log(2.0)))),
        rng.uniform(0, 360),
        rng.uniform(0, 10, 2).tolist(),
        rng.uniform(0.6, 1),
        rng.uniform(0, 1),
        int(rng.integers(2**53)),
        metallic,
        roughness,
        transmission,
    )


def _draw_reflection(rng: np.random.Generator, preset: str, is_part: bool) -> tuple[float, float, float]:
    """(metallic, roughness, transmission): dielectric, metal, anything between, or glass."""
    shares = {"paper": (0.5, 0.2, 0.2, 0.1), "generic": (0.8, 0.1, 0.07, 0.03)}[preset] if is_part else (1, 0, 0, 0)
    kind = rng.choice(4, p=shares)
    share, shine = rng.random(2)
    if kind == 0:
        return 0.0, 0.2 + 0.8 * shine, 0.0
    if kind == 1:
        return 0.6 + 0.4 * share, 0.001 + 0.4 * shine, 0.0
    if kind == 2:
        return share, 0.001 + 0.999 * shine, 0.0
    return 0.0, 0.001 + 0.1 * shine, 1.0


def cell_uv(cell: int, uv: np.ndarray) -> np.ndarray:
    """Atlas coordinates [N, 2] of a material's own (u, v) [N, 2] in [0, 1]; both with v down the image's rows."""
    column, row, span = _cell(cell)
    inset = 0.02  # keeps bilinear look-ups inside the cell
    inner = inset + (1 - 2 * inset) * uv
    return (np.array([column, row]) + span * inner) / np.array([_COLUMNS, _ROWS])


def _cell(cell: int) -> tuple[int, int, int]:
    if cell < PALETTE:
        return cell % 5, cell // 5, 1
    return 5, 2 * (cell - PALETTE), 2


def bake_atlas(texture: TextureSpec, cell_size: int, used: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """Bake the materials ``used`` into images.

    Returns:
        tuple: base colour float32 [4 n, 7 n, 3] linear RGB with n = ``cell_size``; and float32 [4, 7, 3] with
        metallic, roughness and transmission of each cell.
    """
    color = np.full((_ROWS * cell_size, _COLUMNS * cell_size, 3), 0.5, np.float32)
    surface = np.zeros((_ROWS, _COLUMNS, 3), np.float32)
    surface[..., 1] = 0.5
    for cell in used:
        column, row, span = _cell(cell)
        spec, size = texture.materials[cell], span * cell_size
        block = bake_material(spec, size)
        color[row * cell_size : row * cell_size + size, column * cell_size : column * cell_size + size] = block
        surface[row : row + span, column : column + span] = (spec.metallic, spec.roughness, spec.transmission)
    return color, surface


def bake_material(spec: MaterialSpec, size: int) -> np.ndarray:
    """Base colour of one material, float32 [size, size, 3] linear RGB."""
    axis = (np.arange(size) + 0.5) / size - 0.5
    u, v = np.meshgrid(axis, axis)
    cos, sin = np.cos(np.deg2rad(spec.rotation)), np.sin(np.deg2rad(spec.rotation))
    x = (cos * u - sin * v) * spec.scale + spec.offset[0]
    y = (sin * u + cos * v) * spec.scale * spec.aspect + spec.offset[1]
    lattice = np.random.default_rng(spec.noise_seed).random((_NOISE_SIZE, _NOISE_SIZE))
    value = np.clip(_PATTERNS[spec.pattern](x, y, spec.detail, lattice), 0, 1)
    value = (0.5 + (value - 0.5) * spec.contrast) * 2
    first, second, third = np.array(spec.colors)
    lower = np.minimum(value, 1)[..., None]
    upper = np.maximum(value - 1, 0)[..., None]
    color = first + (second - first) * lower + (third - second) * upper
    # nothing real is perfectly even: a faint mottling also gives plain areas something to match
    mottle = 0.85 + 0.3 * _fractal(x * 3, y * 3, lattice, 3)[..., None]
    if spec.transmission > 0:
        color = 0.75 + 0.25 * color
    return (color * mottle * np.array(spec.tint)).clip(0, 0.98).astype(np.float32)


def _noise(x: np.ndarray, y: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Value noise in [0, 1], period _NOISE_SIZE."""
    i, j = np.floor(x).astype(int), np.floor(y).astype(int)
    s, t = x - i, y - j
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    i0, j0, i1, j1 = i % _NOISE_SIZE, j % _NOISE_SIZE, (i + 1) % _NOISE_SIZE, (j + 1) % _NOISE_SIZE
    low = lattice[j0, i0] * (1 - s) + lattice[j0, i1] * s
    return low * (1 - t) + (lattice[j1, i0] * (1 - s) + lattice[j1, i1] * s) * t


def _fractal(x: np.ndarray, y: np.ndarray, lattice: np.ndarray, octaves: int = 4) -> np.ndarray:
    total, weight, norm = np.zeros_like(x), 1.0, 0.0
    for octave in range(octaves):
        total += weight * _noise(x * 2**octave + 17.3 * octave, y * 2**octave + 5.1 * octave, lattice)
        norm += weight
        weight /= 2
    return total / norm


def _step(value: np.ndarray, edge: float, width: float = 0.04) -> np.ndarray:
    return np.clip((value - edge) / width + 0.5, 0, 1)


def _random_cell(i: np.ndarray, j: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    return lattice[j.astype(int) % _NOISE_SIZE, i.astype(int) % _NOISE_SIZE]


def _clouds(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    value = _fractal(x, y, lattice, 5)
    return 0.5 + (value - 0.5) * (1.5 + 2 * detail)


def _marble(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    warp = _fractal(x, y, lattice) * (2 + 6 * detail)
    return 0.5 + 0.5 * np.sin(2 * np.pi * (0.5 * x + warp * 0.5))


def _wood(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    rings = np.hypot(x - 3, 0.15 * y) * 2 + (0.5 + detail) * _fractal(x * 0.5, y * 0.1, lattice)
    fibre = _noise(x * 12, y * 0.8, lattice)
    return 0.75 * (rings - np.floor(rings)) + 0.25 * fibre


def _bricks(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    row = np.floor(2 * y)
    shifted = x + 0.5 * (row % 2)
    s, t = shifted - np.floor(shifted), 2 * y - row
    joint = 0.03 + 0.07 * detail
    inside = np.minimum(_step(np.minimum(s, 1 - s), joint / 2), _step(np.minimum(t, 1 - t), joint, 0.08))
    return inside * (0.45 + 0.55 * _random_cell(np.floor(shifted), row, lattice))


def _checker(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    sharp = 8 + 20 * detail
    return 0.5 + np.clip(sharp * np.sin(np.pi * x) * np.sin(np.pi * y), -1, 1) * 0.5


def _tiles(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    i, j = np.floor(x), np.floor(y)
    s, t = x - i, y - j
    edge = np.minimum(np.minimum(s, 1 - s), np.minimum(t, 1 - t))
    return _step(edge, 0.02 + 0.05 * detail) * (0.3 + 0.7 * _random_cell(i, j, lattice))


def _stripes(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    band = np.floor(x * 2)
    edge = x * 2 - band
    return _step(np.minimum(edge, 1 - edge), 0.05) * _random_cell(band, np.zeros_like(band), lattice)


def _grating(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sin(2 * np.pi * x * (1 + 2 * detail)) * np.sin(2 * np.pi * y * detail)


def _spots(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    i, j = np.floor(x), np.floor(y)
    shift = 0.4 * (_random_cell(i, j, lattice) - 0.5), 0.4 * (_random_cell(j + 7, i, lattice) - 0.5)
    radius = 0.15 + 0.2 * _random_cell(i + 31, j + 11, lattice)
    distance = np.hypot(x - i - 0.5 - shift[0], y - j - 0.5 - shift[1])
    return _step(radius - distance, 0.0, 0.08) * (0.6 + 0.4 * detail)


def _weave(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    over = (np.floor(2 * x) + np.floor(2 * y)) % 2
    warp, weft = np.abs(np.sin(2 * np.pi * x)), np.abs(np.sin(2 * np.pi * y))
    return np.where(over > 0, 0.5 + 0.5 * warp, 0.5 - 0.5 * weft)


_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, float, np.ndarray], np.ndarray]] = {
    "bricks": _bricks,
    "checker": _checker,
    "clouds": _clouds,
    "grating": _grating,
    "marble": _marble,
    "spots": _spots,
    "stripes": _stripes,
    "tiles": _tiles,
    "weave": _weave,
    "wood": _wood,
}
