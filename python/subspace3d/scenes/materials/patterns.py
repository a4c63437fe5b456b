"""Procedural patterns: functions t(x, y) in [0, 1] on the plane, one pattern period per unit.

Each takes coordinates ``x`` and ``y`` of equal shape, a ``detail`` in [0, 1] that changes its character (line width,
warp, irregularity) and a ``lattice`` of random numbers, and returns values of that shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LATTICE_SIZE = 64  # period of the noise lattice


def noise(x: np.ndarray, y: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Value noise in [0, 1], period LATTICE_SIZE."""
    i, j = np.floor(x), np.floor(y)
    s, t = x - i, y - j
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    mask = LATTICE_SIZE - 1
    i0, j0 = i.astype(np.int64) & mask, j.astype(np.int64) & mask
    i1, j1 = (i0 + 1) & mask, (j0 + 1) & mask
    flat, j0, j1 = lattice.ravel(), j0 * LATTICE_SIZE, j1 * LATTICE_SIZE
    first, last = flat[j0 + i0], flat[j1 + i0]
    low = first + (flat[j0 + i1] - first) * s
    return low + (last + (flat[j1 + i1] - last) * s - low) * t


def fractal(x: np.ndarray, y: np.ndarray, lattice: np.ndarray, octaves: int = 4) -> np.ndarray:
    total, weight, norm = np.zeros_like(x), 1.0, 0.0
    for octave in range(octaves):
        total += weight * noise(x * 2**octave + 17.3 * octave, y * 2**octave + 5.1 * octave, lattice)
        norm += weight
        weight /= 2
    return total / norm


def _step(value: np.ndarray, edge: float, width: float = 0.04) -> np.ndarray:
    return np.clip((value - edge) / width + 0.5, 0, 1)


