"""The verb experiments: prepare, choose learning rates, run the tables, write the page. Every stage resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments import jobs, measured, page, prepare
from experiments.jobs import Context, Job
from experiments.layout import Layout
from experiments.measured import RUN_RECORD
from experiments.plan import (
    SPLITS,
    VALIDATION,
    Mined,
    all_rows,
    analyzed,
    budget,
    final_rate_runs,
    mined_sets,
    rate_runs,
    table_runs,
)
from experiments.rates import chosen_rates, finalists, read_choices
from experiments.scale import SCALES, Scale, Task
from experiments.settings import EXPERIMENTS, Experiment, ExperimentsConfig
from subspace3d import __version__, outputs, records
from subspace3d.backbones.record import record_backbone
from subspace3d.bench.harness import provenance
from subspace3d.commands.evaluate import EvaluateConfig
from subspace3d.files import read_json, write_json
from subspace3d.jobs.cluster import absolute
from subspace3d.machine import usable_cores
from subspace3d.progress import format_duration
from subspace3d.training.device import choose_device


def run(config: ExperimentsConfig) -> Path:
    """Run what is missing and write the page of results; with ``collect`` only write the page.

    A job that fails does not keep the others from running; all failures are listed at the end, and the same command
    tries them again. A learning rate at which training diverges is an outcome, not a failure.

    Returns:
        OUT/results.md.

    Raises:
        ValueError: OUT or ``measured`` holds a run of another scale, other weights or another version; no such task or
            row at this scale; or no cluster answers.
        FileNotFoundError: weights or ``measured`` are missing; or ``publish`` is not a checkout.
        SystemExit: with 1 if some jobs failed; the page is written all the same.
    """
    scale = dataclasses.replace(SCALES[config.scale], finalists=config.finalists)
    config = outputs.check(config)
    if config.ray:
        on_disk = config.weights is not None and config.weights.is_file()
        config = absolute(config, "out", "weights") if on_disk else absolute(config, "out")
    if config.publish is not None:
        measured.require_checkout(config.publish)
    chosen = {task: bank for task, bank in scale.tasks.items() if not config.tasks or task in config.tasks}
    if not chosen:
        raise ValueError(f"tasks must be among {', '.join(scale.tasks)} at {scale.name} scale, got {config.tasks}")
    layout = Layout(config.out)
    experiments: tuple[Experiment, ...] = config.only or EXPERIMENTS
    known = {row.name for task in chosen for row in all_rows(scale, experiments, task)}
    if unknown := sorted(set(config.rows) - known):
        raise ValueError(f"rows must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")
    failures: dict[str, str] = {}
    check_folder(config.out, config.scale, config.weights, config.collect, config.measured)
    if not config.collect:
        wanted = dataclasses.replace(scale, tasks=chosen, rows=config.rows)
        failures = _run_all(config, layout, wanted, experiments)
    path = page.write(layout, scale, failures, config.publish)
    if config.publish is not None:
        measured.keep(config.out, config.publish)
    print(f"results -> {path}", flush=True)
    if failures:
        print(f"experiments: {len(failures)} jobs failed, the same command tries them again:", file=sys.stderr)
        for name, message in failures.items():
            print(f"  {name}: {message}", file=sys.stderr)
        raise SystemExit(1)
    return path


def check_folder(out: Path, scale: str, weights: Path | None, collect: bool, before: Path | None = None) -> None:
    """A run folder belongs to one scale, one set of weights and one version; every start is noted in it.

    Args:
        before (Path | None): results that were measured elsewhere, which are put into it.

    Raises:
        ValueError: ``out`` or ``before`` holds a run of another scale, other weights or another version.
        FileNotFoundError: ``before`` is missing; or, with ``collect``, there is nothing to collect.
    """
    path = out / RUN_RECORD
    wanted = {"scale": scale, "weights": record_backbone("vggt-nano", weights).sha256, "version": __version__}
    record: dict[str, Any] = {**wanted, "starts": []}
    if before is not None:
        print(f"measured: {measured.take_over(before, out, wanted)} records taken over from {before}", flush=True)
    if path.is_file():
        record = read_json(path)
        records.check_same(out, record, wanted, "choose another folder")
    elif collect:
        raise FileNotFoundError(f"out: no experiments in {out}, so there is nothing to collect")
    if not collect:
        now = {**provenance(choose_device("auto")), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_json(path, {**record, "starts": [*record["starts"], now]})


def _run_all(
    config: ExperimentsConfig, layout: Layout, scale: Scale, experiments: Sequence[Experiment]
) -> dict[str, str]:
    workers = config.workers or max(1, torch.cuda.device_count() or usable_cores())
    context = Context(config, layout, scale, layout.out / "tokens", workers)
    tasks, sets = _left(context, experiments)
    planned = sum(cost.seconds for cost in budget(scale, experiments, config.seeds))
    where = f"on the cluster at {config.ray}" if config.ray else f"{workers} at a time"
    expected = f"; about {format_duration(planned / workers)} in all" if scale.name == "nano" and not config.ray else ""
    print(
        f"experiments {' '.join(experiments)} at {scale.name} scale in {config.out}, {config.seeds} seeds, "
        f"jobs {where}; interrupt at will, the same command continues{expected}",
        flush=True,
    )
    failures: dict[str, str] = {}

    def render() -> None:
        if tasks:
            prepare.render(dataclasses.replace(context, scale=dataclasses.replace(scale, tasks=tasks)), sets)

    def measure_base() -> None:
        splits = (VALIDATION, *SPLITS)
        failures.update(jobs.run_all(context, [Job(task, splits) for task in scale.tasks], "base model"))

    def find_rates() -> None:
        grid = rate_runs(scale, experiments)
        failures.update(jobs.run_all(context, [Job(run.task, (VALIDATION,), run) for run in grid], "learning rates"))
        finals = final_rate_runs(grid, config.seeds, finalists(read_choices(layout, scale, experiments)))
        decide = [Job(run.task, (VALIDATION,), run) for run in finals]
        failures.update(jobs.run_all(context, decide, "learning rates, finalists"))

    def run_tables() -> None:
        chosen = chosen_rates(read_choices(layout, scale, experiments))
        runs = [Job(run.task, SPLITS, run) for run in table_runs(scale, experiments, config.seeds, chosen)]
        failures.update(jobs.run_all(context, runs, "tables"))
        _assemble(context, runs)

    stages: list[tuple[str, Callable[[], None]]] = [
        ("render scenes", render),
        ("tune adapters", lambda: prepare.tune_adapters(context, sets)),
        ("mine subspaces", lambda: prepare.mine_subspaces(context, sets)),
        ("measure the base model", measure_base),
        ("choose learning rates", find_rates),
        ("tune and measure the rows of the tables", run_tables),
    ]
    start = time.monotonic()
    for number, (title, work) in enumerate(stages, 1):
        print(f"[{number}/{len(stages)}] {title}  ({format_duration(time.monotonic() - start)} so far)", flush=True)
        work()
    return failures


def _left(context: Context, experiments: Sequence[Experiment]) -> tuple[dict[Task, str], list[Mined]]:
    """The tasks on which something is left to run, with their banks, and the sets of subspaces that it needs; also the
    sets whose analysis is missing."""
    scale, layout, seeds = context.scale, context.layout, context.config.seeds
    choices = read_choices(layout, scale, experiments)
    chosen = chosen_rates(choices)
    grid = rate_runs(scale, experiments)
    rates = [*grid, *final_rate_runs(grid, seeds, finalists(choices))]
    wanted = [Job(task, (VALIDATION, *SPLITS)) for task in scale.tasks]
    wanted += [Job(run.task, (VALIDATION,), run) for run in rates]
    wanted += [Job(run.task, SPLITS, run) for run in table_runs(scale, experiments, seeds, chosen)]
    left = [job for job in wanted if not jobs.is_done(context, job)]
    rows = [job.run.row for job in left if job.run]
    tasks = {job.task for job in left}
    for task in scale.tasks:
        # where no rate is known, its runs cannot be told yet
        later = [row for row in all_rows(scale, experiments, task) if not row.rate and row.family not in chosen[task]]
        rows += later
        tasks |= {task} if later else set()
    needed = {row.mined for row in rows}
    # what planted adapters did is seen beside the same set without them
    needed |= {dataclasses.replace(mined, planted=False) for mined in needed if mined is not None}
    needed |= {mined for name, mined in analyzed(scale).items() if not layout.analysis(name).is_file()}
    sets = [mined for mined in mined_sets(scale, experiments) if mined in needed]
    return {task: bank for task, bank in scale.tasks.items() if task in tasks}, sets


def _assemble(context: Context, runs: Sequence[Job]) -> None:
    """Write results.json of every task and split over all runs that were made here, which were measured one by one."""
    from subspace3d.commands import evaluate

    for task in context.scale.tasks:
        for split in SPLITS:
            folder = context.layout.measured(task, split)
            done = [job.run for job in runs if job.run and job.task == task]
            measured_runs = [run for run in done if context.layout.record(task, split, run.name).is_file()]
            tuned = [path for path in map(context.layout.run, measured_runs) if (path / "tuned").is_dir()]
            if not tuned:
                continue
            config = EvaluateConfig(
                scenes=context.layout.scenes(task, split),
                out=folder,
                tuned=tuple(tuned),
                weights=context.config.weights,
                frames=context.scale.views["generic" if split == "generic" else task],
                kept_scenes=0,
            )
            with contextlib.redirect_stdout(io.StringIO()):
                evaluate.run(config)
