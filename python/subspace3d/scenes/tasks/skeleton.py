"""Bodies as bones: tapered capsules of a posed skeleton, with what each of them wears.

Units: the height of an adult; z up, the body looks along -y. Angles in degrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from subspace3d.scenes.geometry.mesh import rotation_matrix

SKIN, HAIR, SHIRT, TROUSERS, SHOES = range(5)  # cells of the atlas


@dataclass(frozen=True)
class BodySpec:
    """Proportions, clothes and joint angles; pairs are left and right."""

    girth: float  # scales all radii
    head: float  # scales the head
    legs: float  # scales the legs' length
    arms: float
    looseness: float  # added to the radii under cloth
    folds: float  # amplitude of the folds in it
    long_sleeves: bool
    long_trousers: bool
    skirt: float  # length of a skirt as a share of the legs; 0: none
    long_hair: bool
    lean: list[float]  # of the torso: forward, sideways
    turn: float  # of the whole body about the vertical
    head_turn: float
    shoulder_out: list[float]  # away from the body
    shoulder_forward: list[float]
    elbow: list[float]
    hip_out: list[float]
    hip_forward: list[float]
    knee: list[float]


@dataclass
class Bones:
    """J tapered capsules."""

    start: np.ndarray  # float64 [J, 3]
    end: np.ndarray  # float64 [J, 3]
    radii: np.ndarray  # float64 [J, 2], at start and end
    folds: np.ndarray  # float64 [J]
    blend: np.ndarray  # float64 [J], scales the width of the blend with what came before
    front: np.ndarray  # float64 [J, 3], a direction that is not along the bone
    materials: np.ndarray  # int64 [J]


class Add(Protocol):
    """Adds a bone from ``start`` to ``end`` that wears ``material``."""

    def __call__(
        self, start: np.ndarray, end: np.ndarray, radii: tuple[float, float], material: int, blend: float = 1.0
    ) -> None: ...


def draw_body(rng: np.random.Generator, cross: bool) -> BodySpec:
    """Draw proportions, clothes and pose; ``cross``: those of the cross-domain split."""

    def pair(low: float, high: float) -> list[float]:
        return rng.uniform(low, high, 2).tolist()

    child = cross and rng.random() < 0.5
    pose_limits = {
        "shoulder_out": pair(30, 150) if cross else pair(8, 55),
        "shoulder_forward": pair(-40, 80) if cross else pair(-30, 35),
        "elbow": pair(0, 120) if cross else pair(0, 80),
        "hip_out": pair(2, 30) if cross else pair(2, 12),
        "hip_forward": pair(-30, 80) if cross else pair(-22, 30),
        "knee": pair(0, 100) if cross else pair(0, 35),
    }
    return BodySpec(
        girth=rng.uniform(1.1, 1.45) if cross else rng.uniform(0.85, 1.1),
        head=rng.uniform(1.25, 1.55) if child else rng.uniform(0.95, 1.1),
        legs=rng.uniform(0.7, 0.85) if child else rng.uniform(0.95, 1.08),
        arms=rng.uniform(0.75, 0.9) if child else rng.uniform(0.95, 1.05),
        looseness=rng.uniform(0.012, 0.03) if cross else rng.uniform(0.002, 0.014),
        folds=rng.uniform(0.003, 0.006) if cross else rng.uniform(0.001, 0.003),
        long_sleeves=bool(rng.random() < 0.5),
        long_trousers=bool(rng.random() < 0.7),
        skirt=rng.uniform(0.35, 0.95) if cross and rng.random() < 0.6 else 0.0,
        long_hair=bool(rng.random() < (0.6 if cross else 0.25)),
        lean=[rng.uniform(-5, 25 if cross else 10), rng.uniform(-12, 12) if cross else rng.uniform(-5, 5)],
        turn=rng.uniform(-30, 30),
        head_turn=rng.uniform(-40, 40),
        **pose_limits,
    )


def pose(body: BodySpec) -> Bones:
    """Place the bones."""
    bones: list[tuple[np.ndarray, np.ndarray, float, float, float, float, int]] = []
    girth, loose = body.girth, body.looseness

    def add(start: np.ndarray, end: np.ndarray, radii: tuple[float, float], material: int, blend: float = 1.0) -> None:
        cloth = material in (SHIRT, TROUSERS)
        first, last = (girth * radius + (loose if cloth else 0) for radius in radii)
        bones.append((start, end, first, last, body.folds if cloth else 0.0, blend, material))

    pelvis = np.array([0.0, 0.0, 0.50 * body.legs])
    torso = rotation_matrix([body.lean[0], body.lean[1], 0.0])
    chest = pelvis + torso @ np.array([0.0, 0.0, 0.21])
    neck = chest + torso @ np.array([0.0, 0.0, 0.11])
    width = 0.06 * (0.6 + 0.4 * girth)
    for side in (-1, 1):
        offset = np.array([side * width, 0.0, 0.0])
        add(pelvis + 0.8 * offset, chest + torso @ offset, (0.085, 0.085), SHIRT, 2.0)
    add(pelvis + [0, 0, -0.02], pelvis + [0, 0, 0.05], (0.095, 0.085), TROUSERS)
    _add_head(body, add, neck, torso)
    for index, side in enumerate((-1, 1)):
        _add_arm(body, add, chest, torso, index, side)
        _add_leg(body, add, pelvis, index, side)
    if body.skirt:
        hem = pelvis + [0, 0, -0.45 * body.legs * body.skirt]
        add(pelvis + [0, 0, 0.04], hem, (0.10, 0.10 + 0.13 * body.skirt), TROUSERS, 0.5)
    turn = rotation_matrix([0.0, 0.0, body.turn])
    start, end, first, last, folds, blend, materials = (list(column) for column in zip(*bones))
    front = np.tile([0.0, -1.0, 0.0], (len(bones), 1))
    upright = np.array(end) - np.array(start)
    # feet point along -y, so their front is up
    lying = np.abs(upright[:, 1]) > 0.8 * np.linalg.norm(upright, axis=1)
    front[lying] = [0.0, 0.0, 1.0]
    return Bones(
        np.array(start) @ turn.T, np.array(end) @ turn.T, np.stack([first, last], 1), np.array(folds),
        np.array(blend), front @ turn.T, np.array(materials),
    )  # fmt: skip


def _add_head(body: BodySpec, add: Add, neck: np.ndarray, torso: np.ndarray) -> None:
    look = torso @ rotation_matrix([0.0, 0.0, body.head_turn])
    center = neck + look @ np.array([0.0, -0.01, 0.095 * body.head])
    size = 0.062 * body.head / body.girth
    add(neck - torso @ np.array([0.0, 0.0, 0.05]), center, (0.042, 0.042), SKIN)
    add(center + look @ [0, 0.005, 0.02], center + look @ [0, -0.008, -0.035], (size, 0.75 * size), SKIN)
    nose = center + look @ np.array([0.0, -0.062 * body.head, -0.012])
    add(nose, nose + look @ [0, -0.006, -0.012], (0.01, 0.012), SKIN, 0.4)
    hair = center + look @ np.array([0.0, 0.016, 0.028])
    fall = 0.16 if body.long_hair else 0.02
    add(hair, hair + look @ [0, 0.02, -fall], (1.06 * size, 0.9 * size), HAIR, 0.15)


def _add_arm(body: BodySpec, add: Add, chest: np.ndarray, torso: np.ndarray, index: int, side: int) -> None:
    shoulder = chest + torso @ np.array([side * (0.06 + 0.07 * (0.5 + 0.5 * body.girth)), 0.0, 0.055])
    swing = rotation_matrix([-body.shoulder_forward[index], 0.0, 0.0])
    raise_ = rotation_matrix([0.0, -side * body.shoulder_out[index], 0.0])
    upper = torso @ swing @ raise_
    elbow = shoulder + upper @ np.array([0.0, 0.0, -0.165 * body.arms])
    lower = upper @ rotation_matrix([-body.elbow[index], 0.0, 0.0])
    wrist = elbow + lower @ np.array([0.0, 0.0, -0.15 * body.arms])
    hand = wrist + lower @ np.array([0.0, 0.0, -0.055])
    add(shoulder, elbow, (0.045, 0.036), SHIRT)
    add(elbow, wrist, (0.034, 0.026), SHIRT if body.long_sleeves else SKIN, 0.6)
    add(wrist, hand, (0.022, 0.024), SKIN, 0.6)


def _add_leg(body: BodySpec, add: Add, pelvis: np.ndarray, index: int, side: int) -> None:
    hip = pelvis + np.array([side * 0.055 * (0.5 + 0.5 * body.girth), 0.0, -0.02])
    swing = rotation_matrix([-body.hip_forward[index], 0.0, 0.0])
    thigh = swing @ rotation_matrix([0.0, -side * body.hip_out[index], 0.0])
    knee = hip + thigh @ np.array([0.0, 0.0, -0.235 * body.legs])
    shin = thigh @ rotation_matrix([body.knee[index], 0.0, 0.0])
    ankle = knee + shin @ np.array([0.0, 0.0, -0.235 * body.legs])
    toe = ankle + shin @ np.array([0.0, -0.10, -0.015])
    add(hip, knee, (0.07, 0.05), TROUSERS)
    add(knee, ankle, (0.048, 0.034), TROUSERS if body.long_trousers else SKIN, 0.6)
    add(ankle + shin @ [0, 0.01, -0.01], toe, (0.034, 0.03), SHOES, 0.6)