def _random_cell(i: np.ndarray, j: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    return lattice[j.astype(int) % LATTICE_SIZE, i.astype(int) % LATTICE_SIZE]


def _clouds(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    value = fractal(x, y, lattice, 5)
    return 0.5 + (value - 0.5) * (1.5 + 2 * detail)


def _marble(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    warp = fractal(x, y, lattice) * (2 + 6 * detail)
    return 0.5 + 0.5 * np.sin(2 * np.pi * (0.5 * x + warp * 0.5))


def _wood(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    rings = np.hypot(x - 3, 0.15 * y) * 2 + (0.5 + detail) * fractal(x * 0.5, y * 0.1, lattice)
    fibre = noise(x * 12, y * 0.8, lattice)
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


def _hexagons(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    height = np.sqrt(3.0)
    # a hexagonal grid is two rectangular ones, half a period apart; the nearer centre owns the point
    first = np.floor(x + 0.5), np.floor(y / height + 0.5)
    second = np.floor(x) + 0.5, np.floor(y / height) + 0.5
    near = np.hypot(x - first[0], y - first[1] * height) < np.hypot(x - second[0], y - second[1] * height)
    i, j = np.where(near, first[0], second[0]), np.where(near, first[1], second[1])
    dx, dy = np.abs(x - i), np.abs(y - j * height)
    edge = 0.5 - np.maximum(dx, 0.5 * dx + 0.5 * height * dy)
    return _step(edge, 0.02 + 0.05 * detail) * (0.35 + 0.65 * _random_cell(np.floor(2 * i), np.floor(2 * j), lattice))


def _cells(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    """Distance between the nearest and the second nearest of jittered points: cracked stone, leather."""
    i, j = np.floor(x), np.floor(y)
    nearest, second = np.full_like(x, np.inf), np.full_like(x, np.inf)
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            px = i + di + _random_cell(i + di, j + dj, lattice)
            py = j + dj + _random_cell(j + dj + 13, i + di + 29, lattice)
            distance = np.hypot(x - px, y - py)
            second = np.minimum(second, np.maximum(nearest, distance))
            nearest = np.minimum(nearest, distance)
    return np.clip((second - nearest) * (1.5 + 4 * detail), 0, 1)


def _planks(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    column = np.floor(x * 2)
    along = y * 0.5 + 3.7 * _random_cell(column, column * 0, lattice)
    board = np.floor(along)
    s, t = x * 2 - column, along - board
    joint = np.minimum(_step(np.minimum(s, 1 - s), 0.03), _step(np.minimum(t, 1 - t), 0.008, 0.01))
    tone = _random_cell(column, board, lattice)
    grain = fractal(x * 9 + 5 * tone, y * 0.7 + 11 * tone, lattice, 3)
    return joint * (0.25 + 0.5 * tone + (0.2 + 0.3 * detail) * (grain - 0.4))


def _plaid(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    def bands(position: np.ndarray, salt: int) -> np.ndarray:
        index = np.floor(position * 4) % 8
        return _random_cell(index, np.full_like(index, salt), lattice)

    thread = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * 12 * (x + y)))
    mixed = np.where(thread > 0.5, bands(x, 3), bands(y, 3))
    return (1 - 0.3 * detail) * mixed + 0.3 * detail * 0.5 * (bands(x, 9) + bands(y, 9))


def _knit(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    column = np.floor(x * 3)
    s = x * 3 - column
    lean = np.abs(s - 0.5)
    row = y * 4 + lean * (1 + detail)
    loop = np.abs(np.sin(np.pi * row)) * np.sqrt(np.clip(1 - (2 * lean) ** 4, 0, 1))
    return loop * (0.6 + 0.4 * _random_cell(np.floor(column / 2), np.floor(row / 3), lattice))


def _text(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    """Lines of invented glyphs, 3 x 5 random dots each, with gaps between words."""
    line = np.floor(y * 3)
    column = np.floor(x * 6)
    s, t = (x * 6 - column) * 4, (y * 3 - line) * 7
    i, j = np.floor(s), np.floor(t)
    inside = (i < 3) & (j >= 1) & (j < 6)
    # a glyph is one of 24; its dots come from its own corner of the lattice
    letter = np.floor(24 * _random_cell(column, line, lattice))
    ink = _random_cell(letter * 3 + i, j + 40, lattice) > 0.42
    word = _random_cell(column + 21, line + 7, lattice) > 0.12 + 0.2 * detail
    return np.where(inside & ink & word, 0.0, 0.95)


def _photo(x: np.ndarray, y: np.ndarray, detail: float, lattice: np.ndarray) -> np.ndarray:
    """Ridges of hills before a sky with a disc, as in a landscape photograph; repeats every two units."""
    column, row = np.floor(x / 2), np.floor(y / 2)
    u, v = x / 2 - column, y / 2 - row
    salt = 10 * _random_cell(column, row, lattice)
    sky = 0.95 - 0.35 * v + 0.15 * (fractal(u * 5 + salt, v * 9, lattice) - 0.5)
    disc = np.hypot(u - 0.2 - 0.6 * _random_cell(column + 5, row, lattice), v - 0.25)
    value = np.maximum(sky, _step(0.09 - disc, 0.0, 0.02))
    for layer in range(3):
        ridge = (
            0.35 + 0.2 * layer + (0.35 - 0.08 * layer) * (fractal(u * 3 + salt + 7 * layer, 0 * v, lattice, 5) - 0.5)
        )
        ground = 0.62 - 0.22 * layer + (0.2 + 0.3 * detail) * (fractal(u * 20, v * 20 + salt, lattice) - 0.5)
        value = np.where(v > ridge, ground, value)
    return value


PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray, float, np.ndarray], np.ndarray]] = {
    "bricks": _bricks,
    "cells": _cells,
    "checker": _checker,
    "clouds": _clouds,
    "grating": _grating,
    "hexagons": _hexagons,
    "knit": _knit,
    "marble": _marble,
    "photo": _photo,
    "plaid": _plaid,
    "planks": _planks,
    "spots": _spots,
    "stripes": _stripes,
    "text": _text,
    "tiles": _tiles,
    "weave": _weave,
    "wood": _wood,
}
