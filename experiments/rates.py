"""The choice of learning rates: per task and family of methods, by the error on validation scenes.

One seed tells rates apart that are far from the best. Those near it differ by less than the spread over seeds, so all
seeds decide between the finalists.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.jobs import RECORD
from experiments.layout import Layout
from experiments.plan import RATE_SEED, VALIDATION, rate_runs
from experiments.scale import Scale, Task
from experiments.settings import Experiment
from subspace3d.files import read_json

CRITERION = "chamfer"
"""Half the sum of accuracy and completeness, the errors that the paper's tables give."""


@dataclass(frozen=True)
class Choice:
    """The grid of one family on one task.

    Attributes:
        row: label of the row that was tuned.
        errors: rate -> seed -> `CRITERION` on the validation scenes; None where the run diverged; what has not been
            run is absent.
        grid: the rates that are tried with the first seed.
        most: how many of them are finalists.
    """

    row: str
    errors: dict[float, dict[int, float | None]]
    grid: tuple[float, ...]
    most: int

    @property
    def complete(self) -> bool:
        """Every rate of the grid has been tried with the first seed."""
        return all(RATE_SEED in self.errors.get(rate, {}) for rate in self.grid)

    @property
    def finalists(self) -> tuple[float, ...]:
        """The rates of least error with the first seed, once the grid is complete; the smaller one of equals."""
        first = {rate: error for rate in self.grid if (error := self.errors.get(rate, {}).get(RATE_SEED)) is not None}
        return tuple(sorted(sorted(first), key=lambda rate: first[rate])[: self.most]) if self.complete else ()

    @property
    def rate(self) -> float | None:
        """The finalist of least mean error over the seeds that all of them have, if it diverged with none."""
        common = set.intersection(*(set(self.errors[rate]) for rate in self.finalists)) if self.finalists else set()
        means = {}
        for rate in self.finalists:
            errors = [error for seed in common if (error := self.errors[rate][seed]) is not None]
            if len(errors) == len(common):
                means[rate] = statistics.fmean(errors)
        return min(sorted(means), key=lambda rate: means[rate], default=None)

    @property
    def at_edge(self) -> bool:
        """Whether a rate outside the grid might have been better."""
        return self.rate is not None and self.rate in (min(self.grid), max(self.grid))


def read_choices(layout: Layout, scale: Scale, experiments: Sequence[Experiment]) -> dict[Task, dict[str, Choice]]:
    """Task -> family -> what its grid has shown so far."""
    choices: dict[Task, dict[str, Choice]] = {}
    for first in rate_runs(scale, experiments):
        families = choices.setdefault(first.task, {})
        choice = families.setdefault(first.row.family, Choice(first.row.label, {}, scale.rates, scale.finalists))
        for folder in layout.run(first).parent.glob(f"{first.name.removesuffix(str(first.seed))}*"):
            run = replace(first, seed=int(folder.name.rpartition("_s")[2]))
            record = layout.record(run.task, VALIDATION, run.name)
            job = layout.run(run) / RECORD
            if job.is_file() and read_json(job)["diverged"] is not None:
                choice.errors.setdefault(run.rate, {})[run.seed] = None
            elif record.is_file():
                choice.errors.setdefault(run.rate, {})[run.seed] = read_json(record)["mean"][CRITERION]
    return choices


def finalists(choices: dict[Task, dict[str, Choice]]) -> dict[Task, dict[str, tuple[float, ...]]]:
    """Task -> family -> the rates that all seeds decide between."""
    return {task: {family: choice.finalists for family, choice in row.items()} for task, row in choices.items()}


def chosen_rates(choices: dict[Task, dict[str, Choice]]) -> dict[Task, dict[str, float]]:
    """Task -> family -> learning rate, where one has been chosen."""
    return {
        task: {family: rate for family, choice in families.items() if (rate := choice.rate) is not None}
        for task, families in choices.items()
    }
