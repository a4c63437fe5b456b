"""What the records say: curves by cell, paired differences, the claims and their verdicts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.directions.plan import Cell, Sizes
from experiments.paired import ALPHA, Paired, compare_pairs, holm, spearman
from experiments.scale import Task

Records = Mapping[Cell, Mapping[int, Mapping[str, Any]]]
"""Cell -> seed -> record, of runs at the cell's rate on all training scenes."""
ORDERS = 0.8
"""Rank correlation of energy and loss from which energy is said to order the bases."""


def by_scene(record: Mapping[str, Any], step: int, term: str, split: str = "test") -> list[float]:
    """The term after ``step`` steps, scene by scene."""
    return record["curve"][str(step)][split][term]


def after(record: Mapping[str, Any], step: int, term: str = "loss", split: str = "test") -> float:
    """The term after ``step`` steps, mean over the scenes of the split."""
    return statistics.fmean(by_scene(record, step, term, split))


def final(record: Mapping[str, Any], term: str = "loss") -> float:
    """The held-out term at the end of the run; infinite where it diverged."""
    return math.inf if record["diverged"] else after(record, record["steps"][-1], term)


def area(record: Mapping[str, Any], term: str = "loss") -> float:
    """Mean of the held-out term over the steps, by trapezia from step 0; infinite where the run diverged."""
    if record["diverged"]:
        return math.inf
    steps = [0, *record["steps"]]
    values = [after(record, step, term) for step in steps]
    return float(np.trapezoid(values, steps)) / steps[-1]


def best_rate(by_rate: Mapping[float, Mapping[str, Any]]) -> float | None:
    """The rate of least validation loss with the first seed; None where every one diverged."""
    known = {rate: record["validation"] for rate, record in by_rate.items() if record["validation"] is not None}
    return min(sorted(known), key=lambda rate: known[rate], default=None)


@dataclass(frozen=True)
class Question:
    """Is ``first`` better than ``second`` at the main K?"""

    text: str
    first: str
    second: str


QUESTIONS = (
    Question("mined directions are better than random ones", "mean", "random-0"),
    Question("mined directions are better than the singular vectors of the weights", "mean", "psv"),
    Question("the shared model is better than the mean", "shared", "mean"),
    Question("gradients are a better source than tuned adapters", "gradient", "mean"),
    Question("gradients are a better source than the singular vectors of the weights", "gradient", "psv"),
    Question("gradients are better than random directions", "gradient", "random-0"),
    Question("joining both sources is better than gradients alone", "joined", "gradient"),
    Question("a subspace per attribute is better than one of all adapters", "mean", "pooled"),
    Question("the right block is better than another one", "mean", "permuted"),
    Question("the input side matters: V mined is better than V random", "mean", "u-mined"),
    Question("the output side matters: U mined is better than U random", "mean", "v-mined"),
    Question("a basis is better than the mean's one direction", "mean", "mean-only"),
    Question("the task's own gradient is better than the attributes'", "own", "gradient"),
)


@dataclass
class Answer:
    """One question, on one task or on all of them together.

    Attributes:
        task: None: the scenes of all tasks, which the verdicts are about.
        pairs: first minus second, of the held-out loss at the end: negative is better. A pair is a scene, each side
            the mean of the seeds that both have, so that intervals and p speak of other scenes of these tasks.
        depth, camera: the same of the two parts of the loss.
        adjusted: Holm's p over the questions; NaN for one task.
    """

    question: Question
    task: Task | None
    pairs: Paired
    depth: Paired
    camera: Paired
    adjusted: float = math.nan

    @property
    def verdict(self) -> str:
        """holds or contradicted: shown after Holm; points to, points against: the interval leaves out zero; open."""
        better = self.pairs.mean < 0
        if self.adjusted <= ALPHA:
            return "holds" if better else "contradicted"
        if self.pairs.low is not None and self.pairs.high is not None and self.pairs.low * self.pairs.high > 0:
            return "points to it" if better else "points against it"
        return "open"


