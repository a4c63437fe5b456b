"""The lighting attribute: an environment that is also the background, and lamps.

Energies are relative: images are exposed by percentiles. A lamp's energy is the irradiance it gives at the origin on a
surface that faces it; the environment's level is its radiance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

LampKind = Literal["sun", "point", "area", "glow"]
KINDS: tuple[LampKind, ...] = ("sun", "point", "area", "glow")
_ENVIRONMENT_SIZE = (16, 32)


@dataclass(frozen=True)
class LampSpec:
    """sun: parallel light; point: small bulb; area: square facing the origin; glow: a bright patch of the sky."""

    kind: LampKind
    position: list[float]  # world; only its direction matters for sun and glow
    color: list[float]  # linear RGB
    energy: float
    size: float  # side of an area lamp; half-width of a glow in radians


@dataclass(frozen=True)
class LightingSpec:
    sky: list[float]  # linear RGB radiance from straight above
    floor: list[float]  # from straight below
    lamps: list[LampSpec]


def draw_lighting(rng: np.random.Generator, preset: str, varies: bool) -> LightingSpec:
    """Draw environment and lamps; in the paper preset lighting that does not vary is an even grey environment."""
    if preset == "paper" and not varies:
        level = rng.uniform(0.55, 0.75)
        return LightingSpec([level] * 3, [level] * 3, [])
    upper = preset == "generic"
    level = float(np.exp(rng.uniform(np.log(0.3), np.log(1.0)) if upper else rng.uniform(np.log(0.02), np.log(0.5))))
    sky, floor = level * _draw_color(rng, 0.5 if upper else 1.0), level * _draw_color(rng, 0.5 if upper else 1.0)
    count = int(rng.integers(0, 3)) if upper else int(rng.integers(1, 5))
    lamps = [_draw_lamp(rng, upper) for _ in range(count)]
    # the renderer's kernels depend on the order of kinds, so a fixed order lets scenes share them
    lamps.sort(key=lambda lamp: KINDS.index(lamp.kind))
    return LightingSpec(sky.tolist(), floor.tolist(), lamps)


def _draw_color(rng: np.random.Generator, saturation: float) -> np.ndarray:
    """Linear RGB with greatest channel 1, blended towards white when ``saturation`` is below 1."""
    color = rng.uniform(0.05, 1, 3)
    return 1 - saturation * (1 - color / color.max())


def _draw_lamp(rng: np.random.Generator, upper: bool) -> LampSpec:
    kind = KINDS[int(rng.integers(len(KINDS)))]
    # a random point on a random face of a cube: lamps come from all sides
    direction = rng.uniform(-1, 1, 3)
    face = int(rng.integers(3))
    direction[face] = rng.choice([-1.0, 1.0])
    if upper:
        direction[2] = max(abs(direction[2]), 0.7 * float(np.hypot(direction[0], direction[1])))
    direction /= np.linalg.norm(direction)
    # bulbs hang near the objects; area lamps stand behind every camera, so that no view shows one in front of objects
    distance = {"point": rng.uniform(2.0, 4.0), "area": rng.uniform(6.5, 8.0)}.get(kind, 10.0)
    size = rng.uniform(0.5, 4.0) if kind == "area" else rng.uniform(0.1, 0.7)
    energy = float(np.exp(rng.uniform(np.log(0.5), np.log(4.0))))
    color = _draw_color(rng, 0.4 if upper else 1.0)
    return LampSpec(kind, (direction * distance).tolist(), color.tolist(), energy, size)


def environment_image(lighting: LightingSpec) -> np.ndarray:
    """Radiance float32 [16, 32, 3]: sky to floor, with the glows added.

    Row 0 is towards +z; column 0 towards +y, and columns turn towards +x.
    """
    rows, columns = _ENVIRONMENT_SIZE
    theta = (np.arange(rows) + 0.5) / rows * np.pi
    phi = (np.arange(columns) + 0.5) / columns * 2 * np.pi
    directions = np.stack(
        [
            np.sin(theta)[:, None] * np.sin(phi),
            np.sin(theta)[:, None] * np.cos(phi),
            np.broadcast_to(np.cos(theta)[:, None], (rows, columns)),
        ],
        axis=-1,
    )
    share = (directions[..., 2:] + 1) / 2
    image = np.array(lighting.floor) * (1 - share) + np.array(lighting.sky) * share
    solid_angle = np.sin(theta)[:, None] * (np.pi / rows) * (2 * np.pi / columns)
    for lamp in lighting.lamps:
        if lamp.kind == "glow":
            axis = np.array(lamp.position) / np.linalg.norm(lamp.position)
            cosine = directions @ axis
            lobe = np.exp((cosine - 1) / max(lamp.size, 0.15) ** 2)
            irradiance = np.sum(lobe * np.maximum(cosine, 0) * solid_angle)
            image = image + (lamp.energy / irradiance) * lobe[..., None] * np.array(lamp.color)
    return image.astype(np.float32)
