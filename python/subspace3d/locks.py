"""Locks that keep two processes from writing one result."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


class FolderInUse(ValueError):
    """Another process holds the folder or the result."""


_held: set[Path] = set()
# what a file system without locks, or a target that cannot be written, answers; the stage itself says the latter better
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC)


@contextlib.contextmanager
def exclusive(folder: Path, name: str = "") -> Iterator[None]:
    """Hold ``folder``, or the result called ``name`` in it, for this process; within one process it nests.

    The lock is the file ``.lock`` or ``.<name>.lock``, which is gone afterwards. The system lets go of it however the
    process ends. Where the file system has no locks, or nothing can be written, nothing is held.

    Raises:
        FolderInUse: another process holds it.
    """
    path = Path(os.path.abspath(folder)) / (f".{name}.lock" if name else ".lock")
    if path in _held:
        yield
        return
    created = [parent for parent in path.parents if not parent.exists()]
    file = _acquire(path, f"another process is at work on {Path(folder) / name}")
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()
        # a stage that refused its input leaves nothing behind, one that did its work a folder that is not empty
        with contextlib.suppress(OSError):
            for parent in created:
                parent.rmdir()


def _acquire(path: Path, refusal: str) -> IO[str] | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "w", encoding="ascii")  # noqa: SIM115 (held open as long as the lock)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FolderInUse(f"out: {refusal}") from None
        except OSError:
            file.close()
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        # the process that held it has removed it since it was opened
        file.close()
