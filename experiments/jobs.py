"""The jobs of the tables: tune and measure one run, or measure the base model. Each has a folder of its own.

A job that is done has a record, and is not started again; one that was cut off continues at its last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.layout import Layout
from experiments.plan import Run
from experiments.scale import Scale, Task
from experiments.settings import ExperimentsConfig
from subspace3d import outputs, records, settings
from subspace3d.choices import CORE_METHODS
from subspace3d.commands.evaluate import EvaluateConfig
from subspace3d.commands.finetune import FinetuneConfig
from subspace3d.files import read_json, write_json
from subspace3d.jobs.cluster import joined_cluster
from subspace3d.jobs.pool import run_jobs
from subspace3d.machine import one_thread_each
from subspace3d.progress import Progress
from subspace3d.training import checkpoints

BASE = "base"
RECORD = "job.json"


@dataclass(frozen=True)
class Job:
    """Tune ``run`` and measure it on ``splits``; without a run measure the base model."""

    task: Task
    splits: tuple[str, ...]
    run: Run | None = None

    @property
    def name(self) -> str:
        return f"{self.task}/{self.run.name if self.run else BASE}"


@dataclass(frozen=True)
class Context:
    """What all steps and jobs of one call share."""

    config: ExperimentsConfig
    layout: Layout
    scale: Scale
    tokens: Path
    workers: int


@dataclass(frozen=True)
class _Shared:
    context: Context
    jobs: dict[str, Job]
    device: str  # auto: GPUs in turn where there are any, else the CPU
    threads: int  # of a job


def run_all(context: Context, jobs: Sequence[Job], label: str) -> dict[str, str]:
    """Do what is not done; returns what went wrong, by name of the job."""
    todo = {job.name: job for job in jobs if not is_done(context, job)}
    if not todo:
        print(f"{label}: all {len(jobs)} done before", flush=True)
        return {}
    with joined_cluster(context.config) as cluster, one_thread_each():
        device = cluster.device if cluster is not None else "auto"
        shared = _Shared(context, todo, device, cluster.cpus if cluster is not None else 1)
        workers = min(context.workers, len(todo))
        with Progress(label, len(jobs), "run", initial=len(jobs) - len(todo)) as progress:
            return run_jobs(
                list(todo), _set_up, shared, workers, lambda name: progress.advance(note=name), cluster=cluster
            )


def is_done(context: Context, job: Job) -> bool:
    """Whether the job's record names all of its splits.

    Raises:
        ValueError: it was done with other settings.
    """
    path = _folder(context, job) / RECORD
    if not path.is_file():
        return False
    record = read_json(path)
    made, wanted = {"settings": record["settings"]}, {"settings": _settings(context, job)}
    records.check_same(path.parent, made, wanted, "choose another folder, or delete this one")
    return record["diverged"] is not None or set(job.splits) <= set(record["splits"])


def _settings(context: Context, job: Job) -> dict[str, Any] | None:
    """What the job's result depends on, besides the run folder's own settings."""
    if job.run is None:
        return None
    row = asdict(job.run.row)
    for name in ("label", "finds_rate"):
        row.pop(name)
    row["attributes"] = list(row["attributes"])
    return {
        "row": row,
        "rate": job.run.rate,
        "head_rate": _head_rate(context, job.run),
        "seed": job.run.seed,
        "train": settings.to_dict(context.scale.tune),
    }


def _head_rate(context: Context, run: Run) -> float:
    return context.scale.head_rate if run.row.method in CORE_METHODS else 0.0


def _folder(context: Context, job: Job) -> Path:
    return context.layout.run(job.run) if job.run else context.layout.out / "runs" / job.task / BASE


def _set_up(shared: _Shared, worker: int) -> Callable[[str], object]:
    import peft  # noqa: F401
    import scipy.spatial  # noqa: F401

    torch.set_num_threads(shared.threads)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = f"cuda:{worker % gpus}" if gpus and shared.device == "auto" else "cpu"

    def work(name: str) -> None:
        job = shared.jobs[name]
        folder = _folder(shared.context, job)
        folder.mkdir(parents=True, exist_ok=True)
        outputs.mark(folder, outputs.RUN)
        with printed_to(folder / "log.txt"):
            _do(shared.context, job, folder, device)

    return work


@contextlib.contextmanager
def printed_to(path: Path) -> Iterator[None]:
    """Add what is printed meanwhile to a file."""
    with (
        open(path, "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def _do(context: Context, job: Job, folder: Path, device: str) -> None:
    diverged = None
    if job.run is not None:
        _start_peak_memory()
        try:
            _tune(context, job.run, folder, device)
        except FloatingPointError as error:
            # an outcome of this learning rate, not a fault: nothing is gained by trying again
            diverged = str(error)
        checkpoints.remove_all(folder / "checkpoints")
    if diverged is None:
        for split in job.splits:
            _measure(context, job, split, (folder,) if job.run else (), device)
    record = folder / RECORD
    before = read_json(record)["splits"] if record.is_file() else []
    splits = list(dict.fromkeys([*before, *job.splits]))
    write_json(record, {"splits": splits, "diverged": diverged, "settings": _settings(context, job)})


def _tune(context: Context, run: Run, folder: Path, device: str) -> None:
    from subspace3d.commands import finetune

    row = run.row
    finetune.run(
        FinetuneConfig(
            scenes=context.layout.scenes(run.task, "train"),
            out=folder,
            method=row.method,
            weights=context.config.weights,
            subspaces=(context.layout.subspaces(row.mined),) if row.mined else (),
            attributes=row.attributes,
            core_size=row.K,
            rank=row.rank,
            targets=row.targets,
            cache_tokens=context.tokens,
            head_lr=_head_rate(context, run),
            train=replace(context.scale.tune, lr=run.rate, seed=run.seed, device=device),
        )
    )


def _measure(context: Context, job: Job, split: str, tuned: tuple[Path, ...], device: str) -> None:
    from subspace3d.commands import evaluate

    # results of all runs of a task gather in one folder; each call writes those of its own run
    evaluate.run(
        EvaluateConfig(
            scenes=context.layout.scenes(job.task, split),
            out=context.layout.measured(job.task, split),
            tuned=tuned,
            weights=context.config.weights,
            frames=context.scale.views["generic" if split == "generic" else job.task],
            kept_scenes=0,
            device=device,
        )
    )


def _start_peak_memory() -> None:
    """Let the process's peak memory start anew, where the system can: the worker has done other jobs before."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
