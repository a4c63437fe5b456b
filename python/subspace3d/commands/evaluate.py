"""Measure the base model and tuned runs of it on scenes, side by side: OUT/results.json and OUT/pictures."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from subspace3d import outputs
from subspace3d.choices import ProtocolName
from subspace3d.jobs.options import ClusterOptions
from subspace3d.log import logger


@dataclass(frozen=True)
class EvaluateConfig(ClusterOptions):
    """Measure a backbone and tuned runs of it on scenes: point clouds, depth, cameras; per scene and mean."""

    RENAMED: ClassVar[dict[str, str]] = {"images": "kept_scenes"}

    scenes: Path
    """Test scenes: a folder with scenes anywhere below it."""
    out: Path
    """Folder for results.json and the depth pictures."""
    tuned: tuple[Path, ...] = ()
    """Run folders of finetune; the base model is always measured beside them."""
    backbone: str = "vggt-nano"
    """A preset (doctor lists them), or package.module:factory."""
    weights: Path | None = None
    """File of weights, random, or hub (published, downloaded); none: those shipped with the package (nano only)."""
    licence: str = ""
    """Of the weights; none: as a tuned run on the same weights, the file, its model card or the backbone says."""
    frames: int | None = None
    """Frames used per scene, evenly spaced; none: 8, or as the protocol chooses them."""
    protocol: ProtocolName = "subspace3d"
    """Besides this project's own metrics those of a published protocol, with its frames and sizes; all: the same
    predictions (of --frames square images) under every protocol side by side."""
    icp_threshold: float = 0.1
    """Largest correspondence distance of ICP, in scene units."""
    f_threshold: float = 0.05
    """Largest distance that counts for the F-score, in scene units."""
    kept_scenes: int = 4
    """Scenes whose images and depth maps are kept for the report."""
    workers: int = 1
    """Methods measured at a time, each in a process of its own."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(scenes=self.scenes, tuned=outputs.tuned_folders(self.tuned), weights=self.weights)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.EVALUATION)]


def run(config: EvaluateConfig) -> dict[str, Any]:
    """`evaluation.evaluate.evaluate` with these settings; prints the table."""
    from subspace3d.evaluation.evaluate import Options, evaluate
    from subspace3d.evaluation.protocols import PROTOCOLS
    from subspace3d.evaluation.table import format_protocols, format_table
    from subspace3d.jobs.cluster import absolute, joined_cluster

    if config.ray:
        config = absolute(config, "scenes", "out", "tuned")
    # a pattern like runs/* also names the results that an earlier call left among the runs
    runs = tuple(run for run in config.tuned if run.resolve() != config.out.resolve())
    if len(runs) < len(config.tuned):
        logger.info(f"{config.out} is where the results go, not a tuned run: left out of --tuned")
    config = outputs.check(dataclasses.replace(config, tuned=runs))
    options = Options(
        frames=config.frames,
        icp_threshold=config.icp_threshold,
        images=config.kept_scenes,
        f_threshold=config.f_threshold,
        protocols={"subspace3d": (), "all": tuple(PROTOCOLS)}.get(config.protocol, (config.protocol,)),
        workers=config.workers,
    )
    with joined_cluster(config, on_cpu=config.device == "cpu") as cluster:
        results = evaluate(
            config.scenes,
            config.out,
            tuned=config.tuned,
            backbone=config.backbone,
            weights=config.weights,
            licence=config.licence,
            options=options,
            device=config.device,
            cluster=cluster,
        )
    logger.info(format_table(results))
    if results["protocols"]:
        logger.info("\n" + format_protocols(results))
    logger.info(f"results -> {config.out / 'results.json'}")
    run_folder = config.out.parent if config.out.name == "evaluation" else config.out
    logger.info(f"next: subspace3d report {shlex.quote(str(run_folder))}")
    return results
