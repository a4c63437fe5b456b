"""The whole method as one resumable run: render, adapt, mine, analyze, fine-tune, evaluate, report.

Every stage is the ``run`` function of a command with its own settings, and each of them skips what it finds
done, so a run that was cut off continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from subspace3d import __version__, outputs, records, settings
from subspace3d.choices import ATTRIBUTES, Attribute, Method
from subspace3d.commands import adapt, analyze, evaluate, finetune, fit, generate, mine, report
from subspace3d.jobs.side_by_side import Call, run_side_by_side
from subspace3d.log import logger
from subspace3d.machine import usable_cores
from subspace3d.progress import format_duration
from subspace3d.tables import read_table
from subspace3d.training.config import TrainConfig

REFERENCE_STEP = 0.65
"""Seconds of `time_step` where the costs of the stages were measured: two cores of an AMD EPYC."""
REFERENCE_CORES = 2


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole method at nano scale: render, adapt, mine, analyze, fine-tune, evaluate, report."""

    out: Path = Path("runs/demo")
    """Run folder; a run that was cut off continues in it."""
    smoke: bool = False
    """The least that still runs every stage, in about a minute; its numbers mean nothing."""
    seed: int = 0
    """Root seed."""

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.DEMO)]


@dataclass(frozen=True)
class Scale:
    """How much of everything a demo run does."""

    attributes: tuple[Attribute, ...]
    datasets: int  # per attribute
    scenes: int  # per data set
    task_scenes: int  # to tune on; a fifth as many to measure on
    views: int
    resolution: int
    spp: int
    adapter_rank: int
    batches: int  # whose gradient is an adapter
    k: int  # per attribute
    rank: int  # of LoRA: on all modules, and on the heads beside cores
    train: TrainConfig


NANO = Scale(
    attributes=ATTRIBUTES,
    datasets=3,
    scenes=6,
    task_scenes=30,
    views=6,
    resolution=112,
    spp=12,
    adapter_rank=8,
    batches=4,
    k=4,
    rank=4,
    train=TrainConfig(steps=90, frames=(2, 4), images_per_step=8, save_every=45, checkpointing=False),
)
SMOKE = Scale(
    attributes=("texture", "camera"),
    datasets=2,
    scenes=2,
    task_scenes=2,
    views=2,
    resolution=56,
    spp=1,
    adapter_rank=2,
    batches=2,
    k=2,
    rank=2,
    train=TrainConfig(
        steps=2,
        frames=(2, 2),
        images_per_step=2,
        image_size=56,
        save_every=2,
        checkpointing=False,
        check_memory=False,
    ),
)
TUNED: tuple[Method, ...] = ("full", "lora", "psv", "subspace")


@dataclass(frozen=True)
class Stage:
    title: str
    work: Callable[[], Any]
    cost: float
    """Seconds on the two cores of the reference machine; of the smoke scale, roughly."""
    parts: int = 1
    """Processes that it keeps busy at most."""

    def expected(self, cores: int, speed: float) -> float:
        """Seconds on ``cores`` cores, each ``speed`` times as fast as the reference's."""
        return self.cost / speed * min(self.parts, REFERENCE_CORES) / min(self.parts, cores)


