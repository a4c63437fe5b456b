"""Where everything lies below the run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from experiments.plan import HELD_OUT, VALIDATION, Mined, Run
from experiments.scale import Bank


@dataclass(frozen=True)
class Layout:
    """Paths below ``out``."""

    out: Path

    def attribute_scenes(self, bank: Bank) -> Path:
        """Holds ``<attribute>/<attribute>_<data set>``."""
        return self.out / "scenes" / "attributes" / bank.name

    @property
    def task_scenes(self) -> Path:
        return self.out / "scenes" / "tasks"

    def scenes(self, task: str, split: str) -> Path:
        """The data set of a split: train, validation, held-out, test, cross or generic, which belongs to no task."""
        if split == "generic":
            return self.out / "scenes" / "generic" / "generic_00"
        if split in (VALIDATION, HELD_OUT):
            return self.task_scenes / f"{task}-{split}_train"
        return self.task_scenes / f"{task}_{split}"

    @property
    def wrong_scenes(self) -> Path:
        """Holds ``<attribute>/wrong``, see `planted.write_wrong_scenes`."""
        return self.out / "scenes" / "wrong"

    def adapters(self, mined: Mined) -> Path:
        """Holds ``<attribute>/<data set>``; with planted ones, these stand beside the good ones."""
        return self.out / "adapters" / mined.adapters

    def wrong_adapters(self, mined: Mined) -> Path:
        return self.out / "adapters" / f"{mined.bank}-r{mined.rank}-wrong"

    def subspaces(self, mined: Mined) -> Path:
        """Holds ``<attribute>.safetensors``."""
        return self.out / "subspaces" / mined.folder

    def analysis(self, name: str) -> Path:
        """Of one of `plan.analyzed`."""
        return self.out / "analysis" / name / "analysis.json"

    def run(self, run: Run) -> Path:
        return self.out / "runs" / run.task / run.name

    def measured(self, task: str, split: str) -> Path:
        """The evaluation of all runs of a task on one split."""
        return self.out / "evaluation" / task / split

    def record(self, task: str, split: str, method: str) -> Path:
        """The result of one run (or of ``base``) there."""
        return self.measured(task, split) / "methods" / f"{method}.json"
