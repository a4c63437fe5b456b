"""Prepare, measure energies, choose rates, run the seeds, write the page. Every stage resumes."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import measured, prepare
from experiments.directions import bases, jobs, page
from experiments.directions.bases import Paths
from experiments.directions.plan import RATE_SEED, SIZES, Cell, Run, Sizes, cells, core_hours, final_runs, rate_runs
from experiments.directions.results import best_rate
from experiments.directions.settings import DirectionsConfig
from experiments.jobs import Context
from experiments.layout import Layout
from experiments.plan import Mined
from experiments.run import check_folder
from experiments.scale import SCALES
from experiments.settings import ExperimentsConfig
from subspace3d import outputs
from subspace3d.files import load_tensors, read_json, write_json
from subspace3d.log import logger
from subspace3d.machine import usable_cores


def run(config: DirectionsConfig) -> Path:
    """Run what is missing and write OUT/directions/directions.md; with ``collect`` only write the page.

    Raises:
        ValueError: OUT or ``measured`` holds a run of another scale, other weights or another version; or no such task
            at this scale.
        FileNotFoundError: weights or ``measured`` are missing, or ``publish`` is not a checkout.
        SystemExit: with 1 if some runs failed; the page is written all the same.
    """
    config = outputs.check(config)
    scale, sizes = SCALES[config.scale], SIZES[config.scale]
    tasks = {task: bank for task, bank in scale.tasks.items() if not config.tasks or task in config.tasks}
    if not tasks:
        raise ValueError(f"tasks must be among {', '.join(scale.tasks)} at {scale.name} scale, got {config.tasks}")
    if config.publish is not None:
        measured.require_checkout(config.publish)
    ablated = scale.ablated if scale.ablated in tasks else next(iter(tasks))
    scale = dataclasses.replace(scale, tasks=tasks, ablated=ablated)
    shared = ExperimentsConfig(
        config.out, config.scale, tasks=tuple(tasks), workers=config.workers, weights=config.weights
    )
    workers = config.workers or usable_cores()
    context = Context(shared, Layout(config.out), scale, config.out / "tokens", workers)
    check_folder(config.out, config.scale, config.weights, config.collect, config.measured)
    chosen = cells(scale, sizes, config.bases, config.sizes)
    failures = {} if config.collect else _run_all(config, context, sizes, chosen)
    path = Paths(context.layout).root / "directions.md"
    rates = _rates(context, sizes, chosen)
    found, shots = _read(context, final_runs(scale, chosen, sizes, config.seeds, rates))
    grid = {rate: _at_rate(context, chosen, rate) for rate in sizes.rates}
    block = page.render(found, grid, _energies(context), shots, sizes, list(tasks), config.scale == "smoke")
    page.write(path, block, config.publish)
    if config.publish is not None:
        measured.keep(config.out, config.publish)
    logger.info(f"directions -> {path}")
    if failures:
        for name, message in failures.items():
            print(f"  {name}: {message}", file=sys.stderr)
        raise SystemExit(1)
    return path


def _run_all(config: DirectionsConfig, context: Context, sizes: Sizes, chosen: Sequence[Cell]) -> dict[str, str]:
    scale = context.scale
    hours = core_hours(scale, chosen, sizes, config.seeds)
    logger.info(f"directions: {len(chosen)} cells, about {hours:.1f} core hours of runs on a quiet core")
    sets = [Mined(bank, scale.adapter_rank, 1) for bank in dict.fromkeys(scale.tasks.values())]
    prepare.render(context, sets)
    prepare.render_held_out(context, sizes.held_out)
    prepare.tune_adapters(context, sets)
    bases.prepare(context, sizes)
    start = time.monotonic()
    for task in scale.tasks:
        bases.take_gradient(context, task, sizes)
        _measure_energies(context, chosen, task)
    failures = jobs.run_all(context, sizes, rate_runs(chosen, sizes), "rates")
    finals = final_runs(scale, chosen, sizes, config.seeds, _rates(context, sizes, chosen))
    failures |= jobs.run_all(context, sizes, finals, "seeds and few scenes")
    logger.info(f"directions: {time.monotonic() - start:.0f} s")
    return failures


def _measure_energies(context: Context, chosen: Sequence[Cell], task: str) -> None:
    path = Paths(context.layout).energy(task)
    known: dict[str, dict[str, float]] = read_json(path) if path.is_file() else {}
    missing = [cell for cell in chosen if cell.task == task and f"{cell.basis} {cell.K}" not in known]
    if not missing:
        return
    gradients, _ = load_tensors(Paths(context.layout).task_gradient(task))
    model = bases.load_model(context)
    for cell in missing:
        if cell.basis == "own":
            shares = bases.own_energies(gradients, cell.K)
        else:
            shares = bases.energies(gradients, bases.build(context, cell.task, cell.basis, cell.K, model))
        known[f"{cell.basis} {cell.K}"] = {side: float(f"{share:.6g}") for side, share in shares.items()}
    write_json(path, known)


def _energies(context: Context) -> dict[Any, dict[str, dict[str, float]]]:
    paths = {task: Paths(context.layout).energy(task) for task in context.scale.tasks}
    return {task: read_json(path) for task, path in paths.items() if path.is_file()}


def _rates(context: Context, sizes: Sizes, chosen: Sequence[Cell]) -> dict[Cell, float]:
    """Cell -> rate of least validation loss, where every rate has been tried."""
    rates = {}
    for cell in dict.fromkeys(cell.finder for cell in chosen):
        tried = {
            rate: record
            for rate in sizes.rates
            if (record := jobs.read(context, Run(cell.task, cell.basis, cell.K, rate, RATE_SEED))) is not None
        }
        best = best_rate(tried) if len(tried) == len(sizes.rates) else None
        if best is not None:
            rates[cell] = best
    return rates


def _at_rate(context: Context, chosen: Sequence[Cell], rate: float) -> dict[Cell, dict[int, Mapping[str, Any]]]:
    """The runs of the first seed at one rate."""
    runs = [Run(cell.task, cell.basis, cell.K, rate, RATE_SEED) for cell in dict.fromkeys(c.finder for c in chosen)]
    return _read(context, runs)[0]


def _read(
    context: Context, runs: Sequence[Run]
) -> tuple[dict[Cell, dict[int, Mapping[str, Any]]], dict[tuple[str, int], dict[int, Mapping[str, Any]]]]:
    found: dict[Cell, dict[int, Mapping[str, Any]]] = {}
    shots: dict[tuple[str, int], dict[int, Mapping[str, Any]]] = {}
    for each in runs:
        record = jobs.read(context, each)
        if record is None:
            continue
        if each.scenes:
            shots.setdefault((each.basis, each.scenes), {})[each.seed] = record
        else:
            found.setdefault(each.cell, {})[each.seed] = record
    return found, shots
