"""The whole method as one resumable run: render, adapt, mine, analyze, fine-tune, evaluate, report.

Every stage is the ``run`` function of a command with its own settings, and each of them skips what it finds
done, so a run that was cut off continues where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from subspace3d import __version__, outputs, records, settings
from subspace3d.choices import ATTRIBUTES, Attribute, Method
from subspace3d.commands import adapt, analyze, evaluate, finetune, generate, mine, report
from subspace3d.log import logger
from subspace3d.progress import format_duration
from subspace3d.training.config import TrainConfig
from subspace3d.training.rates import usual_rate


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
    rank: int  # of the adapters that are mined
    k: int  # per attribute
    adapt: TrainConfig
    tune: TrainConfig
    minutes: float  # measured on two cores


NANO = Scale(
    attributes=ATTRIBUTES,
    datasets=3,
    scenes=8,
    task_scenes=30,
    views=6,
    resolution=112,
    spp=16,
    rank=4,
    k=4,
    adapt=TrainConfig(steps=28, lr=2e-3, frames=(2, 4), images_per_step=8, save_every=28, checkpointing=False),
    tune=TrainConfig(steps=90, lr=1e-3, frames=(2, 4), images_per_step=8, save_every=45, checkpointing=False),
    minutes=8,
)
_SMOKE_TRAIN = TrainConfig(
    steps=2,
    lr=1e-3,
    frames=(2, 2),
    images_per_step=2,
    image_size=56,
    save_every=2,
    checkpointing=False,
    check_memory=False,
)
SMOKE = Scale(
    attributes=("texture", "camera"),
    datasets=2,
    scenes=2,
    task_scenes=2,
    views=2,
    resolution=56,
    spp=1,
    rank=2,
    k=2,
    adapt=_SMOKE_TRAIN,
    tune=_SMOKE_TRAIN,
    minutes=1,
)
TUNED: tuple[Method, ...] = ("full", "lora", "subspace")


@dataclass(frozen=True)
class Stage:
    title: str
    share: float  # of the whole run's time, measured
    work: Callable[[], Any]


def _stages(config: DemoConfig, scale: Scale) -> list[Stage]:
    out = config.out
    scenes, subspaces = out / "scenes", out / "subspaces"
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

    def tune_adapters() -> None:
        train = replace(scale.adapt, seed=config.seed)
        adapt.run(adapt.AdaptConfig(scenes=scenes / "attributes", out=out / "adapters", rank=scale.rank, train=train))

    def mine_subspaces() -> None:
        for attribute in scale.attributes:
            mine.run(
                mine.MineConfig(
                    adapters=out / "adapters" / attribute, out=subspaces / f"{attribute}.safetensors", k=scale.k
                )
            )
        analyze.run(analyze.AnalyzeConfig(out / "analysis", (subspaces,), adapters=(out / "adapters",)))

    def finetune_with(method: Method) -> Callable[[], None]:
        def work() -> None:
            finetune.run(
                finetune.FinetuneConfig(
                    scenes=scenes / "glass_train",
                    out=out / "tuned" / method,
                    method=method,
                    subspaces=(subspaces,) if method == "subspace" else (),
                    rank=scale.rank,
                    train=replace(scale.tune, lr=usual_rate("vggt-nano", method), seed=config.seed),
                )
            )

        return work

    def measure() -> None:
        evaluate.run(
            evaluate.EvaluateConfig(
                scenes=scenes / "glass_test",
                out=out / "evaluation",
                tuned=tuple(out / "tuned" / method for method in TUNED),
                frames=scale.views,
            )
        )

    datasets = len(scale.attributes) * scale.datasets
    return [
        Stage(f"generate: render {datasets} attribute data sets and the task's scenes", 0.2, render),
        Stage(f"adapt: tune {datasets} LoRA adapters of rank {scale.rank}", 0.4, tune_adapters),
        Stage(f"mine, analyze: one rank-{scale.k} subspace per attribute", 0.02, mine_subspaces),
        *(Stage(f"finetune: {method} on transparent objects", 0.1, finetune_with(method)) for method in TUNED),
        Stage("evaluate: base and tuned models on held-out scenes", 0.07, measure),
        Stage("report", 0.01, lambda: report.run(report.ReportConfig(run=out))),
    ]


def run(config: DemoConfig) -> None:
    config = outputs.check(config)
    scale = SMOKE if config.smoke else NANO
    _check_folder(config)
    stages = _stages(config, scale)
    logger.info(
        f"demo at {'smoke' if config.smoke else 'nano'} scale in {config.out}, about {scale.minutes:g} minutes on two "
        "cores; interrupt at will, the same command continues it",
    )
    start = time.monotonic()
    done = 0.0
    for number, stage in enumerate(stages, 1):
        elapsed = time.monotonic() - start
        expected = scale.minutes * 60 * (1 - done)
        # a continued run skips what is done, so its own pace counts only where it is slower than the measured one
        left = format_duration(max(expected, elapsed / done * (1 - done)) if done else expected)
        logger.info(
            f"[{number}/{len(stages)}] {stage.title}  ({format_duration(elapsed)} so far, about {left} left)",
        )
        stage.work()
        done += stage.share
    if config.smoke:
        logger.info("smoke scale: the numbers only show that every stage ran")
    logger.info(f"open {config.out / 'report' / 'index.html'}; the same live: subspace3d view {config.out}")
    logger.info(f"finished in {format_duration(time.monotonic() - start)}")


def _check_folder(config: DemoConfig) -> None:
    """A run folder belongs to one scale and one seed: anything else would mix results of two runs."""
    wanted = settings.to_dict(config) | {"version": __version__}
    wanted.pop("out")
    path = config.out / "config.yaml"
    if path.exists():
        stored = settings.read_table(path)
        provenance = stored.get("provenance")
        stored = {**(provenance if isinstance(provenance, dict) else {}), **stored}
        records.check_same(config.out, stored, wanted, "choose another folder")
        return
    settings.save(path, config, version=__version__, command=records.command_line())