def answers(records: Records, sizes: Sizes, tasks: Sequence[Task]) -> list[Answer]:
    """Every question on all tasks together, then on each, by the seeds that both sides have; diverged ones do not
    count."""
    together, single = [], []
    for question in QUESTIONS:
        by_task = {task: _common_runs(records, question, task, sizes.main) for task in tasks}
        known = {task: runs for task, runs in by_task.items() if runs}
        if not known:
            continue
        together.append(_answer(question, None, list(known.values())))
        single += [_answer(question, task, [runs]) for task, runs in known.items()]
    for answer, adjusted in zip(together, holm([answer.pairs.p for answer in together])):
        answer.adjusted = adjusted
    return [*together, *single]


Runs = list[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Seed by seed the run of either side."""


def _common_runs(records: Records, question: Question, task: Task, K: int) -> Runs:
    first, second = (_cell_records(records, task, basis, K) for basis in (question.first, question.second))
    runs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return [both for both in runs if not any(record["diverged"] for record in both)]


def _answer(question: Question, task: Task | None, runs: Sequence[Runs]) -> Answer:
    """Of the runs of several tasks."""

    def compare(term: str) -> Paired:
        first, second = (
            [value for each in runs for value in _scene_means([both[side] for both in each], term)] for side in (0, 1)
        )
        return compare_pairs(first, second)

    return Answer(question, task, compare("loss"), compare("depth"), compare("camera"))


def _scene_means(runs: Sequence[Mapping[str, Any]], term: str) -> list[float]:
    """Scene by scene the held-out term at the end, mean of the runs."""
    return [statistics.fmean(values) for values in zip(*(by_scene(run, run["steps"][-1], term) for run in runs))]


def _cell_records(records: Records, task: Task, basis: str, K: int) -> Mapping[int, Mapping[str, Any]]:
    return records.get(Cell(task, basis, 1 if basis == "mean-only" else K), {})


def order_by_energy(
    records: Records, energies: Mapping[Task, Mapping[str, Mapping[str, float]]], K: int, step: int
) -> dict[Task, tuple[dict[str, float], int]]:
    """Task -> rank correlations of the core's energy with minus a held-out term after ``step`` steps, and its bases.

    The terms are loss, depth and camera.

    Args:
        energies (Mapping): task -> "<basis> <K>" -> shares.
    """
    result: dict[Task, tuple[dict[str, float], int]] = {}
    for task, shares in energies.items():
        inside = []
        terms: dict[str, list[float]] = {"loss": [], "depth": [], "camera": []}
        for cell, seeds in records.items():
            known = [run for run in seeds.values() if not run["diverged"]]
            if cell.task == task and cell.K == K and known and f"{cell.basis} {K}" in shares:
                inside.append(shares[f"{cell.basis} {K}"]["core"])
                for term, values in terms.items():
                    values.append(-statistics.fmean(after(run, step, term) for run in known))
        if len(inside) > 2:
            result[task] = ({term: spearman(inside, values) for term, values in terms.items()}, len(inside))
    return result


@dataclass
class Summary:
    """Mean and sample standard deviation over seeds."""

    values: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        known = [value for value in self.values if math.isfinite(value)]
        if not known:
            return "diverged" if self.values else "–"
        spread = f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else ""
        lost = f", {len(self.values) - len(known)} diverged" if len(known) < len(self.values) else ""
        return f"{statistics.fmean(known):.3f}{spread}{lost}"


def forgetting_at(record: Mapping[str, Any], level: float) -> float | None:
    """The loss on generic scenes where the held-out loss first reaches ``level``, between measured steps linearly."""
    if record["diverged"]:
        return None
    points = [(after(record, step), after(record, step, split="generic")) for step in (0, *record["steps"])]
    for (high, before), (low, then) in itertools.pairwise(points):
        if low <= level:
            if high <= level:
                return before
            return before + (high - level) / (high - low) * (then - before)
    return None
