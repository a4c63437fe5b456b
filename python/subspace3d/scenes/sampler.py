"""One sampler, four independent random streams: texture, geometry, camera, lighting.

In a data set the seed of the varied attribute changes from scene to scene and the other three stay; from data set to
data set all four change. Each stream is consumed by its own attribute alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from subspace3d.configs import ATTRIBUTES
from subspace3d.scenes.cameras import CameraSpec, draw_cameras
from subspace3d.scenes.geometry import GeometrySpec, draw_geometry
from subspace3d.scenes.lights import LightingSpec, draw_lighting
from subspace3d.scenes.materials import TextureSpec, draw_texture

PRESETS = ("paper", "generic")
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
    geometry: GeometrySpec
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


def sample_scene(seeds: Seeds, preset: str, views: int, attribute: str = "all") -> SceneSpec:
    """Draw a scene; equal seeds of an attribute give an equal part of the result.

    Args:
        seeds (Seeds): one seed per attribute.
        preset (str): paper (extreme ranges, objects only) or generic (milder; objects on a ground).
        views (int): number of cameras.
        attribute (str): what varies in the data set; camera and lighting take their wide ranges only then.

    Raises:
        ValueError: an unknown preset or attribute, or ``views`` below 1.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {list(PRESETS)}, got {preset!r}")
    if attribute not in _CHOICES:
        raise ValueError(f"attribute must be one of {list(_CHOICES)}, got {attribute!r}")
    if views < 1:
        raise ValueError(f"views must be at least 1, got {views}")
    return SceneSpec(
        draw_texture(seeds.texture, preset),
        draw_geometry(np.random.default_rng(seeds.geometry), preset),
        draw_cameras(np.random.default_rng(seeds.camera), preset, views, attribute in ("camera", "all")),
        draw_lighting(np.random.default_rng(seeds.lighting), preset, attribute in ("lighting", "all")),
    )
