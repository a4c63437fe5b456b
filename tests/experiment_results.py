"""Result files as the jobs write them, with made-up numbers: what the page is written from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.jobs import BASE, RECORD
from experiments.layout import Layout
from experiments.plan import SPLITS, VALIDATION, Run, final_rate_runs, rate_runs, table_runs
from experiments.scale import Scale
from experiments.settings import EXPERIMENTS, Experiment

METRICS = ("accuracy", "completeness", "chamfer", "normal_consistency", "abs_rel")
CHOSEN = 1e-3
FAMILIES = ("full", "lora", "pissa", "adalora", "psv", "subspace")
Error = Callable[[Run, str], float]  # of a run on a split: half the sum of accuracy and completeness


def write_results(
    layout: Layout,
    scale: Scale,
    error: Error,
    experiments: Sequence[Experiment] = EXPERIMENTS,
    seeds: int = 3,
    base: float = 0.1,
) -> None:
    """The files of a finished run in which every family's best rate is `CHOSEN`."""
    for task in scale.tasks:
        for split in (VALIDATION, *SPLITS):
            write_record(layout.record(task, split, BASE), _record(base, 0))
    grid = rate_runs(scale, experiments)
    best = {task: dict.fromkeys(FAMILIES, sorted(scale.rates, key=_miss)[: scale.finalists]) for task in scale.tasks}
    for run in (*grid, *final_rate_runs(grid, seeds, best)):
        write_record(layout.record(run.task, VALIDATION, run.name), _record(0.1 + _miss(run.rate), 1))
        _finish(layout, run)
    chosen = {task: dict.fromkeys(FAMILIES, CHOSEN) for task in scale.tasks}
    for run in table_runs(scale, experiments, seeds, chosen):
        for split in SPLITS:
            write_record(layout.record(run.task, split, run.name), _record(error(run, split), 1000))
        _finish(layout, run)


def _miss(rate: float) -> float:
    return abs(rate - CHOSEN)


def _finish(layout: Layout, run: Run) -> None:
    write_record(layout.run(run) / RECORD, {"splits": list(SPLITS), "diverged": None, "settings": None})


def _record(value: float, trainable: int) -> dict:
    scenes = {f"scene_{number}": _metrics(value + 1e-4 * (number - 2.5)) for number in range(6)}
    training = {"steps": 100, "seconds": 40.0, "peak_memory_bytes": 2**30} if trainable else None
    return {
        "mean": _metrics(value),
        "per_scene": scenes,
        "failed": {},
        "trainable_parameters": trainable,
        "training": training,
    }


def _metrics(value: float) -> dict[str, float]:
    """Every metric follows from one error: twice and once of it, and one minus it where more is better."""
    return dict(zip(METRICS, (value, value, value, 1 - value, 2 * value)))


def write_record(path: Path, value: dict) -> None:
    # hundreds of files: without the flush to disk that files.write_json waits for
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
