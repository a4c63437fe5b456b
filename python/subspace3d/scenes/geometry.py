"""The geometry attribute: boxes filled with groups of primitives, drawn from the geometry stream.

World axes: z up. Lengths before normalisation are layout units (boxes of 2 to 8); `shapes.build_mesh` scales the whole
scene so that the longest side of the objects is 2, centred on the origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["ellipsoid", "cube", "cylinder"]
KINDS: tuple[Kind, ...] = ("ellipsoid", "cube", "cylinder")
FIELDS = 6  # height fields per part: one per cube face; a cylinder uses 3, an ellipsoid 1
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
class GroundSpec:
    """A disc under the objects and, around it, four walls (``wall_height`` 0: none). Lengths in normalised units."""

    radius: float
    wall_distance: float  # of each wall from the vertical axis
    wall_height: float
    wall_azimuth: float  # degrees


@dataclass(frozen=True)
class GeometrySpec:
    boxes: list[BoxSpec]
    ground: GroundSpec | None


@dataclass(frozen=True)
class _Ranges:
    boxes: tuple[int, int]
    extent_xy: tuple[float, float]
    extent_z: tuple[float, float]
    large_probability: float
    parts_large: tuple[int, ...]  # weights of 1, 2, 3, ... parts
    parts_small: tuple[int, ...]
    height: float  # greatest height-field amplitude as a share of the smallest axis
    ground: bool


_RANGES = {
    "paper": _Ranges((3, 14), (12, 15), (12, 18), 0.5, (5, 5, 5, 4, 4, 3, 2, 1, 1), (2, 3, 3, 2, 1), 0.6, False),
    "generic": _Ranges((2, 6), (9, 13), (7, 12), 0.7, (3, 3, 2), (3, 2), 0.25, True),
}


def draw_geometry(rng: np.random.Generator, preset: str) -> GeometrySpec:
    """Draw the boxes, their parts and, in the generic preset, the ground they stand on."""
    ranges = _RANGES[preset]
    extent = np.array([*rng.uniform(*ranges.extent_xy, 2), rng.uniform(*ranges.extent_z)])
    boxes = []
    for _ in range(int(rng.integers(ranges.boxes[0], ranges.boxes[1] + 1))):
        large = bool(rng.random() < ranges.large_probability)
        size = rng.uniform(4, 8, 3) if large else np.array([*rng.uniform(2, 4, 2), rng.uniform(2, 6)])
        low, high = -extent / 2 + size / 2, extent / 2 - size / 2
        center = rng.uniform(np.minimum(low, high), np.maximum(low, high))
        if ranges.ground:
            center[2] = size[2] / 2
        weights = np.array(ranges.parts_large if large else ranges.parts_small, dtype=float)
        count = 1 + int(rng.choice(len(weights), p=weights / weights.sum()))
        parts = [_draw_part(rng, ranges.height, index) for index in range(count)]
        boxes.append(BoxSpec(center.tolist(), size.tolist(), parts))
    return GeometrySpec(boxes, _draw_ground(rng) if ranges.ground else None)


def _draw_part(rng: np.random.Generator, height: float, index: int) -> PartSpec:
    axes = rng.uniform(0.25, 2.0, 3)
    amplitudes = rng.uniform(0, height * 2 * axes.min(), FIELDS)
    amplitudes[rng.random(FIELDS) < _FLAT_PROBABILITY] = 0
    reach = 0.5 * 2 * axes.max()
    turn = rng.uniform(0, 180, 3) if index else np.zeros(3)
    move = rng.uniform(0, reach, 3) if index else np.zeros(3)
    return PartSpec(
        KINDS[int(rng.integers(len(KINDS)))],
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
