"""Processes that die: each takes one job with it, and nothing else."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from subspace3d.jobs.pool import run_jobs

DIED = "its process died (exit code 3)"


class EndsTheProcess:
    """Ends the process that unpickles it: a worker, before it has looked at the name of its job."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def set_up(argument: Any, worker: int) -> Any:
    return lambda name: argument.joinpath(name).touch()


def set_up_to_die_idle(folder: Path, worker: int) -> Any:
    """Workers that end a moment after a job, before they are given the next one."""

    def work(name: str) -> None:
        folder.joinpath(name).touch()
        if name == "a":
            threading.Timer(0.2, os._exit, (3,)).start()

    return work


def test_processes_that_die_while_they_start() -> None:
    assert run_jobs(["a", "b"], set_up, EndsTheProcess(), 1) == {"a": DIED, "b": DIED}


def test_a_process_that_dies_between_two_jobs(tmp_path: Path) -> None:
    def take(name: str, result: object) -> None:
        time.sleep(name == "a")

    assert run_jobs(["a", "b", "c"], set_up_to_die_idle, tmp_path, 1, take=take) == {"b": DIED}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"]
