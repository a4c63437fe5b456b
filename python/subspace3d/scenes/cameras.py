"""The camera attribute: wide paths around the origin, and OpenCV extrinsics along them.

The paper and release presets follow a closed path on a sphere of changing radius; the generic preset an arc above the
scene, on which all views look at much the same surfaces. `room_cameras` and `trajectories` have the other paths.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subspace3d.geometry import look_at

BASE_DISTANCE = 1.5 * np.sqrt(3)  # one and a half times the half diagonal of the cube [-1, 1]^3

Control = dict[str, list[float] | list[list[float]]]


@dataclass(frozen=True)
class CameraSpec:
    """Cameras of one scene: one field of view, and per view a pose.

    ``control`` holds what the path was made from; ``positions`` and ``extrinsics_w2c`` follow from it.
    """

    hfov: float  # degrees
    target: list[float]  # look-at point; of micro-baseline and room cameras that of the first view
    roll: float  # degrees
    control: Control
    positions: list[list[float]]  # [S][3], world
    extrinsics_w2c: list[list[list[float]]]  # [S][3][4], camera-from-world, OpenCV axes
    aspect: float = 1.0  # height over width of the image


@dataclass(frozen=True)
class LoopRanges:
    """A closed path: radii in units of BASE_DISTANCE, standard deviation of the look-at point, roll in degrees."""

    radii: tuple[float, float]
    target: float
    roll: float
    points: int  # control points
    max_turn: float  # greatest angle between neighbours, degrees


def loop_ranges(preset: str, varied: str) -> LoopRanges:
    """The ranges of a preset in a data set that varies ``varied``."""
    if preset == "release":
        # the release closes its path by repeating the first of seven points
        if varied == "lighting":
            return LoopRanges((0.7, 1.0), 0.01, 0.0, 6, 120.0)
        wide = varied in ("camera", "all")
        return LoopRanges((0.7, 2.0) if wide else (0.85, 1.5), 0.35 if wide else 0.0, 0.0, 6, 135.0)
    if varied in ("camera", "all"):
        return LoopRanges((0.7, 2.0), 0.35, 20.0, 7, 135.0)
    return LoopRanges((0.85, 1.5), 0.0, 0.0, 7, 135.0)


def draw_orbit(
    rng: np.random.Generator, preset: str, views: int, varied: str, span: tuple[float, float] = (60.0, 120.0)
) -> CameraSpec:
    """Draw a wide path around the origin and ``views`` cameras on it.

    Args:
        rng (Generator): the camera stream.
        preset (str): paper, release or generic.
        views (int): number of cameras.
        varied (str): the attribute that varies in this data set.
        span (tuple[float, float]): least and greatest azimuth of the generic preset's arc, degrees.
    """
    if preset == "generic":
        hfov, target, roll = rng.uniform(45, 65), rng.normal(0, 0.1, 3), rng.uniform(-5, 5)
        control, positions = _draw_arc(rng, views, span)
    else:
        ranges = loop_ranges(preset, varied)
        hfov, target, roll = rng.uniform(45, 70), rng.normal(0, 1, 3) * ranges.target, rng.uniform(-1, 1) * ranges.roll
        control, positions = draw_loop(rng, views, ranges)
    extrinsics = [look_at(position, target, roll).tolist() for position in positions]
    return CameraSpec(hfov, target.tolist(), roll, control, positions.tolist(), extrinsics)


def closed_spline(points: np.ndarray, count: int) -> np.ndarray:
    """``count`` evenly spaced samples [count, D] of the periodic cubic B-spline through ``points`` [N, D]."""
    number = len(points)
    # at a knot the spline is (c[i-1] + 4 c[i] + c[i+1]) / 6
    identity = np.eye(number)
    coefficients = np.linalg.solve(
        (4 * identity + np.roll(identity, 1, axis=1) + np.roll(identity, -1, axis=1)) / 6, points
    )
    time = np.arange(count) * number / count
    knot = np.floor(time).astype(int)
    s = (time - knot)[:, None]
    basis = ((1 - s) ** 3, 3 * s**3 - 6 * s**2 + 4, -3 * s**3 + 3 * s**2 + 3 * s + 1, s**3)
    terms = [weight * coefficients[(knot + shift - 1) % number] for shift, weight in enumerate(basis)]
    return np.sum(terms, axis=0) / 6


def draw_loop(rng: np.random.Generator, views: int, ranges: LoopRanges) -> tuple[Control, np.ndarray]:
    """Closed path through directions uniform on the sphere, no step between them longer than ``max_turn``."""
    limit = np.cos(np.deg2rad(ranges.max_turn))
    while True:
        sine, azimuth = rng.uniform(-1, 1, ranges.points), rng.uniform(0, 2 * np.pi, ranges.points)
        cosine = np.sqrt(1 - sine**2)
        directions = np.stack([cosine * np.cos(azimuth), cosine * np.sin(azimuth), sine], axis=1)
        if np.sum(directions * np.roll(directions, -1, axis=0), axis=1).min() >= limit:
            break
    low, high = ranges.radii[0] * BASE_DISTANCE, ranges.radii[1] * BASE_DISTANCE
    radii = rng.uniform(low, high, ranges.points)
    path = closed_spline(directions, views)
    distance = np.clip(closed_spline(radii[:, None], views), low, high)
    control: Control = {"directions": directions.tolist(), "radii": radii.tolist()}
    return control, path / np.linalg.norm(path, axis=1, keepdims=True) * distance


def _draw_arc(rng: np.random.Generator, views: int, degrees: tuple[float, float]) -> tuple[Control, np.ndarray]:
    """Arc of ``degrees`` (least, greatest) in azimuth; elevation in 10..60 degrees and distance both swing along it."""
    azimuth = rng.uniform(0, 360)
    span = rng.uniform(*degrees) * rng.choice([-1, 1])
    elevations, radii = np.sort(rng.uniform(10, 60, 2)), np.sort(rng.uniform(0.85, 1.5, 2)) * BASE_DISTANCE
    swings, phases = rng.uniform(0.5, 1.5, 2), rng.uniform(0, 2 * np.pi, 2)
    time = np.linspace(0, 1, views)
    share = 0.5 + 0.5 * np.sin(2 * np.pi * swings * time[:, None] + phases)
    elevation = np.deg2rad(elevations[0] + (elevations[1] - elevations[0]) * share[:, 0])
    radius = radii[0] + (radii[1] - radii[0]) * share[:, 1]
    angle = np.deg2rad(azimuth + span * (time - 0.5))
    direction = np.stack([np.cos(elevation) * np.cos(angle), np.cos(elevation) * np.sin(angle), np.sin(elevation)], 1)
    control: Control = {
        "azimuth_and_span": [float(azimuth), float(span)],
        "elevations": elevations.tolist(),
        "radii": radii.tolist(),
        "swings": swings.tolist(),
        "phases": phases.tolist(),
    }
    return control, direction * radius[:, None]
