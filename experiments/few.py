"""``python -m experiments.few``: 1, 3, 10 and 30 images of each task; cores, biases and LoRA side by side.

Renders what it needs below OUT, mines attribute subspaces from gradients, tunes vggt-nano with ``finetune --few`` on
each number of images, with depth and with the images alone, and measures the results on other scenes of the task and
on generic scenes. What is done is not done again; more seeds can be added. OUT/few.json holds every figure, and
OUT/few.md the means over the seeds.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.jobs import printed_to
from subspace3d import outputs, records
from subspace3d.choices import ATTRIBUTES, TASKS, Method, Task
from subspace3d.cli import execute
from subspace3d.files import atomic_folder, read_json, write_json, write_text
from subspace3d.jobs.pool import run_jobs
from subspace3d.jobs.work import exit_on_failures
from subspace3d.log import logger
from subspace3d.machine import one_thread_each, usable_cores
from subspace3d.progress import Progress
from subspace3d.settings import require
from subspace3d.training.config import TrainConfig

VIEWS = 10  # of every scene
TRAIN_SCENES = 30  # of a task; its test has a fifth of it
_METRICS = ("abs_rel", "rotation_error_deg", "accuracy")
_RANK, _CORE = 4, 16
_GRADIENTS = TrainConfig(frames=(2, 4), images_per_step=8)


def _is_own(path: Path) -> bool:
    try:
        found = read_json(path / "few.json")
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and {"settings", "rows"} <= found.keys()


_RUN = outputs.Kind("a run of experiments.few", True, _is_own)


@dataclass(frozen=True)
class FewExperiment:
    """Tune vggt-nano on a few images of each task and say what was gained and what was forgotten."""

    out: Path = Path("runs/few")
    """Folder of everything that is made."""
    tasks: tuple[Task, ...] = TASKS
    """Tasks."""
    images: tuple[int, ...] = (1, 3, 10, 30)
    """Numbers of images: views of one scene up to 10, of several beyond."""
    methods: tuple[Method, ...] = ("bias", "psv", "subspace", "lora")
    """Methods."""
    teachers: tuple[Literal["depth", "views"], ...] = ("depth", "views")
    """depth: with depth and cameras. views: the images alone; not of one image."""
    seeds: int = 1
    """Runs of each, on other scenes."""
    steps: int = 100
    """Most optimiser steps."""
    spp: int = 16
    """Samples per pixel of the renderings, which are denoised."""
    resolution: int = 112
    """Image width in pixels."""
    workers: int = 0
    """Runs at a time, each in a process of one thread; 0: one per core."""

    def __post_init__(self) -> None:
        most = TRAIN_SCENES // -(-max(self.images, default=1) // VIEWS)
        require(1 <= self.seeds <= most, "seeds", f"1 to {most}, each with scenes of its own", self.seeds)
        require(all(1 <= count <= 30 for count in self.images), "images", "1 to 30", self.images)
        require(self.workers >= 0, "workers", "at least 0", self.workers)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, _RUN)]


@dataclass(frozen=True)
class Job:
    """One run of the experiment; without a method the untuned model is measured."""

    task: Task
    images: int = 0
    teacher: str = ""
    seed: int = 0
    method: Method | None = None

    @property
    def given(self) -> str:
        """Folder of the images it is given."""
        return f"given/{self.task}/{self.seed}/{self.teacher}_{self.images}"

    @property
    def name(self) -> str:
        return f"{self.task}/{self.seed}/{self.teacher}_{self.images}_{self.method}" if self.method else self.task


def jobs(config: FewExperiment) -> list[Job]:
    """Every run, seed by seed, small ones first."""
    return [
        Job(task, images, teacher, seed, method)
        for seed in range(config.seeds)
        for images in sorted(config.images)
        for task in config.tasks
        for teacher in config.teachers
        if teacher == "depth" or images > 1
        for method in config.methods
    ]


def run(config: FewExperiment) -> dict[str, Any]:
    """Render, mine, tune, measure; returns the content of few.json.

    Raises:
        ValueError: OUT was made with other steps, samples or resolution.
        SystemExit: with 1 if some runs failed.
    """
    config = outputs.check(config)
    _check_same(config)
    render(config)
    if "subspace" in config.methods:
        mine_subspaces(config)
    wanted = [*(Job(task) for task in config.tasks), *jobs(config)]
    for job in wanted:
        if job.method:
            give(config, job)
    todo = {job.name: job for job in wanted if not _record(config, job).is_file()}
    with one_thread_each(), Progress("few", len(wanted), "run", initial=len(wanted) - len(todo)) as progress:
        workers = min(config.workers or usable_cores(), max(1, len(todo)))
        failures = run_jobs(list(todo), _set_up, (config, todo), workers, lambda name: progress.advance(note=name))
    rows = [
        {**dataclasses.asdict(job), "test_before": read_json(base), **read_json(_record(config, job))}
        for job in wanted
        if job.method and (base := _record(config, Job(job.task))).is_file() and _record(config, job).is_file()
    ]
    found = {"settings": _settings(config), "rows": rows}
    write_json(config.out / "few.json", found)
    write_text(config.out / "few.md", table(rows))
    logger.info(table(rows))
    logger.info(f"results -> {config.out / 'few.json'}")
    exit_on_failures("few", "runs", failures, len(wanted), config.out)
    return found


def _settings(config: FewExperiment) -> dict[str, Any]:
    return {"steps": config.steps, "spp": config.spp, "resolution": config.resolution}


def _check_same(config: FewExperiment) -> None:
    path = config.out / "few.json"
    if not path.is_file():
        write_json(path, {"settings": _settings(config), "rows": []})
    records.check_same(config.out, read_json(path), {"settings": _settings(config)}, "choose another folder")


def _record(config: FewExperiment, job: Job) -> Path:
    return config.out / "rows" / f"{job.name}.json"


def render(config: FewExperiment) -> None:
    """Scenes of every task, generic ones, and a few data sets of every attribute."""
    from subspace3d.commands import generate

    common = generate.GenerateConfig(
        out=config.out / "scenes", resolution=config.resolution, spp=config.spp, denoise=True, views=VIEWS
    )
    for task in config.tasks:
        generate.run(dataclasses.replace(common, task=task, scenes=TRAIN_SCENES, seed=1))
    generate.run(
        dataclasses.replace(common, attribute="all", preset="generic", name="generic", scenes=4, datasets=1, seed=3)
    )
    for attribute in ATTRIBUTES if "subspace" in config.methods else ():
        out = config.out / "scenes" / "attributes" / attribute
        generate.run(dataclasses.replace(common, out=out, attribute=attribute, datasets=3, scenes=6, views=6, seed=5))


def mine_subspaces(config: FewExperiment) -> None:
    """Subspaces of the attributes' gradients, together as many directions as the cores of the singular vectors have."""
    from subspace3d.commands import adapt, mine

    gradients = config.out / "gradients"
    scenes = config.out / "scenes" / "attributes"
    adapt.run(adapt.AdaptConfig(scenes=scenes, out=gradients, rank=8, gradient_only=True, train=_GRADIENTS))
    for attribute in ATTRIBUTES:
        out = config.out / "subspaces" / f"{attribute}.safetensors"
        mine.run(mine.MineConfig(gradients / attribute, out, k=_CORE // len(ATTRIBUTES), model="shared"))


def give(config: FewExperiment, job: Job) -> None:
    """Write the images of a job as scenes, with all that is known of them or with nothing."""
    from subspace3d.formats.scene import Frame, SceneFile, find_scenes, write_frames

    folder = config.out / job.given
    if folder.is_dir():
        return
    needed = -(-job.images // VIEWS)
    found = find_scenes(config.out / "scenes" / f"{job.task}_train")[job.seed * needed :][:needed]
    left = job.images
    with atomic_folder(folder) as part:
        for path in found:
            file = SceneFile(path)
            count = min(left, VIEWS)
            left -= count
            frames = []
            for index in (i * len(file) // count for i in range(count)):
                known = (*file.camera(index), file.valid_depth(index)) if job.teacher == "depth" else (None, None, None)
                frames.append(Frame(file.image(index), *known))
            write_frames(part / path.name, frames, {"of": str(path)}, unit=file.unit)


def _set_up(shared: tuple[FewExperiment, dict[str, Job]], worker: int) -> Callable[[str], object]:
    import torch

    torch.set_num_threads(1)
    config, named = shared

    def work(name: str) -> None:
        job = named[name]
        log = config.out / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with printed_to(log):
            write_json(_record(config, job), tune_and_measure(config, job) if job.method else _measure(config, job))

    return work


def tune_and_measure(config: FewExperiment, job: Job) -> dict[str, Any]:
    """What `finetune --few` says of itself, and the errors on other scenes of the task afterwards."""
    from subspace3d.commands import finetune

    assert job.method is not None
    out = config.out / "runs" / job.name
    # a run of few images is not continued, so what a start that was cut off left is made again
    shutil.rmtree(out, ignore_errors=True)
    record = finetune.run(
        finetune.FinetuneConfig(
            scenes=config.out / job.given,
            out=out,
            method=job.method,
            few=True,
            generic=config.out / "scenes" / "generic_00",
            subspaces=(config.out / "subspaces",) if job.method == "subspace" else (),
            core_size=_CORE if job.method == "psv" else 0,
            rank=_RANK,
            train=TrainConfig(steps=config.steps, images_per_step=VIEWS, seed=job.seed, device="cpu", threads=1),
        )
    )
    return {
        "few": record["few"],
        "trained": record["trainable"]["total"],
        "test_after": _measure(config, job),
    }


def _measure(config: FewExperiment, job: Job) -> dict[str, float]:
    """Mean errors over the test scenes of the task, of the tuned model or of the plain one."""
    from subspace3d.backbones import build_vggt
    from subspace3d.evaluation.scene import evaluate_scene
    from subspace3d.formats.scene import find_scenes, load_scene
    from subspace3d.training.tuned import load_tuned

    model: Any = load_tuned(config.out / "runs" / job.name) if job.method else build_vggt("vggt-nano")
    model.eval()
    tests = find_scenes(config.out / "scenes" / f"{job.task}_test")
    found = [evaluate_scene(model, load_scene(path, image_size=112)).metrics for path in tests]
    known = {name: [value for metrics in found if (value := metrics[name]) is not None] for name in _METRICS}
    return {name: statistics.fmean(values) for name, values in known.items() if values}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, before -> after."""
    lines = [
        "| task | images | taught by | method | trained | AbsRel, held-out views | AbsRel, other scenes "
        "| rotation, other scenes | loss, generic scenes | seconds | runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["task"], row["images"], row["few"]["teacher"], row["method"], row["trained"])
        alike.setdefault(key, []).append(row)
    for (task, images, teacher, method, trained), group in sorted(alike.items(), key=lambda item: item[0][:3]):

        def few(name: str, digits: int, group: list[dict[str, Any]] = group) -> str:
            return _change([(row["few"]["before"].get(name), row["few"]["after"].get(name)) for row in group], digits)

        def test(name: str, digits: int, group: list[dict[str, Any]] = group) -> str:
            return _change([(row["test_before"].get(name), row["test_after"].get(name)) for row in group], digits)

        seconds = statistics.fmean(row["few"]["seconds"] for row in group)
        cells = [
            task, str(images), teacher, method, f"{trained:,}", few("abs_rel_held_out", 3), test("abs_rel", 3),
            test("rotation_error_deg", 1), few("loss_generic", 2), f"{seconds:.0f}", str(len(group)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _change(pairs: Sequence[tuple[float | None, float | None]], digits: int) -> str:
    known = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not known:
        return "-"
    before, after = (statistics.fmean(values) for values in zip(*known))
    return f"{before:.{digits}f} -> {after:.{digits}f}"


if __name__ == "__main__":
    execute("experiments.few", FewExperiment, run, sys.argv[1:])
