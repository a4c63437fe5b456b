"""The geometry attribute of the object regime: boxes filled with groups of primitives, cages, sticks and slabs.

World axes: z up. Lengths before normalisation are layout units (boxes of 2 to 8); `shapes.build_mesh` scales the whole
scene so that the longest side of the objects is 2, centred on the origin. `rooms` draws the indoor regime.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Kind = Literal["ellipsoid", "cube", "cylinder", "torus"]
KINDS: tuple[Kind, ...] = ("ellipsoid", "cube", "cylinder", "torus")
CAGES: tuple[Literal["sphere", "cube", "torus"], ...] = ("sphere", "cube", "torus")
FIELDS = 6  # height fields per part: one per cube face; a cylinder uses 3, an ellipsoid and a torus 1
_FLAT_PROBABILITY = 0.1


@dataclass(frozen=True)
class PartSpec:
    """One primitive. Before it joins, the group built so far is turned by ``group_rotation`` and moved."""

    kind: Kind
    semi_axes: list[float]  # 3, layout units
    rotation: list[float]  # 3 angles about x, y, z in degrees
    translation: list[float]
    group_rotation: list[float]  # degrees
    group_translation: list[float]
    amplitudes: list[float]  # FIELDS height-field amplitudes, 0 = flat
    height_seed: int  # seed of the 5 x 5 grids U(-1, 1) that the amplitudes multiply


@dataclass(frozen=True)
class BoxSpec:
    """A group of parts, stretched to fill a box."""

    center: list[float]
    size: list[float]
    parts: list[PartSpec]


@dataclass(frozen=True)
class CageSpec:
    """Wires along the edges of a coarse sphere (8 x 8), subdivided cube or torus (8 x 4), stretched to fill a box."""

    kind: Literal["sphere", "cube", "torus"]
    center: list[float]
    size: list[float]
    rotation: list[float]  # degrees
    subdivisions: int  # of a cube's edges: 2^n pieces
    thickness: float  # diameter of the wires


@dataclass(frozen=True)
class BlockSpec:
    """A plain cuboid: a thin stick or a slab."""

    kind: Literal["stick", "slab"]
    center: list[float]
    size: list[float]
    rotation: list[float]  # degrees
    thin: bool  # a slab thin enough to be of glass


@dataclass(frozen=True)
class GroundSpec:
    """A disc under the objects and, around it, four walls (``wall_height`` 0: none). Lengths in normalised units."""

    radius: float
    wall_distance: float  # of each wall from the vertical axis
    wall_height: float
    wall_azimuth: float  # degrees


@dataclass(frozen=True)
class WindowSpec:
    """A rectangular hole in a wall; ``low`` and ``high`` along the wall (0..1) and up it (0..1)."""

    wall: int  # 0: x max, 1: x min, 2: y max, 3: y min
    low: list[float]
    high: list[float]
    pane: bool  # filled with glass
    bars: int  # of a lattice before the hole, in each direction; 0: none
    bar_thickness: float


@dataclass(frozen=True)
class RoomSpec:
    """The shell of an indoor scene: floor, roof and four walls around ``extent``."""

    extent: list[float]
    window: WindowSpec | None


@dataclass(frozen=True)
class GeometrySpec:
    boxes: list[BoxSpec]
    ground: GroundSpec | None = None
    cages: list[CageSpec] = field(default_factory=list)
    blocks: list[BlockSpec] = field(default_factory=list)
    room: RoomSpec | None = None


@dataclass(frozen=True)
class Ranges:
    """What a preset draws from; lengths in layout units."""

    kinds: tuple[Kind, ...]
    extent_xy: tuple[float, float]
    extent_z: tuple[float, float]
    large: tuple[int, int]  # least and most large boxes
    small: tuple[int, int]
    parts_large: dict[int, float]  # number of parts -> weight
    parts_small: dict[int, float]
    height: float  # greatest height-field amplitude as a share of the smallest full axis
    structures: bool = False  # cages, sticks and slabs
    ground: bool = False


def _weights(first: int, *values: float) -> dict[int, float]:
    return dict(enumerate(values, first))


RANGES = {
    "paper": Ranges(
        KINDS, (12, 15), (12, 18), (1, 7), (2, 7), _weights(1, 5, 5, 5, 4, 4, 3, 2, 1, 1), _weights(1, 2, 3, 3, 2, 1),
        0.6, structures=True,
    ),
    "release": Ranges(
        KINDS[:3], (12, 15), (12, 18), (3, 6), (3, 6), _weights(4, 5, 7, 10, 10, 7, 5), _weights(2, 2, 3, 2, 1), 0.6
    ),
    "generic": Ranges(
        KINDS[:3], (9, 13), (7, 12), (1, 4), (1, 2), _weights(1, 3, 3, 2), _weights(1, 3, 2), 0.25, ground=True
    ),
}  # fmt: skip


def release_group(dataset: int) -> Ranges:
    """The release's geometry data sets: number of boxes and of parts per box in a 3 x 3 grid over the data sets."""
    boxes, complexity = (3, 5, 7)[dataset % 3], dataset // 3 % 3
    base = RANGES["release"]
    return Ranges(
        base.kinds, base.extent_xy, base.extent_z, (boxes - 2, boxes), (boxes - 2, boxes),
        _weights(1 + 3 * complexity, 2, 3, 3), _weights(1 + 2 * complexity, 2, 3), base.height,
    )  # fmt: skip


