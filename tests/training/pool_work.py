"""Jobs for the pool's test; a module of its own, so that a new process imports nothing heavy."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path


def note_process(folder: Path, worker: int) -> Callable[[str], object]:
    """Jobs write the number of their process into a file of their name; two of them fail."""
    if folder.name == "broken":
        raise FileNotFoundError("weights: no such file")

    def work(name: str) -> None:
        if name == "raises":
            raise ValueError("no good")
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / name).write_text(str(os.getpid()))

    return work
