"""The numbers of all runs that are there, by task, row, seed and split."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from experiments.jobs import BASE, RECORD
from experiments.layout import Layout
from experiments.plan import SPLITS, Row, all_rows
from experiments.rates import CRITERION, Choice, read_choices
from experiments.scale import Scale, Task
from experiments.settings import EXPERIMENTS
from subspace3d.evaluation.table import METRICS as SHOWN
from subspace3d.files import read_json

METRICS = ("accuracy", "completeness", "normal_consistency", "abs_rel")
"""Those the paper reports for its tasks, which decide about its claims."""
MAIN = CRITERION
"""The one number of a row in the figures and the short table, by which the best row of a family is picked."""

Means = Mapping[str, float | None]


@dataclass(frozen=True)
class Stat:
    """Mean over seeds and sample standard deviation, which one value does not have."""

    mean: float
    spread: float | None
    count: int


@dataclass
class RowResult:
    """What the runs of one row gave, at its learning rate.

    Attributes:
        row: the row; None is the base model, which has no seeds.
        rate: learning rate; None: not chosen yet.
        means: seed -> split -> metric -> mean over the split's scenes.
        costs: seed -> trainable parameters, seconds and bytes.
        diverged: seeds whose training ended without a result.
        failed: scenes on which predictions were not finite, over all seeds and splits; they are in no mean.
    """

    row: Row | None
    rate: float | None = None
    means: dict[int, dict[str, Means]] = field(default_factory=dict)
    costs: dict[int, dict[str, float]] = field(default_factory=dict)
    diverged: list[int] = field(default_factory=list)
    failed: int = 0

    @property
    def label(self) -> str:
        return self.row.label if self.row else BASE

    @property
    def seeds(self) -> int:
        return len(self.means)

    def stat(self, split: str, metric: str) -> Stat | None:
        """None where no seed has the value."""
        return summarize(means[split].get(metric) for means in self.means.values() if split in means)

    def cost(self, name: str) -> Stat | None:
        """``trainable``, ``seconds`` or ``bytes``."""
        return summarize(cost.get(name) for cost in self.costs.values())


@dataclass
class TaskResults:
    """Base model and rows of one task; a row that has no result is there without means."""

    task: Task
    base: RowResult
    rows: dict[str, RowResult]
    choices: dict[str, Choice]

    def best(self, rows: Iterable[RowResult]) -> RowResult | None:
        """The row of least mean `MAIN` error on the in-domain test; None where none has a result."""
        known = [(stat.mean, row) for row in rows if (stat := row.stat("test", MAIN)) is not None]
        return min(known, key=lambda pair: pair[0])[1] if known else None


def summarize(values: Iterable[float | None]) -> Stat | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stat(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def load(layout: Layout, scale: Scale) -> dict[Task, TaskResults]:
    """Everything that has been run, whatever experiments it belongs to."""
    choices = read_choices(layout, scale, EXPERIMENTS)
    return {task: _load_task(layout, scale, task, choices[task]) for task in scale.tasks}


def _load_task(layout: Layout, scale: Scale, task: Task, choices: dict[str, Choice]) -> TaskResults:
    base = RowResult(None)
    _read_means(base, 0, layout, task, BASE)
    rows = {}
    for row in all_rows(scale, EXPERIMENTS, task):
        result = rows[row.name] = RowResult(row, row.rate or choices[row.family].rate)
        if result.rate is None:
            continue
        folder = layout.out / "runs" / task
        pattern = re.compile(re.escape(f"{row.name}_lr{result.rate:g}_s") + r"(\d+)")
        for path in sorted(folder.glob(f"*/{RECORD}")):
            match = pattern.fullmatch(path.parent.name)
            if match is None:
                continue
            if read_json(path)["diverged"] is not None:
                result.diverged.append(int(match[1]))
            else:
                _read_means(result, int(match[1]), layout, task, path.parent.name)
    return TaskResults(task, base, rows, choices)


def _read_means(result: RowResult, seed: int, layout: Layout, task: Task, method: str) -> None:
    for split in SPLITS:
        path = layout.record(task, split, method)
        if path.is_file():
            record = read_json(path)
            result.means.setdefault(seed, {})[split] = record["mean"]
            result.costs[seed] = _costs(record)
            result.failed += len(record["failed"])


def _costs(record: Mapping[str, Any]) -> dict[str, float]:
    training = record.get("training") or {}
    return {
        "trainable": record.get("trainable_parameters") or 0,
        "seconds": training.get("seconds", 0.0),
        "bytes": training.get("peak_memory_bytes", 0),
    }


@dataclass(frozen=True)
class Outcome:
    """How one row compares with another in one metric.

    Attributes:
        word: better, worse, level (no difference beyond the spread) or unknown (a value or its spread is missing).
        difference: by how much the first is better, in the metric's unit.
        spread: ``sqrt(s_1^2 + s_2^2)`` with the standard deviations over seeds; 0 for the base model.
    """

    word: str
    difference: float = math.nan
    spread: float = math.nan


def compare(first: RowResult, second: RowResult, split: str, metric: str) -> Outcome:
    """Whether ``first`` is better than ``second`` by more than the spread over seeds."""
    stats = [row.stat(split, metric) for row in (first, second)]
    if stats[0] is None or stats[1] is None:
        return Outcome("unknown")
    difference = stats[1].mean - stats[0].mean
    if not SHOWN[metric].lower_is_better:
        difference = -difference
    spreads = [0.0 if row.row is None else stat.spread for row, stat in zip((first, second), stats) if stat]
    if any(spread is None for spread in spreads):
        return Outcome("unknown", difference)
    spread = math.hypot(*(spread for spread in spreads if spread is not None))
    word = "better" if difference > spread else "worse" if -difference > spread else "level"
    return Outcome(word, difference, spread)
