"""Drawn portraits: a head as a height map, shaded by a lamp, so that a flat picture says "this is round".

Coordinates: x in [-1, 1] to the right, y in [-4/3, 4/3] down, height z towards the viewer.
"""

from __future__ import annotations

import numpy as np

from subspace3d.scenes.materials.patterns import LATTICE_SIZE, fractal

_SKIN = np.array([[0.93, 0.76, 0.65], [0.82, 0.60, 0.46], [0.64, 0.42, 0.29], [0.42, 0.26, 0.18]])
_HAIR = np.array([[0.08, 0.06, 0.05], [0.30, 0.18, 0.10], [0.62, 0.43, 0.20], [0.55, 0.54, 0.53], [0.45, 0.15, 0.07]])
_IRIS = np.array([[0.28, 0.17, 0.09], [0.25, 0.42, 0.55], [0.30, 0.42, 0.25]])


def draw_portrait(seed: int, height: int, print_style: bool = False) -> np.ndarray:
    """A portrait in sRGB, float64 [height, 3/4 height, 3] in [0, 1].

    Args:
        seed (int): everything about the person and the picture follows from it.
        height (int): pixels.
        print_style (bool): a faded monochrome print instead of a colour photograph.
    """
    rng = np.random.default_rng(seed)
    width = round(height * 3 / 4)
    x, y = np.meshgrid((np.arange(width) + 0.5) / width * 2 - 1, ((np.arange(height) + 0.5) / height * 2 - 1) * 4 / 3)
    lattice = rng.random((LATTICE_SIZE, LATTICE_SIZE))
    blur = 3.0 / height
    skin = _mix(rng, _SKIN)
    hair = _mix(rng, _HAIR) * rng.uniform(0.7, 1.2)
    cloth, wall = rng.uniform(0.05, 0.9, 3), rng.uniform(0.2, 0.9, 3)
    a, b = rng.uniform(0.50, 0.60), rng.uniform(0.70, 0.80)  # half width and half height of the head
    jaw, eye_y, eye_x = rng.uniform(0.10, 0.28), rng.uniform(-0.12, -0.02), rng.uniform(0.20, 0.25)
    light = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.9, -0.2), 1.0])
    light /= np.linalg.norm(light)

    image = wall * (0.75 + 0.5 * fractal(x * 1.5 + 9, y * 1.5, lattice)[..., None]) * (1 - 0.2 * y[..., None])
    body = 1 - np.hypot(x / 0.98, np.maximum(y - 1.45, -1) / 0.62)
    body_shade = 0.5 + 0.6 * np.clip(body, 0, 1) + 0.25 * light[0] * x
    image = _over(image, cloth * body_shade[..., None], _soft(body, blur))
    neck = 1 - np.maximum(np.abs(x) / (0.55 * a), np.abs(y - 0.8) / 0.45)
    image = _over(image, skin * (0.55 + 0.25 * light[0] * x)[..., None], _soft(neck, blur))
    long_hair = rng.random() < 0.5
    back = 1 - np.hypot(
        x / (1.22 * a), (y + 0.12 - (0.25 if long_hair else 0)) / (1.18 * b + (0.2 if long_hair else 0))
    )
    strands = 0.7 + 0.6 * fractal(x * 25, y * 3, lattice, 2)[..., None]
    image = _over(image, hair * strands * 0.8, _soft(back, blur))

    narrow = x / (a * (1 - jaw * np.clip(y / b, -0.4, 1)))
    inside = 1 - narrow**2 - (y / b) ** 2
    for side in (-1, 1):
        ear = 1 - np.hypot((x - side * a * 0.98) / 0.07, (y - 0.02) / 0.15)
        image = _over(image, skin * 0.75, _soft(ear, 3 * blur))
    relief = _relief(rng, x, y, inside, eye_x, eye_y)
    slope_y, slope_x = np.gradient(relief, 8 / 3 / height, 2 / width)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(x)], -1)
    shade = np.clip(normal @ light / np.linalg.norm(normal, axis=-1), 0, 1)[..., None]
    blush = np.array([1.0, 0.93, 0.92])
    tone = skin * (0.93 + 0.14 * fractal(x * 14, y * 14, lattice)[..., None]) * (0.28 + 0.85 * shade)
    cheek = np.exp(-(((np.abs(x) - 0.3) / 0.14) ** 2) - ((y - 0.2) / 0.14) ** 2)[..., None]
    face = tone * (1 + cheek * (blush - 1))
    face = _features(rng, face, x, y, eye_x, eye_y, skin, hair, blur)
    image = _over(image, face, _soft(inside, 4 * blur))
    hairline = -b * rng.uniform(0.45, 0.62) + rng.uniform(-0.25, 0.3) * x + rng.uniform(0.2, 0.7) * x**2
    fringe = np.minimum((hairline - y) / 0.05, np.minimum(back * 12, (1.25 - (narrow**2 + (y / b) ** 2)) * 12))
    image = _over(image, hair * strands * (0.7 + 0.5 * shade), np.clip(fringe, 0, 1))
    if print_style:
        grey = image.mean(-1, keepdims=True)
        image = (0.18 + 0.72 * grey + 0.04 * (rng.random((height, width, 1)) - 0.5)) * np.array([1.0, 0.95, 0.85])
    return np.clip(image, 0, 1)


