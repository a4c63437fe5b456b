"""Opening files that others made: regular files only, and no more of them than a bound allows.

A name may stand for a named pipe, a socket, a device or a folder; opening or reading one of these can wait for ever or
never end. Every reader of this package opens its files here.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

from subspace3d import system

LARGEST_RECORD = 1 << 26
"""Bytes of a JSON file; a scene of 10,000 frames has 4 million."""
MOST_VALUES = 1 << 21
"""Values in a JSON file; each costs about a hundred bytes once it is read."""


class DamagedError(ValueError):
    """A file is not what was written: truncated, changed, or never of its kind."""


def open_regular(path: Path, largest: int | None = None) -> IO[bytes]:
    """Open a file for reading, without waiting for anything.

    Args:
        path (Path): the file, or a link to it.
        largest (int | None): bytes it may have; none: any number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, a named pipe, a socket or a device, or it is larger than ``largest``.
    """
    try:
        handle = os.open(path, os.O_RDONLY | system.WITHOUT_WAITING)
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError) as error:  # a socket, a loop of links, a name the system cannot have
        raise ValueError(f"{path} must be a file that can be read: {error}") from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} must be a regular file, it is {_kind(status.st_mode)}")
        if largest is not None and status.st_size > largest:
            raise ValueError(f"{path} must be at most {largest} bytes, it has {status.st_size}")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_bytes(path: Path, largest: int) -> bytes:
    """All of a file of at most ``largest`` bytes; raises what `open_regular` raises."""
    with open_regular(path, largest) as file:
        data = file.read(largest + 1)  # it may have grown since
    if len(data) > largest:
        raise ValueError(f"{path} must be at most {largest} bytes, it has more")
    return data


def read_text(path: Path, largest: int) -> str:
    """UTF-8 text, without a byte order mark; raises what `open_regular` raises.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error


def parse_json(data: bytes | str, what: str, most: int = MOST_VALUES) -> Any:
    """The value of a JSON text of at most ``most`` values; ``what`` names it in messages.

    Raises:
        DamagedError: not JSON, or more values.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        # every value but the first has one of these before it; inside strings they only make the bound tighter
        if sum(text.count(mark) for mark in ",[{") > most:
            raise ValueError(f"it has more than {most} values")
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also text that is not UTF-8, and endless digits
        raise DamagedError(f"{what} is not valid JSON: {error}") from error


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a named pipe",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "something else")


def open_zip(file: IO[bytes], largest_directory: int = 1 << 24) -> zipfile.ZipFile:
    """The zip archive in an open file, its list of members bounded before it is read.

    Raises:
        ValueError: no zip archive, or a list of more than ``largest_directory`` bytes.
    """
    length = file.seek(0, os.SEEK_END)
    start = max(0, length - (1 << 16) - 22 - 20)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        raise ValueError("it is no zip archive")
    directory = struct.unpack_from("<I", tail, end + 12)[0]
    locator = end - 20
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":  # sizes of 64 bits stand elsewhere
        file.seek(min(struct.unpack_from("<Q", tail, locator + 8)[0], length))
        record = file.read(56)
        if len(record) == 56 and record[:4] == b"PK\x06\x06":
            directory = max(struct.unpack_from("<Q", record, 40)[0], 0 if directory == 0xFFFFFFFF else directory)
    if directory > min(largest_directory, length):
        raise ValueError(f"its list of members has {directory} bytes, more than {largest_directory} or than the file")
    try:
        return zipfile.ZipFile(file)
    except Exception as error:  # a broken list of members may do any
        raise ValueError(f"it is no whole zip archive: {error}") from error
