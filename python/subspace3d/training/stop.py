"""Stopping a run: signals that finish the step first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stop_requests() -> Iterator[list[signal.Signals]]:
    """Yield a list that receives a SIGINT or SIGTERM instead of the process dying of it; a second one ends it at once.

    Raises:
        KeyboardInterrupt, SystemExit: for the second signal, where the program then is.
    """
    received: list[signal.Signals] = []
    # only the main thread may set handlers
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(signal.Signals(number))
        # what a handler interrupts may be printing
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; a second signal ends the run at once, at its last checkpoint\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
