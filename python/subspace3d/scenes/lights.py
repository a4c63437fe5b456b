"""The lighting attribute: an environment that is also the background, and lamps.

Energies are relative: images are exposed by percentiles. A lamp's energy is the irradiance it gives at the origin on a
surface that faces it; the environment's level is its radiance.

In a room, lamps are placed relative to its shell, which another stream draws: see `place_in_room`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from subspace3d.scenes.geometry.objects import RoomSpec
from subspace3d.scenes.geometry.rooms import half_extent, wall_frame

LampKind = Literal["sun", "point", "area", "glow"]
KINDS: tuple[LampKind, ...] = ("sun", "point", "area", "glow")
STICKS = 22  # most sticks a scene can have
_ENVIRONMENT_SIZE = (16, 32)


@dataclass(frozen=True)
class LampSpec:
    """sun: parallel light; point: small bulb; area: square facing the origin; glow: a bright patch of the sky.

    In a room a bulb's position is a share of the room's half-extents, and so is that of an area lamp, which hangs flat
    under the roof; a sun shines through the middle of the window, from (right, up, outward) of it.
    """

    kind: LampKind
    position: list[float]  # world; only its direction matters for sun and glow
    color: list[float]  # linear RGB
    energy: float
    size: float  # side of an area lamp; half-width of a glow in radians
    target: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # what an area lamp faces


@dataclass(frozen=True)
class LightingSpec:
    sky: list[float]  # linear RGB radiance from straight above
    floor: list[float]  # from straight below
    lamps: list[LampSpec]
    shining: list[int] = field(
        default_factory=list
    )  # numbers of sticks that shine; those that do not exist do not count
    stick_radiance: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # linear RGB, of all that shine
    background: Literal["environment", "white"] = "environment"


def draw_lighting(rng: np.random.Generator, preset: str, varies: bool, room: bool = False) -> LightingSpec:
    """Draw environment and lamps, from wide ranges where the lighting varies within the data set.

    Args:
        rng (Generator): the lighting stream.
        preset (str): paper, release or generic.
        varies (bool): whether lighting is what varies.
        room (bool): lamps of the indoor regime.
    """
    if room:
        return _draw_room_lighting(rng, varies)
    if preset == "release":
        return _draw_release(rng, varies)
    if preset == "paper" and not varies:
        level = rng.uniform(0.55, 0.75)
        glow = LampSpec(
            "glow", (10 * _draw_direction(rng)).tolist(), [1.0] * 3, rng.uniform(0.3, 1.5), rng.uniform(0.3, 0.8)
        )
        return LightingSpec([level] * 3, [level] * 3, [glow])
    upper = preset == "generic"
    level = float(np.exp(rng.uniform(np.log(0.3), np.log(1.0)) if upper else rng.uniform(np.log(0.02), np.log(0.5))))
    sky, floor = level * _draw_color(rng, 0.5 if upper else 1.0), level * _draw_color(rng, 0.5 if upper else 1.0)
    count = int(rng.integers(0, 3)) if upper else int(rng.integers(1, 5))
    lamps = [_draw_lamp(rng, upper) for _ in range(count)]
    return LightingSpec(sky.tolist(), floor.tolist(), _in_order(lamps))


def _in_order(lamps: list[LampSpec]) -> list[LampSpec]:
    """By kind: the renderer's kernels depend on the order of kinds, and a fixed one lets scenes share them."""
    return sorted(lamps, key=lambda lamp: KINDS.index(lamp.kind))


def _draw_color(rng: np.random.Generator, saturation: float) -> np.ndarray:
    """Linear RGB with greatest channel 1, blended towards white when ``saturation`` is below 1."""
    color = rng.uniform(0.05, 1, 3)
    return 1 - saturation * (1 - color / color.max())


def _draw_direction(rng: np.random.Generator) -> np.ndarray:
    """Towards a random point on a random face of a cube: lamps come from all sides."""
    direction = rng.uniform(-1, 1, 3)
    face = int(rng.integers(3))
    direction[face] = rng.choice([-1.0, 1.0])
    return direction / np.linalg.norm(direction)


def _draw_lamp(rng: np.random.Generator, upper: bool) -> LampSpec:
    kind = KINDS[int(rng.integers(len(KINDS)))]
    direction = _draw_direction(rng)
    if upper:
        direction[2] = max(abs(direction[2]), 0.7 * float(np.hypot(direction[0], direction[1])))
        direction /= np.linalg.norm(direction)
    # bulbs hang near the objects; area lamps stand behind every camera, so that no view shows one in front of objects
    distance = {"point": rng.uniform(2.0, 4.0), "area": rng.uniform(6.5, 8.0)}.get(kind, 10.0)
    size = rng.uniform(0.5, 4.0) if kind == "area" else rng.uniform(0.1, 0.7)
    energy = float(np.exp(rng.uniform(np.log(0.5), np.log(4.0))))
    color = _draw_color(rng, 0.4 if upper else 1.0)
    return LampSpec(kind, (direction * distance).tolist(), color.tolist(), energy, size)


