"""One stock PEFT LoRA for every data set below a folder."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subspace3d import outputs, settings
from subspace3d.jobs.options import ClusterOptions
from subspace3d.log import logger
from subspace3d.settings import require
from subspace3d.training.config import TrainConfig, cache_target, check_cache
from subspace3d.training.rates import usual_rate

# settings of a training that a gradient at the base weights does not depend on
_OPTIMISER = ("steps", "lr", "weight_decay", "warmup", "clip_norm")


@dataclass(frozen=True)
class AdaptConfig(ClusterOptions):
    """Tune one stock PEFT LoRA per data set found below SCENES; OUT/<data set> is a PEFT adapter folder."""

    scenes: Path
    """Folder with data sets anywhere below it (a data set is a folder of scenes)."""
    out: Path
    """Adapters are written below it at the same relative paths."""
    backbone: str = "vggt-nano"
    """A preset (doctor lists them), or package.module:factory."""
    weights: Path | None = None
    """File of weights, random, or hub (published, downloaded); none: those shipped with the package (nano only)."""
    licence: str = ""
    """Of the weights, written beside what is made of them; none: as the file, its model card or the backbone says."""
    rank: int = 16
    """LoRA rank r; lora_alpha is 2 r."""
    targets: str = "all"
    """Target preset of the backbone (cores, heads, all), or an expression that full module names match."""
    gradient_steps: int = 0
    """lora_A starts at the leading directions of the loss's gradient over this many steps; 0: at random, as LoRA."""
    gradient_only: bool = False
    """Tune nothing: an adapter is the rank-r part of the loss's negative gradient in gradient-steps batches (0: 4)."""
    gradient_gigabytes: float = 4.0
    """gradient-only: most host memory for gradients, in 1e9 bytes; less takes more passes over the same batches."""
    workers: int = 0
    """Adapters tuned at a time, each in a process of its own; 0: one per GPU, on the CPU one."""
    together: int = 1
    """Adapters each process trains at a time on one forward pass of the backbone: the same adapters, up to rounding."""
    cache_tokens: Path | None = None
    """Folder for the frozen image encoder's tokens: each image is encoded once. Not with augmentation."""
    cache_gigabytes: float = 20.0
    """Most that is kept there, in 1e9 bytes."""
    overwrite: bool = False
    """Replace adapters in OUT that were made with other settings, and say which; otherwise they are refused."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(self.gradient_steps >= 0, "gradient_steps", "at least 0", self.gradient_steps)
        require(self.gradient_gigabytes > 0, "gradient_gigabytes", "positive", self.gradient_gigabytes)
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        require(self.together >= 1, "together", "at least 1", self.together)
        if self.together > 1:
            require(not self.gradient_only, "together", "1 with gradient_only, which trains nothing", self.together)
            trackers, least = self.train.trackers, self.together * self.train.frames[1]
            require("wandb" not in trackers, "together", "1 with the tracker wandb, one run a process", self.together)
            rule = f"0 or at least {least}, together x the most frames per scene"
            require(not 0 < self.train.max_images < least, "max_images", rule, self.train.max_images)
        super().__post_init__()
        check_cache(self.cache_tokens, self.cache_gigabytes, self.train)

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(scenes=self.scenes, weights=self.weights)

    def writes(self) -> list[outputs.Output]:
        settings = outputs.Output("out", self.out / "config.yaml", outputs.ADAPT_SETTINGS)
        return [outputs.Output("out", self.out, outputs.FOLDER), settings, *cache_target(self.cache_tokens)]


def run(config: AdaptConfig) -> list[Path]:
    """Tune what is missing; returns the adapter folders, in the order of the data sets.

    An adapter that is there is not made again; one that was cut off continues from its checkpoints in OUT/.work. A data
    set that fails does not keep the others from being tuned; all failures are listed at the end.

    Raises:
        ValueError: an adapter in OUT was made with other settings, settings that suit no data set, or no cluster.
        FileNotFoundError: scenes or weights are missing.
        SystemExit: with 1 if some adapters could not be tuned.
    """
    from subspace3d.backbones.find import find_backbone
    from subspace3d.backbones.record import record_backbone
    from subspace3d.jobs.cluster import absolute, joined_cluster
    from subspace3d.jobs.work import exit_on_failures
    from subspace3d.training.adapters import (
        AdapterJobs,
        check_targets,
        find_datasets,
        is_done,
        remove_work,
        tune_adapters,
    )
    from subspace3d.training.gradients import BATCHES

    if config.ray:
        config = absolute(config, "scenes", "out", "cache_tokens")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("workers: adapt starts its own processes (--workers), so it must not run under torchrun")
    find_backbone(config.backbone).checked_size(config.train.image_size, config.train.frames)
    config = outputs.check(config)
    if not (config.train.lr or config.gradient_only):
        rate = usual_rate(config.backbone, "lora")
        logger.info(f"train.lr {rate:g}, the usual one for LoRA on {config.backbone}")
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, lr=rate))
    datasets = find_datasets(config.scenes)
    backbone = record_backbone(config.backbone, config.weights, config.train.seed, config.licence)
    steps = config.gradient_steps or (BATCHES if config.gradient_only else 0)
    wanted = _wanted(config, backbone.identity, steps)
    todo = [name for name in datasets if not is_done(config.out / name, wanted, config.overwrite)]
    check_targets(config.out, todo, datasets)
    if todo:
        settings.save(config.out / "config.yaml", config)
        jobs = AdapterJobs(
            out=config.out,
            backbone=backbone,
            datasets=datasets,
            wanted=wanted,
            rank=config.rank,
            targets=config.targets,
            gradient_steps=steps,
            train=config.train,
            gradient_only=config.gradient_only,
            gradient_gigabytes=config.gradient_gigabytes,
            cache_tokens=config.cache_tokens,
            cache_gigabytes=config.cache_gigabytes,
            overwrite=config.overwrite,
            together=config.together,
        )
        with joined_cluster(config, on_cpu=config.train.device == "cpu") as cluster:
            failures = tune_adapters(jobs, todo, config.workers, cluster)
        exit_on_failures("adapt", "adapters", failures, len(datasets), config.out)
    for name in datasets:
        remove_work(config.out / ".work", name)
    made = f"{len(datasets)} adapters" + ("" if todo else ", all made before with these settings")
    logger.info(f"{made} -> {config.out}")
    logger.info(f"next: {mining(config.out, datasets)}")
    return [config.out / name for name in datasets]


def mining(out: Path, datasets: Iterable[str]) -> str:
    """The command that mines the adapters of these data sets in ``out``, of the first attribute of several.

    A folder of data sets is an attribute; of data sets right below ``out`` it has no name.
    """
    attributes = sorted({(out / name).parent for name in datasets})
    first, *others = attributes
    name = "ATTRIBUTE" if first == out else first.name
    command = ["subspace3d", "mine", "--adapters", str(first), "--out", f"subspaces/{name}.safetensors"]
    return shlex.join(command) + (f", and likewise {', '.join(folder.name for folder in others)}" if others else "")


def _wanted(config: AdaptConfig, backbone: str, gradient_steps: int) -> dict[str, Any]:
    """The settings an adapter depends on."""
    from subspace3d.training.run import run_settings

    own = {"backbone": backbone, "rank": config.rank, "targets": config.targets, "gradient_steps": gradient_steps}
    wanted = run_settings(config.train, own)
    if config.gradient_only:
        wanted = {name: value for name, value in wanted.items() if name not in _OPTIMISER}
    # of tuned adapters the records do not name the source
    return {**wanted, "source": "gradient" if config.gradient_only else None}
