"""The package's logger: silent unless the caller listens to it; commands show it as plain lines."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("subspace3d")


class _PlainLines(logging.Handler):
    """Information goes to stdout, warnings and errors to stderr, as those streams are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stdout if record.levelno < logging.WARNING else sys.stderr, flush=True)


def show(quiet: bool = False) -> None:
    """Print what the package logs; ``quiet`` leaves out all but warnings and errors."""
    if not any(isinstance(handler, _PlainLines) for handler in logger.handlers):
        logger.addHandler(_PlainLines())
        logger.propagate = False
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    leave_out_the_irrelevant()


def leave_out_the_irrelevant() -> None:
    """Silence what other packages warn of although nothing here depends on it."""
    # PEFT imports bitsandbytes where it is installed, which then misses kernels for 4-bit weights on the CPU
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
