"""Render data sets of scenes in which one attribute varies: OUT/<name>_<data set>/scene_<scene>/scene.json.

Each scene is a job that depends on nothing but the settings and its two numbers, so the result does not depend on how
many processes there are, and a run that was cut off continues with the scenes that are missing.
"""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from subspace3d import outputs, settings
from subspace3d.choices import ATTRIBUTES, Variant
from subspace3d.formats.dataset_targets import DatasetTargets
from subspace3d.jobs.cluster import Cluster, absolute, joined_cluster
from subspace3d.jobs.options import ClusterOptions
from subspace3d.jobs.pool import run_here, run_jobs
from subspace3d.jobs.work import exit_on_failures
from subspace3d.log import logger
from subspace3d.machine import usable_cores
from subspace3d.mitsuba_variant import choose_variant
from subspace3d.progress import Progress
from subspace3d.scenes.config import SceneConfig
from subspace3d.scenes.materials.texture_maps import find_textures
from subspace3d.scenes.preview import draw_sheet
from subspace3d.scenes.scene import SceneJob, render_scene
from subspace3d.scenes.tasks import SPLITS
from subspace3d.scenes.tasks.faces import find_pictures
from subspace3d.settings import require

SCENES_PER_PROCESS = 50  # processes are replaced after so many scenes, which keeps memory flat
# settings that decide what a scene looks like; more data sets or scenes may be added to an existing run
_IDENTITY = (
    "attribute", "preset", "regime", "trajectory", "task", "textures", "pictures", "views", "arc",
    "span", "resolution", "spp", "denoise", "seed",
)  # fmt: skip
_PREVIEW_WIDTH = 160  # pixels of one picture
_PREVIEW_SPP = 64


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SceneConfig, ClusterOptions):
    """Render multi-view scenes in which one attribute varies from scene to scene: OUT/<data set>/<scene>/scene.json."""

    out: Path
    """Folder of the data sets."""
    datasets: int = 1
    """Number of data sets, named <name>_00, <name>_01, ...; a task has its three splits instead."""
    scenes: int = 200
    """Scenes per data set; each test split of a task has a fifth of it."""
    name: str = ""
    """Prefix of the data set names; empty: the attribute or the task."""
    workers: int = 0
    """Processes; 0: one per core."""
    variant: Variant = "auto"
    """Mitsuba variant; auto: the fastest that works on this machine."""
    preview: bool = False
    """Only render a few small scenes per attribute, or per split of the task, and contact sheets below OUT/preview."""
    overwrite: bool = False
    """Replace data sets of this name that were made with other settings, and say which; otherwise they are refused."""

    def __post_init__(self) -> None:
        SceneConfig.__post_init__(self)
        ClusterOptions.__post_init__(self)
        for name in ("datasets", "scenes"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        if self.preview:
            for name, usual in (("views", None), ("resolution", 518), ("spp", 64)):
                value = getattr(self, name)
                # small runs made for a preview are such settings themselves
                require(value == usual or self.name != "", name, "left out with preview, which has its own", value)
        if self.denoise:
            require(self.variant != "scalar", "variant", "llvm, cuda or auto with denoise", self.variant)
        if self.task != "none":
            require(self.datasets == 1, "datasets", "1 with a task, which has splits", self.datasets)

    @property
    def prefix(self) -> str:
        """Of the data set names, resolved."""
        return self.name or (self.attribute if self.task == "none" else self.task)

    def lock(self) -> tuple[Path, str]:
        """Data sets of different names may be made in one folder at a time."""
        return self.out, Path(self.prefix).name

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(textures=self.textures, pictures=self.pictures)

    def writes(self) -> list[outputs.Output]:
        folder = outputs.Output("out", self.out, outputs.FOLDER)
        if not self.preview:
            return [folder, *self.targets.declared()]
        small = previews(self)
        sheets = [outputs.Output("out", _sheet(each), outputs.SHEET) for each in small]
        return [folder, *sheets, *(output for each in small for output in each.targets.declared())]

    @property
    def targets(self) -> DatasetTargets:
        """Where the scenes go."""
        return DatasetTargets(self.out, self.prefix, tuple(f"_{suffix}" for suffix in _suffixes(self)))

    def replace_others(self) -> None:
        """Delete the data sets of this name that other settings made, if that is asked for."""
        self.targets.claim(self.reads())
        if self.overwrite:
            self.targets.replace_differing(self, _IDENTITY, "generate --overwrite")


@dataclass(frozen=True)
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
    config = outputs.check(config)
    if not config.preview:
        folders = _run(config)
        logger.info(f"next: subspace3d validate {shlex.quote(str(config.out))}")
        return folders
    folders = []
    for small in previews(config):
        sheet = outputs.claim(_sheet(small), outputs.SHEET, "out")
        rendered = _run(small)
        draw_sheet(sheet, small.name, rendered)
        logger.info(f"contact sheet: {sheet}")
        folders += rendered
    return folders


def _run(config: GenerateConfig) -> list[Path]:
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
        config = dataclasses.replace(config, name=config.prefix, variant=variant, views=config.scene_views)
        return _render_missing(config, cluster)


def _render_missing(config: GenerateConfig, cluster: Cluster | None) -> list[Path]:
    name, variant = config.name, config.variant
    config.replace_others()
    config.targets.check_same(config, _IDENTITY, "data sets")
    settings.save(config.targets.record, config)
    datasets = [config.out / f"{name}_{suffix}" for suffix in _suffixes(config)]
    config.targets.remove_empty()
    scenes = [
        f"{folder.name}/scene_{scene:04d}"
        for index, folder in enumerate(datasets)
        for scene in range(_count(config, index))
    ]
    missing = [scene for scene in scenes if not (config.out / scene / "scene.json").is_file()]
    cores = usable_cores()
    # one process drives a GPU better than several
    workers = max(1, min(config.workers or (1 if variant == "cuda" else cores), len(missing)))
    rendering = _Rendering(config, max(1, cores // workers) if cluster is None else cluster.cpus)
    done = len(scenes) - len(missing)
    try:
        with Progress(f"render {name} ({variant})", len(scenes), "scene", initial=done) as progress:
            failures = _render_all(missing, rendering, workers, cluster, lambda scene: progress.advance())
    finally:
        config.targets.remove_empty()
    exit_on_failures("generate", "scenes", failures, len(scenes), config.out)
    logger.info(f"{len(scenes)} scenes of {config.views} views in {config.out}/{name}_*")
    return datasets


def _suffixes(config: GenerateConfig) -> list[str]:
    return list(SPLITS) if config.task != "none" else [f"{index:02d}" for index in range(config.datasets)]


def _count(config: GenerateConfig, dataset: int) -> int:
    """Scenes of a data set; the test splits of a task have a fifth of the training split's, but for a preview."""
    test = config.task != "none" and dataset > 0 and not config.preview
    return max(1, config.scenes // 5) if test else config.scenes


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
        render_scene(SceneJob(folder, dataset, scene, config, config.variant, rendering.threads))

    return work


def _sheet(small: GenerateConfig) -> Path:
    """Where the contact sheet of a preview goes."""
    return small.out / f"{small.name}.jpg"


def previews(config: GenerateConfig) -> list[GenerateConfig]:
    """One small run per attribute, or one for the task, with the settings of ``config`` otherwise."""
    small = partial(dataclasses.replace, config, resolution=_PREVIEW_WIDTH, spp=_PREVIEW_SPP)
    out = config.out / "preview"
    if config.task != "none":
        views = 2 if config.task == "faces" else 3
        return [small(out=out, name=config.task, scenes=3, views=views)]
    out /= f"{config.preset}-{config.regime}-{config.trajectory}"
    return [
        small(out=out, name=attribute, attribute=attribute, datasets=3, scenes=4, views=2) for attribute in ATTRIBUTES
    ]