def _draw_shining(rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """In 7 of 10 scenes every stick shines with probability 0.2, all in one colour."""
    some, chosen = rng.random() < 0.7, rng.random(STICKS) < 0.2
    radiance = rng.uniform(1, 4) * _draw_color(rng, 1.0)
    return np.flatnonzero(chosen).tolist() if some else [], radiance.tolist()


def _draw_release(rng: np.random.Generator, varies: bool) -> LightingSpec:
    """An even grey environment; where lighting varies an almost black one and 2 or 3 coloured suns."""
    if not varies:
        level = rng.uniform(0.55, 0.75)
        return LightingSpec([level] * 3, [level] * 3, [], background="white")
    suns = [
        LampSpec("sun", (10 * _draw_direction(rng)).tolist(), rng.uniform(0, 1, 3).tolist(), rng.uniform(0.1, 0.3), 0.0)
        for _ in range(int(rng.integers(2, 4)))
    ]
    return LightingSpec([1e-3] * 3, [1e-3] * 3, suns, background="white")


def _draw_room_lighting(rng: np.random.Generator, varies: bool) -> LightingSpec:
    """Four bulbs that fill the room, a sun through the window, more bulbs, lamps under the roof, sticks that shine.

    Fixed: fill of energy 1.5 to 2.5, almost white; a sun with probability 0.6; 1 to 3 bulbs with probability 0.1.
    Varied: a coloured fill of energy 0.1 to 1, and 1 to 4 lamps, each a bulb or an area lamp, of any colour.
    """
    sky = rng.uniform(0.3, 1.2) * _draw_color(rng, 1.0 if varies else 0.2)
    lamps = []
    fill = rng.uniform(0.1, 1) if varies else rng.uniform(1.5, 2.5)
    fill_color = _draw_color(rng, 0.8 if varies else 0.1)
    for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        corner = [x * rng.uniform(0.4, 0.7), y * rng.uniform(0.4, 0.7), rng.uniform(0.3, 0.8)]
        lamps.append(LampSpec("point", corner, fill_color.tolist(), fill, 0.0))
    if rng.random() < 0.6:
        aim = [rng.uniform(-0.7, 0.7), rng.uniform(0.2, 1.0), 1.0]
        lamps.append(LampSpec("sun", aim, _draw_color(rng, 1.0).tolist(), rng.uniform(5, 20), 0.0))
    for _ in range(int(rng.integers(1, 5)) if varies else 0):
        color, energy = _draw_color(rng, 1.0), float(np.exp(rng.uniform(np.log(1.0), np.log(8.0))))
        position = rng.uniform(-0.8, 0.8, 3)
        if rng.random() < 0.5:
            lamps.append(LampSpec("area", position.tolist(), color.tolist(), energy, rng.uniform(0.3, 1.0)))
        else:
            lamps.append(LampSpec("point", position.tolist(), color.tolist(), energy, 0.0))
    if not varies and rng.random() < 0.1:
        for _ in range(int(rng.integers(1, 4))):
            energy = rng.uniform(0.2, 2) if rng.random() < 0.85 else rng.uniform(5, 8)
            corner = rng.uniform(-0.9, 0.9, 3).tolist()
            lamps.append(LampSpec("point", corner, _draw_color(rng, 1.0).tolist(), energy, 0.0))
    return LightingSpec(sky.tolist(), sky.tolist(), _in_order(lamps), *_draw_shining(rng))


def place_in_room(lighting: LightingSpec, room: RoomSpec) -> LightingSpec:
    """The same lighting with the lamps' positions in the world; suns are dropped where there is no open window.

    A pane refracts, and no path of light from a sun through it can be sampled.
    """
    half = half_extent(room)
    lamps = []
    for lamp in lighting.lamps:
        position = np.array(lamp.position) * half
        target = [0.0, 0.0, 0.0]
        if lamp.kind == "area":
            position[2] = half[2] - 1e-3
            target = [position[0], position[1], 0.0]
        elif lamp.kind == "sun":
            if room.window is None or room.window.pane:
                continue
            _, along, _, outward = wall_frame(room.window.wall, half)
            right = along / np.linalg.norm(along)
            position = lamp.position[0] * right + lamp.position[2] * outward + lamp.position[1] * np.array([0, 0, 1])
        lamps.append(replace(lamp, position=position.tolist(), target=target))
    return replace(lighting, lamps=lamps)


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
