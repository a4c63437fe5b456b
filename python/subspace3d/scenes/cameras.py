"""The camera attribute: paths around the origin and OpenCV extrinsics along them.

The paper preset follows a closed path through seven points around the scene; the generic preset an arc above it, on
which all views look at much the same surfaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BASE_DISTANCE = 1.5 * np.sqrt(3)  # one and a half times the half diagonal of the cube [-1, 1]^3
_CONTROL_POINTS = 7
_MAX_TURN_DEG = 135.0


@dataclass(frozen=True)
class CameraSpec:
    """Cameras of one scene: one field of view, and per view a pose.

    ``control`` holds what the path was made from; ``positions`` and ``extrinsics_w2c`` follow from it.
    """

    hfov: float  # degrees
    target: list[float]  # look-at point
    roll: float  # degrees
    control: dict[str, list[float] | list[list[float]]]
    positions: list[list[float]]  # [S][3], world
    extrinsics_w2c: list[list[list[float]]]  # [S][3][4], camera-from-world, OpenCV axes


def draw_cameras(rng: np.random.Generator, preset: str, views: int, varies: bool) -> CameraSpec:
    """Draw a path and ``views`` cameras on it.

    Args:
        rng (Generator): the camera stream.
        preset (str): paper or generic.
        views (int): number of cameras.
        varies (bool): whether the camera is what varies in this data set; in the paper preset distance, look-at point
            and roll then take their wide ranges.
    """
    if preset == "generic":
        hfov, target, roll = rng.uniform(45, 65), rng.normal(0, 0.1, 3), rng.uniform(-5, 5)
        control, positions = _draw_arc(rng, views)
    else:
        hfov = rng.uniform(45, 70)
        target = rng.normal(0, 0.35, 3) if varies else np.zeros(3)
        roll = rng.uniform(-20, 20) if varies else 0.0
        control, positions = _draw_loop(rng, views, (0.7, 2.0) if varies else (0.85, 1.5))
    extrinsics = [look_at(position, target, roll).tolist() for position in positions]
    return CameraSpec(hfov, target.tolist(), roll, control, positions.tolist(), extrinsics)


def intrinsic_matrix(hfov: float, size: int) -> np.ndarray:
    """K [3, 3] in pixels of a square image: f = (size / 2) / tan(hfov / 2), principal point in the middle."""
    focal = size / 2 / np.tan(np.deg2rad(hfov) / 2)
    return np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])


def look_at(position: np.ndarray, target: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """[R | t] [3, 4], camera-from-world with OpenCV axes, of a camera at ``position`` that sees ``target`` ahead.

    World z points up in the image unless the camera looks along it; ``roll`` (degrees) then turns the camera about its
    viewing direction.
    """
    forward = target - position
    forward = forward / np.linalg.norm(forward)
    up = np.array([0.0, 0.0, 1.0]) if abs(forward[2]) < 0.999 else np.array([0.0, 1.0, 0.0])
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    cos, sin = np.cos(np.deg2rad(roll)), np.sin(np.deg2rad(roll))
    rotation = np.stack([cos * right + sin * down, cos * down - sin * right, forward])
    return np.concatenate([rotation, (-rotation @ position)[:, None]], axis=1)


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


def _draw_loop(
    rng: np.random.Generator, views: int, reach: tuple[float, float]
) -> tuple[dict[str, list[float] | list[list[float]]], np.ndarray]:
    """Closed path through directions uniform on the sphere, no step between them longer than 135 degrees."""
    limit = np.cos(np.deg2rad(_MAX_TURN_DEG))
    while True:
        sine, azimuth = rng.uniform(-1, 1, _CONTROL_POINTS), rng.uniform(0, 2 * np.pi, _CONTROL_POINTS)
        cosine = np.sqrt(1 - sine**2)
        directions = np.stack([cosine * np.cos(azimuth), cosine * np.sin(azimuth), sine], axis=1)
        if np.sum(directions * np.roll(directions, -1, axis=0), axis=1).min() >= limit:
            break
    low, high = reach[0] * BASE_DISTANCE, reach[1] * BASE_DISTANCE
    radii = rng.uniform(low, high, _CONTROL_POINTS)
    path = closed_spline(directions, views)
    distance = np.clip(closed_spline(radii[:, None], views), low, high)
    control: dict[str, list[float] | list[list[float]]] = {"directions": directions.tolist(), "radii": radii.tolist()}
    return control, path / np.linalg.norm(path, axis=1, keepdims=True) * distance


def _draw_arc(rng: np.random.Generator, views: int) -> tuple[dict[str, list[float] | list[list[float]]], np.ndarray]:
    """Arc of 60 to 120 degrees in azimuth, elevation in 10..60 degrees and distance both swinging along it."""
    azimuth = rng.uniform(0, 360)
    span = rng.uniform(60, 120) * rng.choice([-1, 1])
    elevations, radii = np.sort(rng.uniform(10, 60, 2)), np.sort(rng.uniform(0.85, 1.5, 2)) * BASE_DISTANCE
    swings, phases = rng.uniform(0.5, 1.5, 2), rng.uniform(0, 2 * np.pi, 2)
    time = np.linspace(0, 1, views)
    share = 0.5 + 0.5 * np.sin(2 * np.pi * swings * time[:, None] + phases)
    elevation = np.deg2rad(elevations[0] + (elevations[1] - elevations[0]) * share[:, 0])
    radius = radii[0] + (radii[1] - radii[0]) * share[:, 1]
    angle = np.deg2rad(azimuth + span * (time - 0.5))
    direction = np.stack([np.cos(elevation) * np.cos(angle), np.cos(elevation) * np.sin(angle), np.sin(elevation)], 1)
    control: dict[str, list[float] | list[list[float]]] = {
        "azimuth_and_span": [float(azimuth), float(span)],
        "elevations": elevations.tolist(),
        "radii": radii.tolist(),
        "swings": swings.tolist(),
        "phases": phases.tolist(),
    }
    return control, direction * radius[:, None]
