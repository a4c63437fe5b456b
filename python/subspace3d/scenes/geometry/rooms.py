"""The geometry attribute of the room regime: a furnished box of floor, roof and four walls.

Layout units as in `geometry`, with the origin at the middle of the room; normalised lengths are layout lengths times
2 / (longest side of the room). Boxes do not interpenetrate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from subspace3d.scenes.geometry.objects import (
    BlockSpec,
    BoxSpec,
    CageSpec,
    GeometrySpec,
    Ranges,
    RoomSpec,
    WindowSpec,
    draw_box,
    draw_cage,
    draw_inner_box,
)

CLEARANCE = 0.15  # least distance of a camera from any box, normalised
_TRIES = 600  # of placing one box, before it is left out
_TRIES_PER_RELAXATION = 50
_RELAXATION = 0.8
_PARTS_LARGE = dict(enumerate((5.0, 7.0, 10.0, 7.0, 5.0), 4))
_PARTS_SMALL = dict(enumerate((2.0, 3.0, 2.0, 1.0), 2))

Box = tuple[np.ndarray, np.ndarray]  # low and high corner, layout units
Draw = Callable[[], tuple[np.ndarray, np.ndarray]]  # center and size


class _Layout:
    """Axis-aligned boxes that have found their place, and points that none may come near."""

    def __init__(self, extent: np.ndarray, keep_clear: np.ndarray) -> None:
        self.extent, self.points, self.boxes = extent, keep_clear * extent.max() / 2, list[Box]()

    def place(self, draw: Draw) -> tuple[np.ndarray, np.ndarray] | None:
        """Draw until a box fits into the room, overlaps none and is clear of the points; None: it never did.

        The clearance shrinks by a fifth after every 50 failures, as a full room may leave no other way.
        """
        clearance = CLEARANCE * self.extent.max() / 2
        for attempt in range(_TRIES):
            if attempt and attempt % _TRIES_PER_RELAXATION == 0:
                clearance *= _RELAXATION
            center, size = draw()
            low, high = center - size / 2, center + size / 2
            if np.any(low < -self.extent / 2 - 1e-9) or np.any(high > self.extent / 2 + 1e-9):
                continue
            if any(np.all(low < other[1]) and np.all(other[0] < high) for other in self.boxes):
                continue
            outside = np.maximum(np.maximum(low - self.points, self.points - high), 0)
            if len(self.points) and np.linalg.norm(outside, axis=1).min() < clearance:
                continue
            self.boxes.append((low, high))
            return center, size
        return None


def draw_room(rng: np.random.Generator, ranges: Ranges, keep_clear: np.ndarray, reach: np.ndarray) -> GeometrySpec:
    """Draw shell and furniture.

    Args:
        rng (Generator): the geometry stream.
        ranges (Ranges): of the preset; its kinds of primitives and height fields are used.
        keep_clear (float [N, 3]): normalised camera positions, where they are fixed already.
        reach (float [3]): normalised half-extents that the shell must hold at least.
    """
    extent = np.array([*rng.uniform(17, 30, 2), rng.uniform(10, 15)])
    extent = np.maximum(extent / extent.max(), reach) * extent.max()
    layout = _Layout(extent, keep_clear)
    cage_count = int(rng.integers(1, 4)) if rng.random() < 0.8 else 0
    fewer_large, fewer_small = int(cage_count >= 2), int(cage_count in (1, 3))
    boxes: list[BoxSpec] = []

    def add(count: int, draw: Draw, parts: dict[int, float]) -> None:
        for _ in range(count):
            placed = layout.place(draw)
            if placed is not None:
                boxes.append(draw_box(rng, ranges, *placed, parts))

    add(int(rng.integers(2, 6)) - fewer_large, lambda: _on_floor(rng, extent, (4, 8), (4, 8)), _PARTS_LARGE)
    cages = _draw_cages(rng, ranges, layout, cage_count, boxes)
    add(int(rng.integers(4, 9)) - fewer_small, lambda: _small(rng, layout), _PARTS_SMALL)
    add(int(rng.integers(2, 5)), lambda: _under_roof(rng, extent), _PARTS_SMALL)
    add(int(rng.integers(3, 7)), lambda: _on_wall(rng, extent), _PARTS_SMALL)
    window = _draw_window(rng, extent) if rng.random() < 0.8 else None
    blocks = [*_draw_slabs(rng, layout), *_draw_wall_sticks(rng, extent), *_draw_space_sticks(rng, extent)]
    return GeometrySpec(boxes, None, cages, blocks, RoomSpec(extent.tolist(), window))


def obstacles(geometry: GeometrySpec) -> np.ndarray:
    """Normalised low and high corners [N, 2, 3] of everything that stands in the room."""
    assert geometry.room is not None
    things: list[BoxSpec | CageSpec | BlockSpec] = [*geometry.boxes, *geometry.cages, *geometry.blocks]
    center = np.array([thing.center for thing in things]).reshape(-1, 3)
    half = np.array([thing.size for thing in things]).reshape(-1, 3) / 2
    return np.stack([center - half, center + half], axis=1) * 2 / max(geometry.room.extent)


def half_extent(room: RoomSpec) -> np.ndarray:
    """Normalised half-extents [3] of the room; the longest is 1."""
    return np.array(room.extent) / max(room.extent)


def wall_frame(wall: int, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(corner, along, up, outward) of a wall seen from inside: its lower left corner and its two edges."""
    axis, sign = wall // 2, 1.0 if wall % 2 == 0 else -1.0
    outward, up = np.zeros(3), np.array([0.0, 0.0, 2 * half[2]])
    outward[axis] = sign
    along = np.cross(outward, [0.0, 0.0, 1.0])
    along = along * 2 * half[1 - axis]
    corner = outward * half[axis] - along / 2 - up / 2
    return corner, along, up, outward


