"""Render data sets of scenes in which one attribute varies: OUT/<name>_<data set>/scene_<scene>/scene.json.

Each scene is a job that depends on nothing but the settings and its two numbers, so the result does not depend on how
many processes there are, and a run that was cut off continues with the scenes that are missing.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d import settings
from subspace3d.configs import GenerateConfig, Variant
from subspace3d.datasets.scene_format import write_scene
from subspace3d.progress import Progress
from subspace3d.scenes.denoise import denoise
from subspace3d.scenes.draft import Draft
from subspace3d.scenes.lights import place_in_room
from subspace3d.scenes.preview import draw_sheet, previews
from subspace3d.scenes.render import SceneRenderer, tone_map
from subspace3d.scenes.sampler import Seeds, sample_scene, scene_seeds
from subspace3d.scenes.shapes import build_mesh
from subspace3d.scenes.tasks import SPLITS, draw_task
from subspace3d.scenes.tasks.faces import find_pictures
from subspace3d.scenes.texture_maps import find_textures
from subspace3d.scenes.variant import choose_variant, set_threads
from subspace3d.training.cluster import Cluster, absolute, joined_cluster
from subspace3d.training.pool import exit_on_failures, run_here, run_jobs

MIN_COVERAGE = 0.03  # least share of a view's pixels with a surface
MIN_DEPTH = 0.15  # nearest surface allowed in any view
MIN_DEPTH_ROOM = 0.01  # cameras on a room's boundary see the floor or wall they stand at
_COARSE = 128  # up to this many pixels, coarser meshes look the same
MAX_ATTEMPTS = 50
SCENES_PER_PROCESS = 50  # processes are replaced after so many scenes, which keeps memory flat
# settings that decide what a scene looks like; more data sets or scenes may be added to an existing run
_IDENTITY = (
    "attribute", "preset", "regime", "trajectory", "task", "textures", "pictures", "views", "arc",
    "span", "resolution", "spp", "denoise", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One scene to render."""

    folder: Path
    dataset: int
    scene: int
    config: GenerateConfig
    variant: Variant
    threads: int  # CPU threads of the renderer


@dataclasses.dataclass(frozen=True)
class _Rendering:
    """What the jobs of one call share."""

    config: GenerateConfig
    threads: int


def run(config: GenerateConfig) -> list[Path]:
    """Render what is missing and return the folders of the data sets; with ``preview``, draw contact sheets instead.

    Raises:
        FileNotFoundError: a folder of textures or pictures that does not exist.
        ValueError: data sets of this name were made with other settings; the variant does not work here; or a folder
            of textures or pictures holds too little.
        SystemExit: with 1 if some scenes could not be rendered; the others stand.
    """
    if config.validate is not None or config.from_ is not None:
        from subspace3d.datasets.existing import run as run_on_existing

        return run_on_existing(config)
    if not config.preview:
        return _run(config)
    folders = []
    for small in previews(config):
        rendered = _run(small)
        sheet = small.out / f"{small.name}.jpg"
        draw_sheet(sheet, small.name, rendered)
        print(f"contact sheet: {sheet}")
        folders += rendered
    return folders


def _run(config: GenerateConfig) -> list[Path]:
    name = config.name or (config.attribute if config.task == "none" else config.task)
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"name must be a plain folder name, got {name!r}")
    if config.textures is not None:
        find_textures(config.textures)
    if config.pictures is not None:
        find_pictures(config.pictures)
    if config.denoise:
        importlib.import_module("pyoidn")  # rather now than at every scene
    if config.ray:
        config = absolute(config, "out", "textures", "pictures")
    with joined_cluster(config, on_cpu=config.variant in ("llvm", "scalar")) as cluster:
        if cluster is None:
            variant = choose_variant(config.variant)
        else:
            # one variant for all scenes, whatever machine renders them; a job may see a GPU it has not asked for
            variant = cluster.call(choose_variant, config.variant, cluster.gpus > 0)
        if config.denoise and variant == "scalar":
            raise ValueError("variant must be llvm or cuda with denoise, got 'scalar'")
        config = dataclasses.replace(config, name=name, variant=variant, views=config.scene_views)
        return _render_missing(config, cluster)


