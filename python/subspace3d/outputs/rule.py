"""The one rule for everything that is written: nothing of the user's is lost.

A target that lies in, is or holds an input, or that is there and is not this project's own result of the same kind, is
refused by name before anything is written. A target given as a link is followed, and the rule is asked about what it
leads to.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace3d.files import discard, is_leftover, sweep, write_json
from subspace3d.log import logger

MARK = ".subspace3d"
"""File in a folder of results that says what they are, for the time before any of them is there."""


@dataclass(frozen=True)
class Kind:
    """A kind of result.

    Attributes:
        what: the words for it in messages.
        is_folder: a folder, else a file.
        is_own: whether this project has written what stands at a path.
        content: the files of such a folder, relative to it, where replacing it deletes all of it; None where results
            are only added.
        is_shared: results of several kinds may lie in the folder, and what is read may too.
        beside: kinds of results that may be in the folder, or in folders in it, before the first of its own.
    """

    what: str
    is_folder: bool
    is_own: Callable[[Path], bool]
    content: Callable[[Path], set[str]] | None = None
    is_shared: bool = False
    beside: tuple[Kind, ...] = ()


@dataclass(frozen=True)
class Output:
    """A target: the setting that names it, the path, its kind."""

    argument: str
    path: Path
    kind: Kind


def claim(path: Path, kind: Kind, argument: str = "path", inputs: Iterable[tuple[str, Path]] = ()) -> Path:
    """Ask the rule about one target; returns where to write, which is ``path`` unless that is a link.

    Args:
        path (Path): the target.
        kind (Kind): what will be written there.
        argument (str): name of the setting in messages.
        inputs (iterable): (setting, path) of what is read.

    Raises:
        ValueError: the target is refused; names argument, rule and path.
    """
    path = resolve(Path(path), argument)
    for name, source in inputs:
        _check_apart(argument, path, name, source, kind.is_shared)
    _check_parents(argument, path)
    sweep(path.parent)  # puts back what a killed process had set aside
    if not os.path.lexists(path):
        return path
    if path.is_dir() != kind.is_folder or not (path.is_dir() or path.is_file()):
        wanted, found = ("folder", "file") if kind.is_folder else ("regular file", "folder or a special file")
        raise ValueError(f"{argument} must be a {wanted}, got {path}, which is a {found}")
    if kind.is_folder:
        _check_folder(argument, path, kind)
        sweep(path)  # where all is done nothing is written that would do it
    elif path.stat().st_size and not kind.is_own(path):
        raise ValueError(
            f"{argument} must be a new file or {kind.what} that subspace3d has written, got {path}, which is neither; "
            "nothing was changed"
        )
    return path


def check(config: Any) -> Any:
    """Ask the rule about every target of a command; returns its settings with links among the targets followed."""
    outputs, inputs = declared(config)
    for output in outputs:
        target = claim(output.path, output.kind, output.argument, inputs)
        given = getattr(config, output.argument), getattr(config, "target", None)
        if target != output.path and output.path in given:
            config = dataclasses.replace(config, **{output.argument: target})
    return config


def declared(config: Any) -> tuple[list[Output], list[tuple[str, Path]]]:
    """What a command with these settings writes, and what it reads, as its ``writes`` and ``reads`` say."""
    writes, reads = getattr(config, "writes", None), getattr(config, "reads", None)
    return writes() if writes else [], reads() if reads else []


def mark(folder: Path, kind: Kind) -> None:
    """Say in ``folder``, before anything else is written there, that its results are this project's."""
    path = Path(folder) / MARK
    if not path.is_file():
        write_json(path, {"kind": kind.what})


