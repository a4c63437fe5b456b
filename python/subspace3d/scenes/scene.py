"""Draw, render and write one scene; it depends on nothing but the settings and its two numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.choices import Variant
from subspace3d.formats.scene import write_scene
from subspace3d.mitsuba_variant import set_threads
from subspace3d.scenes.config import SceneConfig
from subspace3d.scenes.denoise import denoise
from subspace3d.scenes.draft import Draft
from subspace3d.scenes.geometry.shapes import build_mesh
from subspace3d.scenes.lights import place_in_room
from subspace3d.scenes.materials.texture_maps import find_textures
from subspace3d.scenes.render import SceneRenderer, tone_map
from subspace3d.scenes.sampler import Seeds, sample_scene, scene_seeds
from subspace3d.scenes.tasks import SPLITS, draw_task

MIN_COVERAGE = 0.03  # least share of a view's pixels with a surface
MIN_DEPTH = 0.15  # nearest surface allowed in any view
MIN_DEPTH_ROOM = 0.01  # cameras on a room's boundary see the floor or wall they stand at
_COARSE = 128  # up to this many pixels, coarser meshes look the same
MAX_ATTEMPTS = 50


@dataclasses.dataclass(frozen=True)
class SceneJob:
    """One scene to render."""

    folder: Path
    dataset: int
    scene: int
    config: SceneConfig
    variant: Variant
    threads: int  # CPU threads of the renderer


def _draw(job: SceneJob, attempt: int) -> tuple[Seeds, Draft]:
    config = job.config
    detail = 1 if config.resolution <= _COARSE else 2
    if config.task != "none":
        seeds = scene_seeds(config.seed, job.dataset, job.scene, "all", attempt)
        return seeds, draw_task(config, seeds, SPLITS[job.dataset], job.scene, detail)
    seeds = scene_seeds(config.seed, job.dataset, job.scene, config.attribute, attempt)
    spec = sample_scene(
        seeds,
        config.preset,
        config.scene_views,
        config.attribute,
        regime=config.regime,
        trajectory=config.trajectory,
        dataset=job.dataset,
        library=[material.name for material in find_textures(config.textures)] if config.textures else [],
        span=config.span,
    )
    meshes = build_mesh(spec.geometry, detail, spec.texture.glass_slabs, spec.lighting.shining)
    return seeds, Draft(spec, meshes, nearest=MIN_DEPTH_ROOM if config.regime == "room" else MIN_DEPTH)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A scene that is drawn and ready for path tracing.

    Attributes:
        seeds: one per attribute.
        draft: what was drawn.
        renderer: of its views.
        depths: ``[S, H, W]``.
        attempt: number of draws that were rejected before.
    """

    seeds: Seeds
    draft: Draft
    renderer: SceneRenderer
    depths: np.ndarray
    attempt: int

    @property
    def noise_seed(self) -> int:
        """Of the path tracer."""
        return sum(dataclasses.astuple(self.seeds)) % 2**32


def prepare_scene(job: SceneJob) -> Prepared:
    """Draw a scene.

    A draw in which any view shows a surface in less than 3 % of its pixels, or one too near, is rejected and drawn
    again with the next ``attempt`` of `scene_seeds`.

    Raises:
        RuntimeError: no draw shows enough.
    """
    config = job.config
    set_threads(job.variant, job.threads)
    for attempt in range(MAX_ATTEMPTS):
        seeds, draft = _draw(job, attempt)
        room = draft.spec.geometry.room
        lighting = draft.spec.lighting if room is None else place_in_room(draft.spec.lighting, room)
        renderer = SceneRenderer(
            dataclasses.replace(draft.spec, lighting=lighting),
            draft.meshes,
            config.resolution,
            job.variant,
            config.textures,
            draft.pictures,
        )
        depths = renderer.depths()
        if _shows_enough(depths, draft.nearest):
            return Prepared(seeds, draft, renderer, depths, attempt)
    raise RuntimeError(
        f"scene {job.scene} of data set {job.dataset} (attribute {config.attribute}, seed {config.seed}): "
        f"no draw of {MAX_ATTEMPTS} shows enough in every view"
    )


def render_scene(job: SceneJob) -> None:
    """Draw, render and write one scene, see `prepare_scene`."""
    config, prepared = job.config, prepare_scene(job)
    seeds, draft, renderer, depths = prepared.seeds, prepared.draft, prepared.renderer, prepared.depths
    radiance = renderer.radiance(config.spp, prepared.noise_seed)
    if config.denoise:
        radiance = denoise(radiance, *renderer.albedo_and_normals())
    images = tone_map(radiance, renderer.exposed())
    how = {key: getattr(config, key) for key in ("attribute", "preset", "regime", "trajectory")}
    if config.task != "none":
        how = {"task": config.task, "split": SPLITS[job.dataset]}
    provenance: dict[str, Any] = {
        "seeds": dataclasses.asdict(seeds),
        **how,
        "root_seed": config.seed,
        "dataset": job.dataset,
        "scene": job.scene,
        "attempt": prepared.attempt,
        "spp": config.spp,
        "denoise": config.denoise,
        "variant": job.variant,
        **draft.spec.as_dict(),
    }
    masks = None if draft.counts is None else draft.counts(renderer.points(depths)) & (depths > 0)
    cameras = renderer.intrinsics, renderer.extrinsics
    write_scene(job.folder, images, depths, *cameras, provenance, masks, draft.depth_scale)


def _shows_enough(depths: np.ndarray, nearest: float) -> bool:
    covered = (depths > 0).mean(axis=(1, 2)).min() >= MIN_COVERAGE
    return bool(covered and depths[depths > 0].min() >= nearest)
