"""Micro-baseline videos: a camera that is held almost still.

walk: a random walk of control poses, joined by a natural cubic spline in position and SLERP in rotation.
tremor: the same walk scaled to what a hand does with a telephone held at arm's length, seen through the telephone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from subspace3d.geometry import look_at
from subspace3d.scenes.cameras import BASE_DISTANCE, CameraSpec, Control
from subspace3d.scenes.geometry.mesh import rotation_matrix

FRAMES = 42  # two seconds at 21 frames per second


@dataclass(frozen=True)
class MicroRanges:
    """A random walk in the scene's units and degrees."""

    points: int  # control poses
    step: float  # longest step between them; with ``baseline`` only the walk's shape counts
    turn: float  # greatest rotation per axis and step
    baseline: tuple[float, float] | None  # largest distance between two frames, as a share of the distance looked at
    hfov: tuple[float, float]
    aspect: float


WALK = MicroRanges(7, 0.03, 1.0, None, (45, 70), 1.0)
# 5 to 10 mm at 0.25 to 0.5 m; a portrait 3:4 image with 49 degrees along its short side
TREMOR = MicroRanges(10, 0.03, 0.25, (0.02, 0.04), (48, 50), 4 / 3)
RANGES = {"walk": WALK, "tremor": TREMOR}


def draw_micro_orbit(rng: np.random.Generator, ranges: MicroRanges, views: int) -> CameraSpec:
    """A video from somewhere around the origin, 0.7 to 1.3 base distances away, that first looks near the origin."""
    sine, azimuth = rng.uniform(-0.8, 0.8), rng.uniform(0, 2 * np.pi)
    cosine = np.sqrt(1 - sine**2)
    position = rng.uniform(0.7, 1.3) * BASE_DISTANCE * np.array(
        [cosine * np.cos(azimuth), cosine * np.sin(azimuth), sine]
    )  # fmt: skip
    target = rng.normal(0, 0.2, 3)
    return draw_micro(rng, ranges, look_at(position, target), target, views)


def draw_micro(
    rng: np.random.Generator, ranges: MicroRanges, first: np.ndarray, target: np.ndarray, views: int
) -> CameraSpec:
    """Walk from the pose ``first`` [3, 4] (camera-from-world), which looks at ``target`` [3]."""
    rotation, position = first[:, :3], -first[:, :3].T @ first[:, 3]
    steps, rotations = [np.zeros(3)], [rotation]
    for _ in range(ranges.points - 1):
        length, theta, phi = rng.uniform(0, ranges.step), rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
        steps.append(length * np.array([np.sin(phi) * np.cos(theta), np.sin(phi) * np.sin(theta), np.cos(phi)]))
        turn = rotation_matrix(rng.uniform(-ranges.turn, ranges.turn, 3).tolist())
        rotations.append(turn @ rotations[-1])
    offsets = np.cumsum(steps, axis=0)
    path = natural_spline(offsets, views)
    if ranges.baseline is not None:
        wanted = rng.uniform(*ranges.baseline) * float(np.linalg.norm(target - position))
        widest = np.linalg.norm(path[:, None] - path[None], axis=-1).max()
        factor = wanted / widest if views > 1 else 1.0
        offsets, path = offsets * factor, path * factor
    positions = position + path
    extrinsics = [
        np.concatenate([turn, (-turn @ place)[:, None]], axis=1).tolist()
        for turn, place in zip(slerp_path(np.stack(rotations), views), positions)
    ]
    control: Control = {
        "positions": (position + offsets).tolist(),
        "rotations": [turn.ravel().tolist() for turn in rotations],
    }
    hfov = rng.uniform(*ranges.hfov)
    return CameraSpec(hfov, target.tolist(), 0.0, control, positions.tolist(), extrinsics, ranges.aspect)


def natural_spline(points: np.ndarray, count: int) -> np.ndarray:
    """``count`` samples [count, D] of the natural cubic spline through ``points`` [N >= 3, D], uniform in time."""
    number = len(points)
    # second derivatives m at the knots: m[i-1] + 4 m[i] + m[i+1] = 6 (p[i-1] - 2 p[i] + p[i+1]), zero at both ends
    matrix = 4 * np.eye(number - 2) + np.eye(number - 2, k=1) + np.eye(number - 2, k=-1)
    bend = np.zeros_like(points)
    bend[1:-1] = np.linalg.solve(matrix, 6 * np.diff(points, 2, axis=0))
    knot, s = _knots(number, count)
    s, r = s[:, None], 1 - s[:, None]
    ends = r * points[knot] + s * points[knot + 1]
    return ends + ((r**3 - r) * bend[knot] + (s**3 - s) * bend[knot + 1]) / 6


def slerp_path(rotations: np.ndarray, count: int) -> np.ndarray:
    """``count`` rotations [count, 3, 3] along ``rotations`` [N, 3, 3], uniform in time and SLERP between neighbours.

    R(s) = exp(s log(R_next R^T)) R with Rodrigues' formula for both.
    """
    knot, s = _knots(len(rotations), count)
    result = []
    for index, share in zip(knot, s):
        turn = rotations[index + 1] @ rotations[index].T
        axis = np.array([turn[2, 1] - turn[1, 2], turn[0, 2] - turn[2, 0], turn[1, 0] - turn[0, 1]])
        sine, cosine = np.linalg.norm(axis) / 2, (np.trace(turn) - 1) / 2
        angle = share * np.arctan2(sine, cosine)
        axis = axis / max(2 * sine, 1e-12)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        step = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
        result.append(step @ rotations[index])
    return np.stack(result)


def _knots(number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment and place in it, [count] each, of ``count`` times evenly spread over ``number`` knots, ends included."""
    time = np.linspace(0, number - 1, count)
    knot = np.minimum(time.astype(int), number - 2)
    return knot, time - knot