def _stages(config: DemoConfig, scale: Scale) -> list[Stage]:
    out = config.out
    scenes, subspaces = out / "scenes", out / "subspaces"
    train = replace(scale.train, seed=config.seed)
    rendering = generate.GenerateConfig(
        out=scenes, views=scale.views, resolution=scale.resolution, spp=scale.spp, seed=config.seed
    )

    def render() -> None:
        for attribute in scale.attributes:
            generate.run(
                replace(
                    rendering,
                    out=scenes / "attributes" / attribute,
                    attribute=attribute,
                    datasets=scale.datasets,
                    scenes=scale.scenes,
                )
            )
        generate.run(replace(rendering, task="glass", scenes=scale.task_scenes, seed=config.seed + 1))

    def take_gradients() -> None:
        adapt.run(
            adapt.AdaptConfig(
                scenes=scenes / "attributes",
                out=out / "adapters",
                rank=scale.adapter_rank,
                gradient_only=True,
                gradient_steps=scale.batches,
                workers=usable_cores(),
                train=train,
            )
        )

    def mine_subspaces() -> None:
        for attribute in scale.attributes:
            mine.run(
                mine.MineConfig(
                    adapters=out / "adapters" / attribute,
                    out=subspaces / f"{attribute}.safetensors",
                    k=scale.k,
                    model="shared",
                )
            )
        analyze.run(analyze.AnalyzeConfig(out / "analysis", (subspaces,), adapters=(out / "adapters",)))

    def ask_for_fit() -> None:
        try:
            fit.run(fit.FitConfig(scenes=scenes / "glass_train", subspaces=(subspaces,), out=out / "fit", train=train))
        except SystemExit as answer:  # it does not fit: worth knowing, and no reason to stop
            if answer.code != fit.DOES_NOT_FIT:
                raise

    def tune() -> None:
        core_size = scale.k * len(scale.attributes)
        calls: dict[str, Call] = {
            method: Call(
                finetune.run,
                finetune.FinetuneConfig(
                    scenes=scenes / "glass_train",
                    out=out / "tuned" / method,
                    method=method,
                    subspaces=(subspaces,) if method == "subspace" else (),
                    core_size=core_size if method == "psv" else 0,
                    rank=scale.rank,
                    cache_tokens=out / "tokens",
                    train=train,
                ),
                out / "logs" / f"finetune-{method}.txt",
            )
            for method in TUNED
        }
        run_side_by_side("finetune", calls, out)

    def measure() -> None:
        evaluate.run(
            evaluate.EvaluateConfig(
                scenes=scenes / "glass_test",
                out=out / "evaluation",
                tuned=tuple(out / "tuned" / method for method in TUNED),
                frames=scale.views,
                workers=min(1 + len(TUNED), usable_cores()),
            )
        )

    datasets = len(scale.attributes) * scale.datasets
    rendered = datasets * scale.scenes + scale.task_scenes * 7 // 5
    tuning = f"finetune: {', '.join(TUNED)} on transparent objects, side by side"
    return [
        Stage(f"generate: render {datasets} attribute data sets and the task's scenes", render, 72, rendered),
        Stage(
            f"adapt: the gradient of each data set as an adapter of rank {scale.adapter_rank}",
            take_gradients,
            24,
            datasets,
        ),
        Stage(f"mine, analyze: one rank-{scale.k} subspace per attribute", mine_subspaces, 12),
        Stage("fit: do the subspaces suit the task's scenes?", ask_for_fit, 5),
        Stage(tuning, tune, 98, len(TUNED)),
        Stage("evaluate: base and tuned models on held-out scenes", measure, 51, 1 + len(TUNED)),
        Stage("report", lambda: report.run(report.ReportConfig(run=out)), 3),
    ]


def time_step() -> float:
    """Seconds of a training step of vggt-nano with LoRA on one thread of this machine, the least of a few."""
    import torch

    from subspace3d.adapters.methods import add_lora
    from subspace3d.backbones.vggt import build_vggt

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = add_lora(build_vggt("vggt-nano", weights="random"), NANO.rank, "all")
        images = torch.rand(1, NANO.train.images_per_step, 3, NANO.resolution, NANO.resolution)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            model(images)["depth"].mean().backward()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def seconds_left(stages: Sequence[Stage], done: int, elapsed: float, cores: int, speed: float) -> float:
    """What the stages after the first ``done`` will take.

    Measured costs, scaled by what the stages before have taken of theirs, but never to less: a run that continues
    skips what it finds, and is quick only there.
    """
    expected = [stage.expected(cores, speed) for stage in stages]
    before = sum(expected[:done])
    return sum(expected[done:]) * max(1.0, elapsed / before if before else 1.0)


def run(config: DemoConfig) -> None:
    config = outputs.check(config)
    scale = SMOKE if config.smoke else NANO
    _check_folder(config)
    stages = _stages(config, scale)
    cores = usable_cores()
    # the smoke scale is over before a step is timed
    speed = 1.0 if config.smoke else REFERENCE_STEP / time_step()
    whole = sum(stage.expected(cores, speed) for stage in stages)
    estimate = "about a minute" if config.smoke else f"about {max(1, round(whole / 60))} minutes on this machine"
    logger.info(
        f"demo at {'smoke' if config.smoke else 'nano'} scale in {config.out}, {estimate} ({cores} cores); "
        "interrupt at will, the same command continues it",
    )
    start = time.monotonic()
    took = []
    for number, stage in enumerate(stages):
        elapsed = time.monotonic() - start
        left = (
            ""
            if config.smoke
            else f", about {format_duration(seconds_left(stages, number, elapsed, cores, speed))} left"
        )
        logger.info(f"[{number + 1}/{len(stages)}] {stage.title}  ({format_duration(elapsed)} so far{left})")
        stage.work()
        took.append(f"{stage.title.partition(':')[0]} {format_duration(time.monotonic() - start - elapsed)}")
    if config.smoke:
        logger.info("smoke scale: the numbers only show that every stage ran")
    logger.info(f"open {config.out / 'report' / 'index.html'}; the same live: subspace3d view {config.out}")
    logger.info(f"finished in {format_duration(time.monotonic() - start)}: {', '.join(took)}")


def _check_folder(config: DemoConfig) -> None:
    """A run folder belongs to one scale and one seed: anything else would mix results of two runs."""
    wanted = settings.to_dict(config) | {"version": __version__}
    wanted.pop("out")
    path = config.out / "config.yaml"
    if path.exists():
        stored = read_table(path)
        provenance = stored.get("provenance")
        stored = {**(provenance if isinstance(provenance, dict) else {}), **stored}
        records.check_same(config.out, stored, wanted, "choose another folder")
        return
    settings.save(path, config, version=__version__, command=records.command_line())
