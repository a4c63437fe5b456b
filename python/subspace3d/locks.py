"""Locks that keep two processes from writing one result."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from subspace3d import system


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
        ValueError: something else than a regular file has the lock's name: a link, a FIFO.
    """
    path = Path(os.path.abspath(folder)) / (f".{name}.lock" if name else ".lock")
    if path in _held:
        yield
        return
    created = [parent for parent in path.parents if not parent.exists()]
    handle = _acquire(path, f"another process is at work on {Path(folder) / name}")
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        if handle is not None:
            _release(path, handle)
        # a stage that refused its input leaves nothing behind, one that did its work a folder that is not empty
        with contextlib.suppress(OSError):
            for parent in created:
                parent.rmdir()


def _acquire(path: Path, refusal: str) -> int | None:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made_here = not os.path.lexists(path)
            handle = _open(path)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise
        try:
            system.lock(handle)
        except BlockingIOError:
            os.close(handle)
            raise FolderInUse(f"out: {refusal}") from None
        except OSError:
            os.close(handle)
            if made_here:
                path.unlink(missing_ok=True)
            return None
        if _is_still_there(path, handle):
            return handle
        # the process that held it has removed it since it was opened
        os.close(handle)


def _release(path: Path, handle: int) -> None:
    # a lock is empty: a file with content belongs to somebody else
    ours = _is_still_there(path, handle) and os.fstat(handle).st_size == 0
    if system.HOLDS_OPEN_FILES:
        os.close(handle)
        with contextlib.suppress(PermissionError):  # the next process has opened it
            if ours:
                path.unlink(missing_ok=True)
        return
    if ours:
        path.unlink(missing_ok=True)
    os.close(handle)


def _open(path: Path) -> int:
    """Open a lock as it is: no link is followed, no content dropped, no FIFO waited for."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | system.WITHOUT_FOLLOWING | system.WITHOUT_WAITING, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise ValueError(f"out: the lock {path} must be a regular file: {error.strerror}") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"out: the lock {path} must be a regular file, it is a FIFO or a device")
    return handle


def _is_still_there(path: Path, handle: int) -> bool:
    if system.HOLDS_OPEN_FILES:
        return True
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
