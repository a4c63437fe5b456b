"""``python -m experiments.few``: 1, 3, 10 and 30 images of each task; cores, biases and LoRA side by side.

Renders what it needs below OUT, tunes vggt-nano with ``finetune --few`` on each number of images, with depth and with
the images alone, and measures the results on other scenes of the task and on generic scenes. What is done is not done
again. OUT/few.json holds every figure, OUT/few.md the table.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from subspace3d import outputs
from subspace3d.choices import TASKS, Method, Task
from subspace3d.cli import execute
from subspace3d.files import write_json
from subspace3d.log import logger
from subspace3d.settings import require

VIEWS = 10  # of every scene
_METRICS = ("abs_rel", "rotation_error_deg", "accuracy")
_RANK, _CORE = 4, 16


@dataclass(frozen=True)
class FewExperiment:
    """Tune vggt-nano on a few images of each task and say what was gained and what was forgotten."""

    out: Path
    """Folder of everything that is made."""
    tasks: tuple[Task, ...] = TASKS
    """Tasks."""
    images: tuple[int, ...] = (1, 3, 10, 30)
    """Numbers of images: views of one scene up to 10, of several beyond."""
    methods: tuple[Method, ...] = ("bias", "psv", "lora")
    """Methods; subspace needs --subspaces."""
    subspaces: tuple[Path, ...] = ()
    """Mined subspaces for the method subspace."""
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

    def __post_init__(self) -> None:
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        require(all(1 <= count <= 30 for count in self.images), "images", "1 to 30", self.images)

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(subspaces=self.subspaces)

    def writes(self) -> list[outputs.Output]:
        return []


@dataclass(frozen=True)
class Job:
    """One run of the experiment."""

    task: Task
    images: int
    teacher: str
    seed: int
    method: Method

    @property
    def given(self) -> str:
        """Folder of the images it is given."""
        return f"given/{self.task}/{self.seed}/{self.teacher}_{self.images}"

    @property
    def name(self) -> str:
        return f"{self.task}/{self.seed}/{self.teacher}_{self.images}_{self.method}"


def jobs(config: FewExperiment) -> Iterator[Job]:
    """Every run, small ones first."""
    for images in sorted(config.images):
        for task in config.tasks:
            for teacher in config.teachers:
                if teacher == "views" and images < 2:
                    continue
                for seed in range(config.seeds):
                    for method in config.methods:
                        yield Job(task, images, teacher, seed, method)


def run(config: FewExperiment) -> dict[str, Any]:
    """Render, tune, measure; returns the content of few.json."""
    render(config)
    rows = []
    for job in jobs(config):
        give(config, job)
        rows.append({**dataclasses.asdict(job), **tune_and_measure(config, job)})
        write_json(config.out / "few.json", {"settings": _plain(config), "rows": rows})
        (config.out / "few.md").write_text(table(rows), encoding="utf-8")
    logger.info(table(rows))
    logger.info(f"results -> {config.out / 'few.json'}")
    return {"settings": _plain(config), "rows": rows}


def _plain(config: FewExperiment) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {**values, "out": str(config.out), "subspaces": [str(path) for path in config.subspaces]}


def render(config: FewExperiment) -> None:
    """Scenes of every task and generic ones."""
    from subspace3d.commands import generate

    common = generate.GenerateConfig(
        out=config.out / "scenes", resolution=config.resolution, spp=config.spp, denoise=True, views=VIEWS
    )
    scenes = max(5, config.seeds * -(-max(config.images) // VIEWS))
    for task in config.tasks:
        generate.run(dataclasses.replace(common, task=task, scenes=scenes, seed=1))
    generate.run(
        dataclasses.replace(common, attribute="all", preset="generic", name="generic", scenes=4, datasets=1, seed=3)
    )


def give(config: FewExperiment, job: Job) -> None:
    """Write the images of a job as scenes, with all that is known of them or with nothing."""
    from subspace3d.formats.scene import Frame, SceneFile, find_scenes, write_frames

    folder = config.out / job.given
    if folder.is_dir():
        return
    needed = -(-job.images // VIEWS)
    found = find_scenes(config.out / "scenes" / f"{job.task}_train")[job.seed * needed :][:needed]
    left = job.images
    for path in found:
        file = SceneFile(path)
        count = min(left, VIEWS)
        left -= count
        frames = []
        for index in (i * len(file) // count for i in range(count)):
            known = (*file.camera(index), file.valid_depth(index)) if job.teacher == "depth" else (None, None, None)
            frames.append(Frame(file.image(index), *known))
        write_frames(folder / path.name, frames, {"of": str(path)}, unit=file.unit)


def tune_and_measure(config: FewExperiment, job: Job) -> dict[str, Any]:
    """What `finetune --few` says of itself, and the errors on other scenes of the task before and after."""
    from subspace3d.backbones import build_vggt
    from subspace3d.commands import finetune
    from subspace3d.training.config import TrainConfig
    from subspace3d.training.tuned import load_tuned

    logger.info(f"--- {job.name}")
    out = config.out / "runs" / job.name
    record = finetune.run(
        finetune.FinetuneConfig(
            scenes=config.out / job.given,
            out=out,
            method=job.method,
            few=True,
            generic=config.out / "scenes" / "generic_00",
            subspaces=config.subspaces if job.method == "subspace" else (),
            core_size=_CORE if job.method == "psv" else 0,
            rank=_RANK,
            train=TrainConfig(steps=config.steps, images_per_step=VIEWS, seed=job.seed),
        )
    )
    tests = config.out / "scenes" / f"{job.task}_test"
    return {
        "few": record["few"],
        "trained": record["trainable"]["total"],
        "test_before": _test_errors(build_vggt("vggt-nano"), tests),
        "test_after": _test_errors(load_tuned(out), tests),
    }


def _test_errors(model: Any, folder: Path) -> dict[str, float]:
    from subspace3d.evaluation.scene import evaluate_scene
    from subspace3d.formats.scene import find_scenes, load_scene

    model.eval()
    found = [evaluate_scene(model, load_scene(path, image_size=112)).metrics for path in find_scenes(folder)]
    means = {}
    for name in _METRICS:
        values = [value for metrics in found if (value := metrics[name]) is not None]
        means[name] = sum(values) / len(values)
    return means


def table(rows: list[dict[str, Any]]) -> str:
    """One line a run, before -> after."""
    lines = [
        "| task | images | taught by | method | trained | held-out loss | AbsRel, held out | AbsRel, other scenes "
        "| rotation deg, other scenes | loss, generic | steps kept | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        few, before, after = row["few"], row["test_before"], row["test_after"]

        def pair(name: str, few: dict[str, Any] = few) -> str:
            if name not in few["before"]:
                return "-"
            return f"{few['before'][name]:.3f} -> {few['after'][name]:.3f}"

        cells = [
            row["task"], str(row["images"]), few["teacher"], row["method"], f"{row['trained']:,}",
            pair("loss_held_out"), pair("abs_rel_held_out"),
            f"{before['abs_rel']:.3f} -> {after['abs_rel']:.3f}",
            f"{before['rotation_error_deg']:.1f} -> {after['rotation_error_deg']:.1f}",
            pair("loss_generic"), f"{few['best_step']} of {few['steps']}", f"{few['seconds']:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    execute("experiments.few", FewExperiment, run, sys.argv[1:])
