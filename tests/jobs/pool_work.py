"""Jobs for the tests of the pool and the cluster; a module of its own, so that a new process imports nothing heavy."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from subspace3d.jobs.work import PartsFailed


def note_process(folder: Path, worker: int) -> Callable[[str], object]:
    """Jobs write the number of their process into a file of their name; two of them fail."""
    if folder.name == "broken":
        raise FileNotFoundError("weights: no such file")

    def work(name: str) -> None:
        if name == "raises":
            raise ValueError("no good")
        if name == "parts":
            raise PartsFailed({"left": ValueError("no good"), "right": KeyError("x")})
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / name).write_text(str(os.getpid()))

    return work


def wait_for_go(folder: Path, worker: int) -> Callable[[str], object]:
    """Jobs note their process and its parent, wait for the file go, and note their end."""

    def work(name: str) -> None:
        _append(folder / "started", f"{name} {os.getpid()} {os.getppid()}")
        while not (folder / "go").exists():
            time.sleep(0.02)
        _append(folder / "ended", name)
        (folder / name).write_text(name)

    return work


def visible_resources() -> tuple[str, str]:
    return os.environ.get("OMP_NUM_THREADS", ""), os.environ.get("CUDA_VISIBLE_DEVICES", "")


def _append(path: Path, line: str) -> None:
    # one write of a short line is not torn
    with open(path, "a", encoding="ascii") as file:
        file.write(line + "\n")
