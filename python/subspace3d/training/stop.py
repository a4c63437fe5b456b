"""Stopping a run: signals that finish the step first, and a lock that keeps two runs out of one folder."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """Yield a list that receives a SIGINT or SIGTERM instead of the process dying of it; a second SIGINT interrupts."""
    received: list[signal.Signals] = []
    # only the main thread may set handlers
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class FolderInUse(ValueError):
    """Another process holds the run folder."""


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process, if its file system has locks; the system lets go however the process ends.

    Raises:
        FolderInUse: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUse(f"out: another process is training in {folder}") from None
        except OSError:
            # a file system without locks, as clusters have them: nothing can be said about other processes there
            pass
        yield
