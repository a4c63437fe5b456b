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
from experiments.paired import ALPHA, compare_pairs
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

MARGIN = 0.1
"""Two rows are alike in a metric where the interval of their difference lies within this share of its value."""

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
        scenes: seed -> split -> scene -> metric -> value.
        costs: seed -> trainable parameters, seconds and bytes.
        diverged: seeds whose training ended without a result.
        failed: scenes on which predictions were not finite, over all seeds and splits; they are in no mean.
    """

    row: Row | None
    rate: float | None = None
    means: dict[int, dict[str, Means]] = field(default_factory=dict)
    scenes: dict[int, dict[str, Mapping[str, Means]]] = field(default_factory=dict)
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
            result.scenes.setdefault(seed, {})[split] = record["per_scene"]
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
        word: better, worse, level (neither is shown) or unknown (a value is missing, or there are too few seeds).
        difference: by how much the first is better, in the metric's unit: mean over seeds and scenes.
        low, high: ends of the BCa interval of the difference over the scenes, at 95 %.
        alike: the interval lies within `MARGIN` of the second row's value on both sides.
    """

    word: str
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    alike: bool = False


def compare(first: RowResult, second: RowResult, split: str, metric: str) -> Outcome:
    """Whether ``first`` is better than ``second``, which saw the same batches and is measured on the same scenes.

    It is where the differences of the scenes (each the mean over the seeds that both rows have) are not zero by sign
    flips at `ALPHA`, and their mean has the same sign with every seed. Base models have no seeds: theirs stands beside
    every seed. With one seed nothing is decided.
    """
    pairs = _seed_pairs(first, second, split)
    sign = 1.0 if SHOWN[metric].lower_is_better else -1.0
    by_scene: dict[str, list[tuple[float, float]]] = {}
    for one, two in pairs:
        for scene in one.keys() & two.keys():
            a, b = one[scene].get(metric), two[scene].get(metric)
            if a is not None and b is not None:
                by_scene.setdefault(scene, []).append((sign * a, sign * b))
    # a scene on which some run failed would set unlike runs side by side
    whole = [values for _, values in sorted(by_scene.items()) if len(values) == len(pairs)]
    if not whole:
        return Outcome("unknown")
    firsts, seconds = ([statistics.fmean(pair[side] for pair in values) for values in whole] for side in (0, 1))
    paired = compare_pairs(seconds, firsts)
    if len(pairs) < 2 or paired.low is None or paired.high is None:
        return Outcome("unknown", paired.mean)
    seeds = [statistics.fmean(values[seed][1] - values[seed][0] for values in whole) for seed in range(len(pairs))]
    word = "level"
    if paired.p <= ALPHA and (min(seeds) > 0 or max(seeds) < 0):
        word = "better" if paired.mean > 0 else "worse"
    bound = MARGIN * abs(statistics.fmean(seconds))
    return Outcome(word, paired.mean, paired.low, paired.high, -bound <= paired.low and paired.high <= bound)


def _seed_pairs(first: RowResult, second: RowResult, split: str) -> list[tuple[Mapping[str, Means], ...]]:
    """The scenes of both rows, seed by seed."""
    known = [{seed: splits[split] for seed, splits in row.scenes.items() if split in splits} for row in (first, second)]
    for side, row in enumerate((first, second)):
        if row.row is None and known[side]:
            (base,) = known[side].values()
            known[side] = dict.fromkeys(known[1 - side], base)
    return [(known[0][seed], known[1][seed]) for seed in sorted(known[0].keys() & known[1].keys())]
