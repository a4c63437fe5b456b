"""One sampler, four independent random streams: texture, geometry, camera, lighting.

In a data set the seed of the varied attribute changes from scene to scene and the other three stay; from data set to
data set all four change. Each stream is consumed by its own attribute alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subspace3d.choices import ATTRIBUTES
from subspace3d.scenes.cameras import CameraSpec, draw_orbit
from subspace3d.scenes.geometry.objects import RANGES, GeometrySpec, draw_geometry, release_group
from subspace3d.scenes.geometry.rooms import draw_room, half_extent, obstacles
from subspace3d.scenes.lights import LightingSpec, draw_lighting
from subspace3d.scenes.materials.atlas import TextureSpec, draw_texture
from subspace3d.scenes.room_cameras import draw_reach, draw_room_cameras, draw_room_video
from subspace3d.scenes.trajectories import RANGES as MICRO_RANGES
from subspace3d.scenes.trajectories import draw_micro_orbit

PRESETS = ("paper", "release", "generic")
REGIMES = ("object", "room")
TRAJECTORIES = ("wide", "walk", "tremor")
_CHOICES = (*ATTRIBUTES, "all")


@dataclass(frozen=True)
class Seeds:
    """One seed below 2^53 (exact in any JSON reader) per attribute."""

    texture: int
    geometry: int
    camera: int
    lighting: int


@dataclass(frozen=True)
class SceneSpec:
    """Everything that was drawn for a scene; `as_dict` is what scene.json records."""

    texture: TextureSpec
    geometry: Any  # GeometrySpec, or what a task draws: a dataclass with the field room
    camera: CameraSpec
    lighting: LightingSpec

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def scene_seeds(root_seed: int, dataset_index: int, scene_index: int, attribute: str, attempt: int = 0) -> Seeds:
    """Seeds of one scene.

    ``attempt`` > 0 redraws a scene whose views show too little: it changes the geometry seed where geometry is what
    varies, else the camera seed. What is seen depends on geometry and camera alone, so in a texture or lighting data
    set every scene comes to the same attempt and the camera stays the same throughout.

    Raises:
        ValueError: ``attribute`` is not texture, geometry, camera, lighting or all; an index or seed is negative.
    """
    if attribute not in _CHOICES:
        raise ValueError(f"attribute must be one of {list(_CHOICES)}, got {attribute!r}")
    for name, value in (("root_seed", root_seed), ("dataset_index", dataset_index), ("scene_index", scene_index)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    redrawn = "geometry" if attribute == "geometry" else "camera"
    seeds = {}
    for index, name in enumerate(ATTRIBUTES):
        scene = scene_index + 1 if attribute in (name, "all") else 0
        key = (_CHOICES.index(attribute), dataset_index, index, scene, attempt if name == redrawn else 0)
        state = np.random.SeedSequence(root_seed, spawn_key=key).generate_state(1, np.uint64)
        seeds[name] = int(state[0] >> np.uint64(11))
    return Seeds(**seeds)


def sample_scene(
    seeds: Seeds,
    preset: str,
    views: int,
    attribute: str = "all",
    *,
    regime: str = "object",
    trajectory: str = "wide",
    dataset: int = 0,
    library: Sequence[str] = (),
) -> SceneSpec:
    """Draw a scene; equal seeds of an attribute give an equal part of the result.

    Args:
        seeds (Seeds): one seed per attribute.
        preset (str): paper (extreme ranges), release (those of the authors' release) or generic (milder; objects on a
            ground).
        views (int): number of cameras.
        attribute (str): what varies in the data set; camera and lighting take their wide ranges only then.
        regime (str): object (objects alone) or room (an indoor scene).
        trajectory (str): wide, walk or tremor (micro-baseline videos).
        dataset (int): index of the data set; release has its own ranges for each data set that varies geometry.
        library (sequence of str): names of texture maps for the materials; empty: procedural ones.

    Raises:
        ValueError: an unknown preset, attribute, regime or trajectory, or ``views`` below 1.
    """
    for name, value, choices in (
        ("preset", preset, PRESETS),
        ("attribute", attribute, _CHOICES),
        ("regime", regime, REGIMES),
        ("trajectory", trajectory, TRAJECTORIES),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    geometry_rng, camera_rng = np.random.default_rng(seeds.geometry), np.random.default_rng(seeds.camera)
    ranges = release_group(dataset) if (preset, attribute) == ("release", "geometry") else RANGES[preset]
    if regime == "room":
        geometry, camera = _sample_room(geometry_rng, camera_rng, preset, views, attribute, trajectory)
    else:
        geometry = draw_geometry(geometry_rng, ranges)
        if trajectory == "wide":
            camera = draw_orbit(camera_rng, preset, views, attribute)
        else:
            camera = draw_micro_orbit(camera_rng, MICRO_RANGES[trajectory], views)
    lighting_rng = np.random.default_rng(seeds.lighting)
    lighting = draw_lighting(lighting_rng, preset, attribute in ("lighting", "all"), regime == "room")
    return SceneSpec(draw_texture(seeds.texture, preset, library), geometry, camera, lighting)


def _sample_room(
    geometry_rng: np.random.Generator,
    camera_rng: np.random.Generator,
    preset: str,
    views: int,
    attribute: str,
    trajectory: str,
) -> tuple[GeometrySpec, CameraSpec]:
    """Cameras must stay clear of the furniture: whichever of the two varies is drawn second, around the other."""

    def cameras(half: np.ndarray, boxes: np.ndarray) -> CameraSpec:
        if trajectory == "wide":
            return draw_room_cameras(camera_rng, half, boxes, views)
        return draw_room_video(camera_rng, MICRO_RANGES[trajectory], half, boxes, views)

    if attribute == "geometry":
        reach = draw_reach(camera_rng)
        camera = cameras(reach, np.zeros((0, 2, 3)))
        return draw_room(geometry_rng, RANGES[preset], np.array(camera.positions), reach), camera
    geometry = draw_room(geometry_rng, RANGES[preset], np.zeros((0, 3)), np.zeros(3))
    assert geometry.room is not None
    return geometry, cameras(half_extent(geometry.room), obstacles(geometry))