def resolve(path: Path, argument: str = "path") -> Path:
    """``path``, or what it leads to if it is a link."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ValueError(f"{argument} must lead somewhere, got {path}, a link in a loop")
    return target


def foreign_content(path: Path, kind: Kind) -> list[str]:
    """Files in a folder of results that do not belong to them, relative to it."""
    own = set() if kind.content is None else kind.content(path) | {MARK}
    return [name for name in _files(path) if name not in own]


def replace(paths: Iterable[Path], kind: Kind, who: str) -> None:
    """Delete own results, saying on stderr which.

    Raises:
        ValueError: one of them is not own, or holds other files; nothing has been deleted.
    """
    chosen = [path for path in map(Path, paths) if os.path.lexists(path)]
    for path in chosen:
        claim(path, kind, "out")
    for path in chosen:
        logger.warning(f"{who} replaces {path}")
        discard(path)


def _check_apart(argument: str, path: Path, name: str, source: Path, may_hold: bool) -> None:
    if not os.path.exists(source):
        return
    target, source = Path(os.path.realpath(path)), Path(os.path.realpath(source))
    pairs = [(target, source)] if may_hold else [(target, source), (source, target)]
    for inner, outer in pairs:
        # compared by identity: one folder may have two names
        if outer.exists() and any(_is_same(part, outer) for part in (inner, *inner.parents)):
            relation = "be" if _is_same(inner, outer) else "lie in" if inner == target else "hold"
            raise ValueError(f"{argument} must not {relation} what is read ({name} {source}), got {path}")


def _is_same(first: Path, second: Path) -> bool:
    return first == second or (first.exists() and os.path.samefile(first, second))


def _check_parents(argument: str, path: Path) -> None:
    for parent in Path(os.path.abspath(path)).parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise ValueError(f"{argument} must lie in a folder, got {path}: {parent} is none")
            return


def _check_folder(argument: str, path: Path, kind: Kind) -> None:
    if kind.content is not None:
        here = Path.cwd()
        if any(_is_same(part, path) for part in (here, *here.parents)):
            raise ValueError(f"{argument} must not be or hold the working folder, which it would replace, got {path}")
    if _holds_only(path, kind.beside):
        return
    if not kind.is_own(path):
        raise ValueError(
            f"{argument} must be a new or empty folder or {kind.what} that subspace3d has written, got {path}, which "
            "is none of these; nothing was changed"
        )
    foreign = foreign_content(path, kind) if kind.content is not None else []
    if foreign:
        raise ValueError(
            f"{argument} must hold nothing but {kind.what}, all of which is replaced, got {path}, which also holds "
            f"{foreign[0]}; nothing was changed"
        )


def _holds_only(folder: Path, kinds: Iterable[Kind]) -> bool:
    """Whether all that counts in ``folder`` are results of these kinds, or folders of which that is true."""

    def belongs(path: Path) -> bool:
        if any(kind.is_own(path) for kind in kinds):
            return True
        return path.is_dir() and not path.is_symlink() and any(entries(path)) and _holds_only(path, kinds)

    try:
        return all(belongs(folder / name) for name in entries(folder))
    except OSError:  # a folder that may not be read is somebody else's
        return False


def entries(folder: Path) -> Iterator[str]:
    """Names in ``folder`` that count: no locks without content, nothing temporary of this project or of a browser's."""
    for name in sorted(os.listdir(folder)):
        path = folder / name
        is_lock = name.startswith(".") and name.endswith(".lock") and path.is_file() and not path.stat().st_size
        if not (is_lock or is_leftover(name) or (_is_browsers(name) and path.is_file())):
            yield name


def _is_browsers(name: str) -> bool:
    """Whether a file of this name is one that file browsers put into any folder they show, and make again."""
    return name in (".DS_Store", "Thumbs.db")


def _files(folder: Path) -> list[str]:
    """All that counts and is no folder at or below ``folder``; a link to a folder is not entered, and counts."""
    found = []
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        counting = [*(name for name in names if not _is_browsers(name)), *links]
        found += [os.path.relpath(os.path.join(parent, name), folder) for name in counting]
        folders[:] = [name for name in folders if not is_leftover(name)]
    return sorted(name for name in found if not is_leftover(os.path.basename(name)))


# for the settings of commands


def named(**paths: Any) -> list[tuple[str, Path]]:
    """(setting, path) of those that are given."""
    given = ((name, path if isinstance(path, tuple) else (path,)) for name, path in paths.items() if path is not None)
    return [(name, Path(path)) for name, several in given for path in several]
