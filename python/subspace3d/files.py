"""Atomic writes and checked reads: nothing partial ever stands under a final name, nothing is unpickled."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, overload

from subspace3d import system
from subspace3d.reading import LARGEST_RECORD, DamagedError, open_regular, parse_json, read_bytes
from subspace3d.schema import check

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
_LARGEST_HEADER = 1 << 24  # bytes of a safetensors header; that of a billion parameters has 0.2 million
_MARK = ".s3d-"  # in the name of everything temporary, so that nobody else's files are taken for it
_LEFTOVER = re.compile(r"\..+\.s3d-\w{8}\.(tmp|old)(\.\w+)?")
_ATTEMPTS = 100  # to make a temporary folder that no other process sweeps before it is marked
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_swept: set[str] = set()  # folders this process has cleared of what killed processes left


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder beside ``path``; on success flush what was written there and rename it.

    On any exception the temporary folder is removed and an existing ``path`` is left as it was. What a process that was
    killed left beside ``path`` goes with the first write of the next one.

    Raises:
        ValueError: ``path`` is something else than a regular file: a folder, a link, a FIFO.
    """
    path = Path(path)
    _check_type(path, stat.S_ISREG, "regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    # a folder, which stays where it is and marked: some writers put a file of their own in the place of the one they
    # are given, and nothing would keep other processes from sweeping that
    with _temporary_folder(path, ".tmp") as folder:
        temporary = folder / path.name
        yield temporary
        # some writers make files that only their user can read; a result is as readable as any other file
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "r+b") as file:  # Windows flushes only what could be written
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder of ``path``; on success it takes the place of ``path`` and of what stood there.

    Whenever the process is killed, the old folder or the new one is whole: they are exchanged in one step where the
    system can do that, else the old one is set aside, from where `sweep` puts it back.

    Raises:
        ValueError: ``path`` is something else than a folder: a file, a link.
    """
    path = Path(os.path.abspath(path))
    _check_type(path, stat.S_ISDIR, "folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    with _temporary_folder(path, ".tmp") as temporary:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if not path.exists():
            os.replace(temporary, path)
        elif not _exchange(temporary, path):
            _set_aside_and_replace(temporary, path)


def discard(path: Path) -> None:
    """Delete a file or folder; it leaves its name in one step, so that no part of it ever stands there."""
    path = Path(os.path.abspath(path))
    with _temporary_folder(path, ".tmp") as temporary:
        os.replace(path, temporary / path.name)


def sweep(folder: Path) -> None:
    """Clear ``folder`` of what processes that were killed left in it under temporary names.

    A folder that was set aside is put back if nothing has taken its place. What a living process holds is left alone;
    where the file system has no locks, everything is.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in filter(_LEFTOVER.fullmatch, names):
        leftover = Path(folder) / name
        with contextlib.suppress(OSError):  # another process sweeps too, or locks do not exist here
            # without O_NONBLOCK a FIFO of such a name would hang
            handle = os.open(leftover, os.O_RDONLY | system.WITHOUT_FOLLOWING | system.WITHOUT_WAITING)
            try:
                system.lock(handle)
                if stat.S_ISDIR(os.fstat(handle).st_mode):
                    _put_back(leftover)
                    shutil.rmtree(leftover)
                elif stat.S_ISREG(os.fstat(handle).st_mode):  # of version 0.1.0
                    leftover.unlink()
            finally:
                os.close(handle)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is a temporary one of this module."""
    return _LEFTOVER.fullmatch(name) is not None


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to add lines to it; made if it is not there.

    Raises:
        ValueError: ``path`` is a link, a FIFO or anything else than a regular file.
    """
    _check_type(path, stat.S_ISREG, "regular file")
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | system.WITHOUT_FOLLOWING | system.WITHOUT_WAITING
    return open(os.open(path, flags, 0o666), "a", encoding="utf-8")


