"""The choice of learning rates: per task and family of methods, by the error on validation scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace3d.configs import Experiment
from subspace3d.experiments.jobs import RECORD
from subspace3d.experiments.layout import Layout
from subspace3d.experiments.plan import VALIDATION, rate_runs
from subspace3d.experiments.scale import Scale, Task
from subspace3d.files import read_json

CRITERION = "chamfer"
"""Half the sum of accuracy and completeness, the errors that the paper's tables give."""


@dataclass(frozen=True)
class Choice:
    """The grid of one family on one task.

    Attributes:
        row: label of the row that was tuned.
        errors: rate -> `CRITERION` on the validation scenes; None where the run diverged; a rate not run is absent.
        complete: every rate of the grid has been tried.
    """

    row: str
    errors: dict[float, float | None]
    complete: bool

    @property
    def rate(self) -> float | None:
        """The rate of least error, once the grid is complete; the smaller one of equals."""
        finite = {rate: error for rate, error in self.errors.items() if error is not None}
        return min(sorted(finite), key=lambda rate: finite[rate]) if self.complete and finite else None

    @property
    def at_edge(self) -> bool:
        """Whether a rate outside the grid might have been better."""
        return self.rate is not None and self.rate in (min(self.errors), max(self.errors))


def read_choices(layout: Layout, scale: Scale, experiments: Sequence[Experiment]) -> dict[Task, dict[str, Choice]]:
    """Task -> family -> what its grid has shown so far."""
    grids: dict[tuple[Task, str], Choice] = {}
    for run in rate_runs(scale, experiments):
        key = (run.task, run.row.family)
        grids.setdefault(key, Choice(run.row.label, {}, False))
        record = layout.record(run.task, VALIDATION, run.name)
        job = layout.run(run) / RECORD
        if job.is_file() and read_json(job)["diverged"] is not None:
            grids[key].errors[run.rate] = None
        elif record.is_file():
            grids[key].errors[run.rate] = read_json(record)["mean"][CRITERION]
    choices: dict[Task, dict[str, Choice]] = {}
    for (task, family), choice in grids.items():
        complete = set(choice.errors) == set(scale.rates)
        choices.setdefault(task, {})[family] = Choice(choice.row, choice.errors, complete)
    return choices


def chosen_rates(choices: dict[Task, dict[str, Choice]]) -> dict[Task, dict[str, float]]:
    """Task -> family -> learning rate, where one has been chosen."""
    return {
        task: {family: rate for family, choice in families.items() if (rate := choice.rate) is not None}
        for task, families in choices.items()
    }
