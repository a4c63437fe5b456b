"""The settings of `python -m experiments.directions`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.directions.plan import BASES
from subspace3d import outputs
from subspace3d.settings import require


@dataclass(frozen=True)
class DirectionsConfig:
    """Tune cores alone between bases of every origin and compare them pair by pair: OUT/directions/directions.md."""

    out: Path = Path("runs/experiments")
    """Run folder, shared with `python -m experiments`: scenes and adapters that are there are used."""
    scale: Literal["nano", "smoke"] = "nano"
    """smoke: the least that still runs everything; its numbers mean nothing."""
    tasks: tuple[Literal["faces", "bodies", "glass"], ...] = ()
    """Only these tasks; none: all."""
    bases: tuple[str, ...] = ()
    """Only these bases, by the names in experiments.directions.plan; none: all."""
    sizes: tuple[int, ...] = ()
    """Only these K; none: all."""
    seeds: int = 3
    """Paired seeds at the main K. Differences are counted scene by scene, over the means of the seeds."""
    workers: int = 0
    """Jobs at a time, each a process of one thread; 0: one per core."""
    weights: Path | None = None
    """Weights of vggt-nano; none: those shipped with the package."""
    publish: Path | None = None
    """Checkout of this project, whose docs/directions.md is brought up to date as well."""
    measured: Path | None = None
    """Results of an earlier run, as --publish writes them to experiments/measured.jsonl: they are taken over, and what
    they hold is not run again."""
    collect: bool = False
    """Run nothing: only write the page from what is there."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.bases if name not in BASES]
        require(not unknown, "bases", f"among {', '.join(BASES)}", ", ".join(unknown))
        require(all(size >= 1 for size in self.sizes), "sizes", "at least 1", self.sizes)
        require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        require(self.workers >= 0, "workers", "at least 0", self.workers)
        require(self.publish is None or self.scale == "nano", "scale", "nano where results are published", self.scale)

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(weights=self.weights, measured=self.measured)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.EXPERIMENTS)]
