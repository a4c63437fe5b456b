"""Commands of one pipeline that do not wait for each other, side by side: each in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace3d.jobs.pool import run_jobs
from subspace3d.jobs.work import exit_on_failures
from subspace3d.log import show
from subspace3d.machine import one_thread_each, usable_cores
from subspace3d.progress import Progress


@dataclass(frozen=True)
class Call:
    """``run(settings)`` of a command, a module-level function; what it prints goes to the file ``log``."""

    run: Callable[[Any], object]
    settings: Any
    log: Path


def run_side_by_side(label: str, calls: Mapping[str, Call], out: Path) -> None:
    """Make all calls, as many at a time as there are cores, each with one thread.

    Raises:
        SystemExit: with 1 if some failed; their names and what went wrong are listed.
    """
    workers = min(len(calls), usable_cores())
    with one_thread_each(), Progress(label, len(calls), "run") as progress:
        failures = run_jobs(list(calls), _set_up, dict(calls), workers, lambda name: progress.advance(note=name))
    exit_on_failures(label, "runs", failures, len(calls), out)


def _set_up(calls: dict[str, Call], worker: int) -> Callable[[str], object]:
    import torch

    torch.set_num_threads(1)

    def work(name: str) -> None:
        call = calls[name]
        call.log.parent.mkdir(parents=True, exist_ok=True)
        with (
            open(call.log, "a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            show()
            call.run(call.settings)

    return work
