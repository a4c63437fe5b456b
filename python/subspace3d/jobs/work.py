"""What a job is, wherever it runs, and what is said when some of them fail."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from subspace3d.log import logger

Work = Callable[[str], object]
"""Does the job of a name; what it returns must be small and can be pickled."""
_LISTED = 20  # failures that are named one by one


def exit_on_failures(command: str, what: str, failures: dict[str, str], total: int, out: Path) -> None:
    """List what went wrong, if anything did, and exit with 1.

    Raises:
        SystemExit: there are failures.
    """
    if not failures:
        return
    logger.warning(f"{command}: {len(failures)} of {total} {what} failed, the others are in {out}:")
    for name in list(failures)[:_LISTED]:
        logger.warning(f"  {name}: {failures[name]}")
    if len(failures) > _LISTED:
        logger.warning(f"  and {len(failures) - _LISTED} more")
    raise SystemExit(1)


class PartsFailed(Exception):
    """Of a job that is several: what went wrong, by name of the part. All others are done."""

    def __init__(self, errors: dict[str, Exception]) -> None:
        super().__init__(", ".join(f"{name}: {describe(error)}" for name, error in errors.items()))
        self.errors = errors


def failed_parts(name: str, error: Exception) -> dict[str, Exception]:
    """What failed in the job ``name``: its parts, or all of it."""
    return error.errors if isinstance(error, PartsFailed) else {name: error}


def describe_failures(name: str, error: Exception) -> dict[str, str]:
    """One line about each of the `failed_parts`."""
    return {part: describe(each) for part, each in failed_parts(name, error).items()}


def describe(error: Exception) -> str:
    """One line about an exception; its type only where the text alone would not say what happened."""
    text = " ".join(str(error).split())
    return (
        text
        if isinstance(error, (ValueError, OSError, ArithmeticError)) and text
        else f"{type(error).__name__}: {text}"
    )


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit here, so that what waits in ``finally`` is done."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    # only the main thread may set handlers
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
