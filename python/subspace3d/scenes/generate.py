"""Render data sets of scenes in which one attribute varies: OUT/<name>_<data set>/scene_<scene>/scene.json.

Each scene is a job that depends on nothing but the settings and its two numbers, so the result does not depend on how
many processes there are, and a run that was cut off continues with the scenes that are missing.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d import settings
from subspace3d.configs import GenerateConfig, Variant
from subspace3d.datasets.scene_format import write_scene
from subspace3d.progress import Progress
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
from subspace3d.training.pool import end_with_parent

MIN_COVERAGE = 0.03  # least share of a view's pixels with a surface
MIN_DEPTH = 0.15  # nearest surface allowed in any view
MIN_DEPTH_ROOM = 0.01  # cameras on a room's boundary see the floor or wall they stand at
_COARSE = 128  # up to this many pixels, coarser meshes look the same
MAX_ATTEMPTS = 50
SCENES_PER_PROCESS = 50  # processes are replaced after so many scenes, which keeps memory flat
# settings that decide what a scene looks like; more data sets or scenes may be added to an existing run
_IDENTITY = (
    "attribute", "preset", "regime", "trajectory", "task", "textures", "pictures", "views", "resolution", "spp", "seed",
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


def run(config: GenerateConfig) -> list[Path]:
    """Render what is missing and return the folders of the data sets; with ``preview``, draw contact sheets instead.

    Raises:
        FileNotFoundError: a folder of textures or pictures that does not exist.
        ValueError: data sets of this name were made with other settings; the variant does not work here; or a folder
            of textures or pictures holds too little.
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
    variant = choose_variant(config.variant)
    config = dataclasses.replace(config, name=name, variant=variant, views=config.scene_views)
    record = config.out / f"config-{name}.yaml"
    settings.check_same(record, config, _IDENTITY, "data sets")
    settings.save(record, config)
    datasets = [config.out / f"{name}_{suffix}" for suffix in _suffixes(config)]
    _remove_leftovers(datasets)
    scenes = [
        (index, scene, folder / f"scene_{scene:04d}")
        for index, folder in enumerate(datasets)
        for scene in range(_count(config, index))
    ]
    missing = [scene for scene in scenes if not (scene[2] / "scene.json").is_file()]
    cores = os.cpu_count() or 1
    # one process drives a GPU better than several
    workers = max(1, min(config.workers or (1 if variant == "cuda" else cores), len(missing)))
    jobs = [Job(folder, index, scene, config, variant, max(1, cores // workers)) for index, scene, folder in missing]
    done = len(scenes) - len(missing)
    try:
        with Progress(f"render {name} ({variant})", len(scenes), "scene", initial=done) as progress:
            _render_all(jobs, workers, progress)
    finally:
        _remove_leftovers(datasets)
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


def _render_all(jobs: list[Job], workers: int, progress: Progress) -> None:
    if workers == 1 and len(jobs) <= SCENES_PER_PROCESS:
        for job in jobs:
            render_scene(job)
            progress.advance()
        return
    wave = SCENES_PER_PROCESS * workers
    for start in range(0, len(jobs), wave):
        _render_wave(jobs[start : start + wave], workers, progress)


def _render_wave(jobs: list[Job], workers: int, progress: Progress) -> None:
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        for future in as_completed([pool.submit(_work, job) for job in jobs]):
            future.result()
            progress.advance()
    except BaseException as error:
        processes = set(multiprocessing.active_children()) - others
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError("a rendering process died (out of memory?); run again to continue") from error
        raise
    pool.shutdown()


_stopped = False  # in a worker: the parent wants no more scenes


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent alone acts on it and terminates its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    # killed outright, the parent can end nobody
    threading.Thread(target=end_with_parent, daemon=True).start()


def _stop(*_: object) -> None:
    global _stopped
    _stopped = True
    raise SystemExit(1)  # through the handlers that remove the unfinished folder; the pool catches it


def _work(job: Job) -> None:
    if _stopped:
        raise SystemExit(1)
    render_scene(job)


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
    images = tone_map(renderer.radiance(config.spp, noise_seed), renderer.exposed())
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
        "variant": job.variant,
        **draft.spec.as_dict(),
    }
    masks = None if draft.counts is None else draft.counts(renderer.points(depths)) & (depths > 0)
    cameras = renderer.intrinsics, renderer.extrinsics
    write_scene(job.folder, images, depths, *cameras, provenance, masks, draft.depth_scale)


def _shows_enough(depths: np.ndarray, nearest: float) -> bool:
    covered = (depths > 0).mean(axis=(1, 2)).min() >= MIN_COVERAGE
    return bool(covered and depths[depths > 0].min() >= nearest)