def _check_type(path: Path, is_right: Callable[[int], bool], what: str) -> None:
    """Raise ValueError if something else stands under a final name: replacing it would lose what is not a result."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not is_right(mode):
        found = "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "file of another type"
        raise ValueError(f"{path} must be a {what} to be written, it is a {found}")


@contextlib.contextmanager
def _temporary_folder(path: Path, suffix: str) -> Iterator[Path]:
    """A new folder beside ``path``, marked as in use where folders can be opened; removed if it is still there."""
    handle, folder = _new_folder(path, suffix)
    try:
        yield folder
    finally:
        try:
            if folder.exists():
                shutil.rmtree(folder)
        finally:
            if handle is not None:
                os.close(handle)


def _new_folder(path: Path, suffix: str) -> tuple[int | None, Path]:
    for _ in range(_ATTEMPTS):
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{_MARK}", suffix=suffix))
        try:
            handle = system.open_folder(folder)
        except FileNotFoundError:
            continue
        if _claim(handle, folder):
            return handle, folder
        if handle is not None:
            os.close(handle)
    raise BlockingIOError(errno.EWOULDBLOCK, "other processes took every temporary folder", str(path.parent))


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; false where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if call is None:
        return False
    sys.audit("os.rename", str(first), str(second), -1, -1)  # for those who watch changes of files
    return call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0


def _set_aside_and_replace(temporary: Path, path: Path) -> None:
    with _temporary_folder(path, ".old") as old:
        os.replace(path, old / path.name)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.replace(old / path.name, path)
            raise


def _put_back(leftover: Path) -> None:
    """If ``leftover`` is a folder that holds what was set aside and its name is free, give it its name again."""
    final = leftover.parent / leftover.name[1:].rpartition(_MARK)[0]
    if leftover.suffix == ".old" and os.path.lexists(leftover / final.name) and not os.path.lexists(final):
        os.replace(leftover / final.name, final)


def _claim(handle: int | None, path: Path) -> bool:
    """Mark a temporary folder as in use; the system lets go of it when the process ends, however it ends.

    Returns:
        bool: False where another process swept it between its making and now.
    """
    if handle is None:
        return True
    try:
        system.lock(handle)
    except BlockingIOError:
        return False
    except OSError:
        pass  # where there are no locks nothing is ever swept
    return os.path.lexists(path)


def _sweep_once(folder: Path) -> None:
    key = os.path.abspath(folder)
    if key not in _swept:
        _swept.add(key)
        sweep(folder)


def inside(folder: Path, name: object, where: str) -> Path:
    """The file that a record calls ``name``, which must lie in ``folder``; ``where`` names the entry in messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a path, or one that leads out of ``folder``: absolute, through ``..``, or by a link.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} must be a path relative to {folder}, got {name!r}")
    path = Path(folder) / name
    try:
        # a loop of links is a RuntimeError, a name the system cannot have an OSError or ValueError
        stays, exists = path.resolve().is_relative_to(Path(folder).resolve()), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where} must be a path, got {name[:80]!r}: {error}") from error
    if not stays:
        raise ValueError(f"{where} must stay inside {folder}, got {name!r}")
    if not exists:
        raise FileNotFoundError(f"{where}: no such file: {path}")
    return path


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Folders at or below ``root`` in natural order, with the names of their folders and files, as `os.walk` has them.

    Links to folders are followed; a folder that they lead to again is entered once, hidden ones are not. Taking names
    out of the list of folders keeps them from being entered.
    """
    seen: set[tuple[int, int]] = set()
    for name, children, names in os.walk(root, followlinks=True):
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in seen:
            children.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        children[:] = sorted((child for child in children if not child.startswith(".")), key=natural)
        yield Path(name), children, sorted(names, key=natural)


def natural(name: str | Path) -> list[tuple[int, int, str]]:
    """Key that sorts names as people count: ``frame_2`` before ``frame_10``."""
    parts = re.split(r"(\d+)", str(name))
    # digits of other scripts are no ints to count with
    return [(0, int(part), part) if part.isascii() and part.isdigit() else (1, 0, part) for part in parts if part]


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether ``path`` lies at or below ``folder`` once all links are followed; False of a loop of links."""
    try:
        return Path(path).resolve().is_relative_to(Path(folder).resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; NaN and infinity are refused because JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON: a regular file of at most `reading.LARGEST_RECORD` bytes and `reading.MOST_VALUES` values.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: no regular file, or larger.
        DamagedError: ``path`` is not valid JSON; names the file.
    """
    return parse_json(read_bytes(path, LARGEST_RECORD), str(path))


@overload
def read_record(path: Path) -> dict[str, Any]: ...
@overload
def read_record(path: Path, schema: type[T]) -> T: ...
def read_record(path: Path, schema: Any = dict[str, Any]) -> Any:
    """Read a JSON object that has the layout of ``schema``, see the module `schema`.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: ``path`` is not valid JSON or has another layout; names the file and the entry.
    """
    return check(read_json(path), schema, path)


def sha256(path: Path) -> str:
    """Of the bytes of a regular file, as hexadecimal digits; raises what `reading.open_regular` raises."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any] | None = None) -> None:
    """Write a safetensors file with a checksum; ``header`` is kept as one JSON string in its metadata.

    Raises:
        OSError: the disk is full, or the file cannot be written for another reason.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if header is not None:
        metadata["header"] = json.dumps(header, allow_nan=False)
    stored = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    metadata["crc32"] = _checksum(stored, metadata)
    with atomic_path(path) as temporary:
        try:
            save_file(stored, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in another order in every process: same content, same bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(ordered) <= size:  # what follows stays where it is; spaces fill the header up
            file.seek(8)
            file.write(ordered.ljust(size))


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a safetensors file: its tensors, and the header written by `save_tensors` (empty if there is none).

    Raises:
        FileNotFoundError: ``path`` does not exist.
        DamagedError: ``path`` is truncated, not a safetensors file, of a type torch does not have, or does not have the
            checksum `save_tensors` gave it; names the file.
        ValueError: no regular file, or the header is no JSON object.
    """
    from safetensors import safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        expected = _checksum(tensors, metadata) if "crc32" in metadata else None
    except MemoryError:
        raise
    except Exception as error:  # a damaged header may name types and shapes that torch stumbles over in its own ways
        raise DamagedError(f"{path} is not a whole safetensors file: {error}") from error
    if metadata.get("crc32") != expected:
        raise DamagedError(f"{path} is damaged: its content does not have the checksum it was written with")
    return tensors, read_header(path, metadata)


def load_some(path: Path, keys: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Only the tensors called ``keys``, under the names they stand for; of a file that `load_tensors` has read before.

    Raises:
        DamagedError: the file does not hold one of them; names the file.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(key) for name, key in keys.items()}
    except MemoryError:
        raise
    except Exception as error:
        raise DamagedError(f"{path} is not the safetensors file it was: {error}") from error


def state(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written anew: its number, size and time of writing."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON object under ``header`` in the metadata of a safetensors file; empty if there is none."""
    return check(parse_json(metadata.get("header", "{}"), f"{path}: header"), dict[str, Any], f"{path}: header")


def load_header(path: Path) -> dict[str, Any]:
    """The header that `save_tensors` wrote, alone; its checksum is not looked at. Raises what `load_tensors` raises."""
    return read_header(path, load_metadata(path))


def load_metadata(path: Path) -> dict[str, str]:
    """What whoever wrote a safetensors file says of it; raises what `load_tensors` raises."""
    from safetensors import safe_open

    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except Exception as error:
        raise DamagedError(f"{path} is not a whole safetensors file: {error}") from error


def _check_header(path: Path) -> None:
    """Bound the header, whose length stands in the first eight bytes, before it is parsed."""
    with open_regular(path) as file:
        start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _LARGEST_HEADER:
        raise DamagedError(f"{path} is not a whole safetensors file: its header has {length} bytes")


def check_values(path: Path | str, name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError, naming file and tensor, unless it holds finite floating-point numbers of 16 bits or more."""
    import torch

    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{path}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{path}: {name} has NaN or infinite values")


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """crc32 over header, names, types, shapes and values."""
    import torch

    crc = zlib.crc32(metadata.get("header", "").encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)};".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"