def _on_floor(
    rng: np.random.Generator, extent: np.ndarray, side: tuple[float, float], height: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    size = np.array([*rng.uniform(*side, 2), rng.uniform(*height)])
    center = rng.uniform(-1, 1, 3) * (extent - size) / 2
    center[2] = (size[2] - extent[2]) / 2
    return center, size


def _small(rng: np.random.Generator, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    if rng.random() < 0.5 or not layout.boxes:
        return _on_floor(rng, layout.extent, (2, 4), (2, 6))
    low, high = layout.boxes[int(rng.integers(len(layout.boxes)))]
    size = rng.uniform(2, 4, 3)
    center = rng.uniform(low, high)
    center[2] = high[2] + size[2] / 2
    return center, size


def _under_roof(rng: np.random.Generator, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    thickness = rng.uniform(0.5, 3) if rng.random() < 0.5 else rng.uniform(2, 4)
    size = np.array([*rng.uniform(2, 5, 2), thickness])
    center = rng.uniform(-1, 1, 3) * (extent - size) / 2
    center[2] = (extent[2] - size[2]) / 2
    return center, size


def _on_wall(rng: np.random.Generator, extent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    thickness = rng.uniform(0.5, 2) if rng.random() < 0.5 else rng.uniform(1, 2)
    axis, sign = int(rng.integers(2)), rng.choice([-1.0, 1.0])
    size = rng.uniform(2, 5, 3)
    size[axis] = thickness
    center = rng.uniform(-1, 1, 3) * (extent - size) / 2
    center[axis] = sign * (extent[axis] - thickness) / 2
    return center, size


def _draw_cages(
    rng: np.random.Generator, ranges: Ranges, layout: _Layout, count: int, boxes: list[BoxSpec]
) -> list[CageSpec]:
    def anywhere() -> tuple[np.ndarray, np.ndarray]:
        size = rng.uniform(3, 6, 3)
        return rng.uniform(-1, 1, 3) * (layout.extent - size) / 2, size

    cages = []
    for _ in range(count):
        placed = layout.place(anywhere)
        if placed is None:
            continue
        cages.append(draw_cage(rng, *placed, np.zeros(3)))
        if rng.random() < 0.5:
            boxes.append(draw_inner_box(rng, ranges, cages[-1]))
    return cages


def _draw_window(rng: np.random.Generator, extent: np.ndarray) -> WindowSpec:
    size = rng.uniform(1 / 5, 3 / 5, 2)
    low = rng.uniform(0, 1 - size)
    wall, pane, fenced = int(rng.integers(4)), bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    bars = int(rng.integers(1, 6)) if fenced else 0
    middle = float(np.median([size[0] * extent[1 - wall // 2], size[1] * extent[2]]))
    return WindowSpec(wall, low.tolist(), (low + size).tolist(), pane, bars, middle * rng.uniform(1 / 40, 1 / 30))


def _draw_slabs(rng: np.random.Generator, layout: _Layout) -> list[BlockSpec]:
    blocks = []
    for _ in range(int(rng.integers(1, 3)) if rng.random() < 0.7 else 0):
        thin = bool(rng.random() < 0.5)

        def draw(thin: bool = thin) -> tuple[np.ndarray, np.ndarray]:
            size = np.array([*rng.uniform(2, 5, 2), rng.uniform(0.01, 0.2) if thin else rng.uniform(0.5, 1)])
            size = np.roll(size, int(rng.integers(3)))
            return rng.uniform(-1, 1, 3) * (layout.extent - size) / 2, size

        placed = layout.place(draw)
        if placed is not None:
            blocks.append(_block("slab", *placed, thin))
    return blocks


def _draw_wall_sticks(rng: np.random.Generator, extent: np.ndarray) -> list[BlockSpec]:
    axis, sign = int(rng.integers(2)), rng.choice([-1.0, 1.0])
    blocks = []
    for _ in range(int(rng.integers(5, 17))):
        size = rng.uniform(0.1, 0.6, 3) if rng.random() < 0.7 else rng.uniform(0.6, 0.8, 3)
        run = int(rng.choice([1 - axis, 2]))
        size[run] = rng.uniform(1 / 4, 1 / 2) * extent[run]
        center = rng.uniform(-1, 1, 3) * (extent - size) / 2
        center[axis] = sign * (extent[axis] - size[axis]) / 2
        blocks.append(_block("stick", center, size))
    return blocks


def _draw_space_sticks(rng: np.random.Generator, extent: np.ndarray) -> list[BlockSpec]:
    blocks = []
    for _ in range(int(rng.integers(2, 7)) if rng.random() < 0.5 else 0):
        size, run = rng.uniform(0.1, 0.6, 3), int(rng.integers(3))
        size[run] = rng.uniform(1 / 4, 1 / 2) * extent[run]
        blocks.append(_block("stick", rng.uniform(-1, 1, 3) * (extent - size) / 2, size))
    return blocks


def _block(kind: str, center: np.ndarray, size: np.ndarray, thin: bool = False) -> BlockSpec:
    return BlockSpec("slab" if kind == "slab" else "stick", center.tolist(), size.tolist(), [0.0] * 3, thin)
