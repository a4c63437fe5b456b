"""What operating systems have and others lack: locks, flags of ``open``, folders as open files, counts of memory.

Everything else of this package asks here, so that it runs on Linux, macOS and Windows alike.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]
try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
"""Flags that open a named pipe at once, and any file as it is."""
WITHOUT_FOLLOWING = getattr(os, "O_NOFOLLOW", 0)
"""A flag that refuses a link; nothing where links cannot be told apart."""
HOLDS_OPEN_FILES = os.name == "nt"
"""Whether a file that is open can be neither deleted nor renamed."""
KILLED = -9
"""Exit code of a process that the system ended, as it does when memory runs out."""

# Windows locks bytes and keeps others from reading them: one that no file of ours reaches
_LOCKED_BYTE = 0x7FFF0000


def lock(handle: int) -> None:
    """Hold an open file for this process until it is closed; never waits.

    Raises:
        BlockingIOError: another process holds it.
        OSError: there are no locks here.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        place = os.lseek(handle, 0, os.SEEK_CUR)
        os.lseek(handle, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLK):
                raise BlockingIOError(errno.EWOULDBLOCK, "another process holds the file") from None
            raise
        finally:
            os.lseek(handle, place, os.SEEK_SET)
    else:
        raise OSError(errno.ENOSYS, "this system has no locks")


def open_folder(path: Path) -> int | None:
    """A handle of a folder, to lock it; none where folders cannot be opened."""
    try:
        return os.open(path, os.O_RDONLY)
    except PermissionError:
        if HOLDS_OPEN_FILES:
            return None
        raise


def memory() -> tuple[int, int] | None:
    """Bytes the machine has, and those that programs can still take; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kibibytes = {key: int(rest.split()[0]) for key, _, rest in (line.partition(":") for line in file)}
        return 1024 * kibibytes["MemTotal"], 1024 * kibibytes["MemAvailable"]
    except (OSError, KeyError):
        return None


def peak_resident_bytes() -> int:
    """Most memory this process has held; 0 where the system does not say."""
    if resource is None:
        return 0
    # kilobytes, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