def draw_geometry(rng: np.random.Generator, ranges: Ranges) -> GeometrySpec:
    """Draw the boxes, their parts and, where the preset has them, structures and the ground. Boxes may overlap."""
    extent = np.array([*rng.uniform(*ranges.extent_xy, 2), rng.uniform(*ranges.extent_z)])
    counts = [int(rng.integers(low, high + 1)) for low, high in (ranges.large, ranges.small)]
    boxes = []
    for large in [True] * counts[0] + [False] * counts[1]:
        size = rng.uniform(4, 8, 3) if large else np.array([*rng.uniform(2, 4, 2), rng.uniform(2, 6)])
        center = _place(rng, extent, size)
        if ranges.ground:
            center[2] = size[2] / 2
        boxes.append(draw_box(rng, ranges, center, size, ranges.parts_large if large else ranges.parts_small))
    cages: list[CageSpec] = []
    blocks: list[BlockSpec] = []
    if ranges.structures:
        cages, inner = _draw_cages(rng, ranges, extent)
        boxes += inner
        blocks = _draw_blocks(rng, extent)
    return GeometrySpec(boxes, _draw_ground(rng) if ranges.ground else None, cages, blocks)


def draw_box(
    rng: np.random.Generator, ranges: Ranges, center: np.ndarray, size: np.ndarray, parts: dict[int, float]
) -> BoxSpec:
    """A group whose number of parts has the weights ``parts``."""
    weights = np.array(list(parts.values()), dtype=float)
    count = int(rng.choice(list(parts), p=weights / weights.sum()))
    return BoxSpec(center.tolist(), size.tolist(), [_draw_part(rng, ranges, index) for index in range(count)])


def draw_cage(rng: np.random.Generator, center: np.ndarray, size: np.ndarray, rotation: np.ndarray) -> CageSpec:
    """Wires of a diameter of 1/30 to 1/20 of the cage, up to three times that for a cube with few wires."""
    kind = CAGES[int(rng.integers(len(CAGES)))]
    subdivisions = int(rng.integers(3)) if kind == "cube" else 0
    thickness = rng.uniform(1 / 30, 1 / 20) * float(np.mean(size))
    if kind == "cube":
        thickness *= rng.uniform(1, 3 - subdivisions)
    return CageSpec(kind, center.tolist(), size.tolist(), rotation.tolist(), subdivisions, thickness)


def draw_inner_box(rng: np.random.Generator, ranges: Ranges, cage: CageSpec) -> BoxSpec:
    """A group of 1 to 3 parts inside a cage."""
    size = np.array(cage.size) / rng.uniform(1.5, 2.5, 3)
    slack = (np.array(cage.size) - size) / 2
    center = np.array(cage.center) + rng.uniform(-0.7, 0.7, 3) * slack
    return draw_box(rng, ranges, center, size, _weights(1, 2, 1, 1))


def _place(rng: np.random.Generator, extent: np.ndarray, size: np.ndarray) -> np.ndarray:
    low, high = -extent / 2 + size / 2, extent / 2 - size / 2
    return rng.uniform(np.minimum(low, high), np.maximum(low, high))


def _draw_cages(rng: np.random.Generator, ranges: Ranges, extent: np.ndarray) -> tuple[list[CageSpec], list[BoxSpec]]:
    cages, inner = [], []
    for _ in range(int(rng.integers(1, 3)) if rng.random() < 0.5 else 0):
        size = rng.uniform(3, 6, 3)
        cage = draw_cage(rng, _place(rng, extent, size), size, rng.uniform(0, 180, 3))
        cages.append(cage)
        if rng.random() < 0.5:
            inner.append(draw_inner_box(rng, ranges, cage))
    return cages, inner


def _draw_blocks(rng: np.random.Generator, extent: np.ndarray) -> list[BlockSpec]:
    sizes: list[tuple[Literal["stick", "slab"], np.ndarray]] = []
    for _ in range(int(rng.integers(2, 7)) if rng.random() < 0.5 else 0):
        sizes.append(("stick", np.array([*rng.uniform(0.1, 0.6, 2), rng.uniform(1 / 4, 1 / 2) * extent.max()])))
    for _ in range(int(rng.integers(1, 3)) if rng.random() < 0.5 else 0):
        sizes.append(("slab", np.array([*rng.uniform(2, 5, 2), rng.uniform(0.01, 0.2)])))
    blocks = []
    for kind, size in sizes:
        center = _place(rng, extent, np.full(3, size.max()))
        blocks.append(
            BlockSpec(kind, center.tolist(), size.tolist(), rng.uniform(0, 180, 3).tolist(), thin=kind == "slab")
        )
    return blocks


def _draw_part(rng: np.random.Generator, ranges: Ranges, index: int) -> PartSpec:
    axes = rng.uniform(0.25, 2.0, 3)
    amplitudes = rng.uniform(0, ranges.height * 2 * axes.min(), FIELDS)
    amplitudes[rng.random(FIELDS) < _FLAT_PROBABILITY] = 0
    reach = 0.5 * 2 * axes.max()
    turn = rng.uniform(0, 180, 3) if index else np.zeros(3)
    move = rng.uniform(0, reach, 3) if index else np.zeros(3)
    return PartSpec(
        ranges.kinds[int(rng.integers(len(ranges.kinds)))],
        axes.tolist(),
        rng.uniform(0, 180, 3).tolist(),
        rng.uniform(0, reach, 3).tolist(),
        turn.tolist(),
        move.tolist(),
        amplitudes.tolist(),
        int(rng.integers(2**53)),
    )


def _draw_ground(rng: np.random.Generator) -> GroundSpec:
    walls = bool(rng.random() < 0.5)
    distance, height = rng.uniform(4.1, 4.6), rng.uniform(1.0, 2.5)
    # under walls the disc reaches their corners; without them it stays small enough for depth below 9
    radius = 1.45 * distance if walls else rng.uniform(3.5, 4.5)
    return GroundSpec(radius, distance, height if walls else 0.0, rng.uniform(0, 360))
