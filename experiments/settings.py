"""The settings of `python -m experiments`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.scale import NANO
from subspace3d import outputs
from subspace3d.jobs.options import ClusterOptions
from subspace3d.settings import require

Experiment = Literal["tasks", "psv", "rank", "attributes", "source", "mining"]
EXPERIMENTS: tuple[Experiment, ...] = ("tasks", "psv", "rank", "attributes", "source", "mining")


@dataclass(frozen=True)
class ExperimentsConfig(ClusterOptions):
    """Re-run the paper's tables at nano scale, in a few hours, and write a page on what holds: OUT/results.md."""

    out: Path = Path("runs/experiments")
    """Run folder; a run that was cut off continues in it."""
    scale: Literal["nano", "smoke"] = "nano"
    """smoke: the least that still runs everything; its numbers mean nothing."""
    only: tuple[Experiment, ...] = ()
    """Only these; none: all. tasks: Tables 1 to 3. psv: Table 4. rank: Table 5. attributes: each left out. mining: IRLS
    against the plain mean, with bad adapters planted. What was not run is named on the page."""
    tasks: tuple[Literal["faces", "bodies", "glass"], ...] = ()
    """Only these tasks; none: all. Tables 4 and 5 and the ablations are about bodies."""
    rows: tuple[str, ...] = ()
    """Only these rows of the tables, by the names of their run folders (lora-16, psv-32, subspace-8); none: all. The
    learning rate of a family is chosen on its middle size all the same."""
    seeds: int = 3
    """Runs of every row; more can be added later."""
    finalists: int = NANO.finalists
    """The best learning rates of the first seed, between which all seeds decide; 1: the first seed decides."""
    workers: int = 0
    """Jobs at a time, each in a process of its own; 0: one per GPU, on the CPU one per core, of one thread each."""
    weights: Path | None = None
    """Weights of vggt-nano; none: those shipped with the package."""
    publish: Path | None = None
    """Checkout of this project, whose docs/results.md, docs/images and README are brought up to date as well."""
    measured: Path | None = None
    """Results of an earlier run, as --publish writes them to experiments/measured.jsonl: they are taken over, and what
    they hold is not run again."""
    collect: bool = False
    """Run nothing: only write the page from what is there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        require(self.finalists >= 1, "finalists", "at least 1", self.finalists)
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        require(self.publish is None or self.scale == "nano", "scale", "nano where results are published", self.scale)

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(weights=self.weights, measured=self.measured)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.EXPERIMENTS)]