def _mix(rng: np.random.Generator, colors: np.ndarray) -> np.ndarray:
    first, second = rng.integers(len(colors), size=2)
    share = rng.random()
    return share * colors[first] + (1 - share) * colors[second]


def _soft(value: np.ndarray, width: float) -> np.ndarray:
    return np.clip(value / width + 0.5, 0, 1)


def _over(image: np.ndarray, color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return image + (color - image) * alpha[..., None]


def _relief(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, inside: np.ndarray, eye_x: float, eye_y: float
) -> np.ndarray:
    """Height of the face: an ellipsoid with nose, eye sockets, brows, lips and chin."""

    def bump(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return np.exp(-(((np.abs(x) - cx) / rx) ** 2) - ((y - cy) / ry) ** 2)

    nose_tip, nose_width = rng.uniform(0.17, 0.24), rng.uniform(0.055, 0.08)
    ridge = np.clip((y - eye_y) / (nose_tip - eye_y), 0, 1) * _soft(nose_tip + 0.02 - y, 0.05)
    relief = 0.55 * np.sqrt(np.maximum(inside, 0.02))
    relief += rng.uniform(0.12, 0.18) * ridge * np.exp(-((x / nose_width) ** 2))
    relief += 0.03 * bump(0.06, nose_tip - 0.01, 0.035, 0.035)  # wings of the nose
    relief -= 0.055 * bump(eye_x, eye_y, 0.12, 0.07)
    relief += 0.03 * bump(eye_x, eye_y - 0.13, 0.16, 0.04)
    relief += 0.02 * bump(0.0, 0.40, 0.16, 0.05) + 0.03 * bump(0.0, 0.60, 0.12, 0.07)
    return relief


def _features(
    rng: np.random.Generator,
    face: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    eye_x: float,
    eye_y: float,
    skin: np.ndarray,
    hair: np.ndarray,
    blur: float,
) -> np.ndarray:
    """Eyes, brows, nostrils and mouth; sometimes a beard or glasses."""
    opening, gaze = rng.uniform(0.035, 0.055), rng.uniform(-0.03, 0.03)
    iris, lip = _mix(rng, _IRIS), skin * np.array([0.95, 0.55, 0.55])
    mouth_y, mouth_w, smile = rng.uniform(0.38, 0.44), rng.uniform(0.15, 0.21), rng.uniform(-0.1, 0.7)
    if rng.random() < 0.3:
        beard = np.minimum(_soft(y - 0.28 - 0.25 * np.exp(-((x / 0.2) ** 2)) + 0.9 * np.abs(x) ** 2, 0.12), 0.8)
        face = _over(face, hair * (0.6 + 0.4 * face.mean(-1, keepdims=True)), beard)
    for side in (-1, 1):
        ex, ey = x - side * eye_x, y - eye_y
        lid = 1 - np.hypot(ex / 0.105, ey / opening)
        eye = np.full_like(face, 0.92) * (0.75 + 2.5 * np.clip(lid, 0, 0.1))[..., None]
        from_iris = np.hypot(ex - gaze, ey)
        eye = _over(eye, iris, _soft(1 - from_iris / 0.05, 10 * blur))
        eye = _over(eye, np.zeros(3), _soft(1 - from_iris / 0.022, 20 * blur))
        eye = _over(eye, np.ones(3), _soft(1 - np.hypot(ex - gaze + 0.015, ey + 0.015) / 0.01, 40 * blur))
        face = _over(face, eye, _soft(lid, 8 * blur))
        lash = 0.014 - np.abs(ey + opening * np.sqrt(np.clip(1 - (ex / 0.11) ** 2, 0, 1)))
        face = _over(face, np.full(3, 0.08), _soft(np.where(np.abs(ex) < 0.11, lash, -1), blur) * 0.9)
        brow = 0.022 - np.abs(ey + 0.135 - 0.03 * (1 - (ex / 0.13) ** 2) * 0.5 + side * ex * 0.06)
        face = _over(face, hair * 0.7, _soft(np.where(np.abs(ex) < 0.135, brow, -1), 2 * blur) * 0.85)
        nostril = 1 - np.hypot((x - side * 0.035) / 0.02, (y - 0.225) / 0.012)
        face = _over(face, skin * 0.3, _soft(nostril, 20 * blur) * 0.8)
    arch = y - mouth_y + smile * (x**2 - 0.3 * mouth_w**2)
    reach = np.sqrt(np.clip(1 - (x / mouth_w) ** 2, 0, 1))
    lips = _soft(np.minimum(arch + 0.035 * reach, 0.05 * reach - arch), 3 * blur) * np.minimum(1, 3 * reach)
    face = _over(face, lip * (0.9 + 2 * np.clip(arch, -0.1, 0.06))[..., None], lips)
    face = _over(face, skin * 0.25, _soft(0.008 * reach - np.abs(arch), blur) * np.minimum(0.9, 3 * reach))
    if rng.random() < 0.25:
        for side in (-1, 1):
            rim = 0.012 - np.abs(np.hypot((x - side * eye_x) / 1.1, y - eye_y) - 0.14)
            face = _over(face, np.full(3, 0.1), _soft(rim, blur))
        bridge = np.where(np.abs(x) < eye_x - 0.15, 0.01 - np.abs(y - eye_y + 0.03), -1)
        face = _over(face, np.full(3, 0.1), _soft(bridge, blur))
    return face