def _render_missing(config: GenerateConfig, cluster: Cluster | None) -> list[Path]:
    name, variant = config.name, config.variant
    record = config.out / f"config-{name}.yaml"
    settings.check_same(record, config, _IDENTITY, "data sets")
    settings.save(record, config)
    datasets = [config.out / f"{name}_{suffix}" for suffix in _suffixes(config)]
    _remove_leftovers(datasets)
    scenes = [
        f"{folder.name}/scene_{scene:04d}"
        for index, folder in enumerate(datasets)
        for scene in range(_count(config, index))
    ]
    missing = [scene for scene in scenes if not (config.out / scene / "scene.json").is_file()]
    cores = os.cpu_count() or 1
    # one process drives a GPU better than several
    workers = max(1, min(config.workers or (1 if variant == "cuda" else cores), len(missing)))
    rendering = _Rendering(config, max(1, cores // workers) if cluster is None else cluster.cpus)
    done = len(scenes) - len(missing)
    try:
        with Progress(f"render {name} ({variant})", len(scenes), "scene", initial=done) as progress:
            failures = _render_all(missing, rendering, workers, cluster, lambda scene: progress.advance())
    finally:
        _remove_leftovers(datasets)
    exit_on_failures("generate", "scenes", failures, len(scenes), config.out)
    print(f"{len(scenes)} scenes of {config.views} views in {config.out}/{name}_*")
    return datasets


def _suffixes(config: GenerateConfig) -> list[str]:
    return list(SPLITS) if config.task != "none" else [f"{index:02d}" for index in range(config.datasets)]


def _count(config: GenerateConfig, dataset: int) -> int:
    """Scenes of a data set; the test splits of a task have a fifth of the training split's, but for a preview."""
    test = config.task != "none" and dataset > 0 and not config.preview
    return max(1, config.scenes // 5) if test else config.scenes


def _remove_leftovers(datasets: list[Path]) -> None:
    """Remove unfinished scene folders, which a process that was killed could not remove itself."""
    for folder in datasets:
        for path in folder.glob(".scene_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _render_all(
    missing: list[str], rendering: _Rendering, workers: int, cluster: Cluster | None, done: Callable[[str], object]
) -> dict[str, str]:
    if cluster is None and workers == 1 and len(missing) <= SCENES_PER_PROCESS:
        return run_here(missing, _set_up, rendering, done)
    return run_jobs(missing, _set_up, rendering, workers, done, SCENES_PER_PROCESS, cluster)


def _set_up(rendering: _Rendering, worker: int) -> Callable[[str], object]:
    """The function that renders one scene of a process's share."""
    config = rendering.config

    def work(name: str) -> None:
        folder = config.out / name
        if (folder / "scene.json").is_file():
            return  # by a process that died before it could say so
        suffix = folder.parent.name.removeprefix(f"{config.name}_")
        dataset, scene = _suffixes(config).index(suffix), int(folder.name.removeprefix("scene_"))
        render_scene(Job(folder, dataset, scene, config, config.variant, rendering.threads))

    return work


def _draw(job: Job, attempt: int) -> tuple[Seeds, Draft]:
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


def render_scene(job: Job) -> None:
    """Draw, render and write one scene.

    A draw in which any view shows a surface in less than 3 % of its pixels, or one too near, is rejected and drawn
    again with the next ``attempt`` of `scene_seeds`.
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
            break
    else:
        raise RuntimeError(
            f"scene {job.scene} of data set {job.dataset} (attribute {config.attribute}, seed {config.seed}): "
            f"no draw of {MAX_ATTEMPTS} shows enough in every view"
        )
    noise_seed = sum(dataclasses.astuple(seeds)) % 2**32
    radiance = renderer.radiance(config.spp, noise_seed)
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
        "attempt": attempt,
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
