"""Cameras of the room regime: on the planes of the room's boundary looking inward, and from its centre looking around.

Every camera keeps a distance from the furniture, which shrinks slowly where the room leaves no other place.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from subspace3d.geometry import look_at
from subspace3d.scenes.cameras import CameraSpec, Control
from subspace3d.scenes.geometry.mesh import rotation_matrix
from subspace3d.scenes.geometry.rooms import CLEARANCE
from subspace3d.scenes.trajectories import MicroRanges, draw_micro

_TRIES_PER_RELAXATION = 300
_RELAXATION = 0.95
_CEILING = 0.7  # the upper plane of cameras, as a share of the height above the middle
# camera axes (x right, y down, z forward) of a camera that looks along world x with z up
_LEVEL = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])


def draw_reach(rng: np.random.Generator) -> np.ndarray:
    """Half-extents [3] of the space that cameras use when the room around them is drawn later; normalised."""
    extent = np.array([*rng.uniform(17, 30, 2), rng.uniform(10, 15)])
    return extent / extent.max()


def draw_room_cameras(rng: np.random.Generator, half: np.ndarray, boxes: np.ndarray, views: int) -> CameraSpec:
    """Three views of four on boundary planes looking at the origin, every fourth from the centre in any direction.

    Args:
        rng (Generator): the camera stream.
        half (float [3]): normalised half-extents of the room.
        boxes (float [N, 2, 3]): low and high corners of what cameras keep away from.
        views (int): number of cameras.
    """
    hfov = rng.uniform(45, 70)
    inset = rng.uniform(0.012, 0.03)
    faces = rng.permutation(6)[: int(rng.choice([6, 3, 2]))]
    positions, extrinsics = [], []
    for view in range(views):
        if view % 4 == 3:
            position = _clear(rng, boxes, lambda: rng.uniform(-0.5, 0.5, 3) * half)
            extrinsics.append(_looking_around(rng, position))
        else:
            position = _clear(rng, boxes, lambda: _on_boundary(rng, half - inset, faces))
            extrinsics.append(look_at(position, np.zeros(3)))
        positions.append(position)
    control: Control = {"faces": [float(face) for face in faces], "inset": [inset], "half_extent": half.tolist()}
    return CameraSpec(
        hfov, [0.0, 0.0, 0.0], 0.0, control, [p.tolist() for p in positions], [e.tolist() for e in extrinsics]
    )


def draw_room_video(
    rng: np.random.Generator, ranges: MicroRanges, half: np.ndarray, boxes: np.ndarray, views: int
) -> CameraSpec:
    """A micro-baseline video from near the centre; every second one looks at a box, sooner at a large or near one."""
    position = _clear(rng, boxes, lambda: rng.uniform(-0.5, 0.5, 3) * half)
    first = _looking_around(rng, position)
    target = position + 0.5 * first[2, :3]
    if len(boxes) and rng.random() < 0.5:
        centers, sizes = boxes.mean(axis=1), np.linalg.norm(boxes[:, 1] - boxes[:, 0], axis=1)
        weight = sizes / np.maximum(np.linalg.norm(centers - position, axis=1), 1e-6)
        target = centers[int(rng.choice(len(boxes), p=weight / weight.sum()))]
        first = look_at(position, target)
    return draw_micro(rng, ranges, first, target, views)


def _looking_around(rng: np.random.Generator, position: np.ndarray) -> np.ndarray:
    """[R | t] with any yaw, and pitch and roll within 10 degrees."""
    yaw, pitch, roll = rng.uniform(-180, 180), rng.uniform(-10, 10), rng.uniform(-10, 10)
    rotation = rotation_matrix([pitch, 0.0, roll]) @ _LEVEL @ rotation_matrix([0.0, 0.0, yaw])
    return np.concatenate([rotation, (-rotation @ position)[:, None]], axis=1)


def _on_boundary(rng: np.random.Generator, half: np.ndarray, faces: np.ndarray) -> np.ndarray:
    axis, high = divmod(int(rng.choice(faces)), 2)
    position = rng.uniform(-1, 1, 3) * half
    position[2] = min(position[2], _CEILING * half[2])
    position[axis] = half[axis] if high else -half[axis]
    if axis == 2 and high:
        position[2] = _CEILING * half[2]
    return position


def _clear(rng: np.random.Generator, boxes: np.ndarray, draw: Callable[[], np.ndarray]) -> np.ndarray:
    clearance, tries = CLEARANCE, 0
    while True:
        position = draw()
        outside = np.maximum(np.maximum(boxes[:, 0] - position, position - boxes[:, 1]), 0)
        if not len(boxes) or np.linalg.norm(outside, axis=1).min() > clearance:
            return position
        tries += 1
        if tries % _TRIES_PER_RELAXATION == 0:
            clearance *= _RELAXATION
