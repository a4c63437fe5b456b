"""The one rule for everything that is written: nothing of the user's is lost.

A target that lies in, is or holds an input, or that is there and is not this project's own result of the same kind, is
refused by name before anything is written. A target given as a link is followed, and the rule is asked about what it
leads to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from subspace3d.files import discard, is_leftover, sweep, write_json
from subspace3d.log import logger

MARK = ".subspace3d"
"""File in a folder of results that says what they are, for the time before any of them is there."""
_HEAD = 1 << 16  # bytes of a file that say what it is
_LARGEST_RECORD = 1 << 28
_CRC = re.compile(rb'"crc32":"[0-9a-f]{8}"')
_PEFT = ("adapter_config.json", "adapter_model.safetensors", "README.md")


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
        if (
            target != output.path
            and output.argument == "out"
            and output.path in (config.out, getattr(config, "target", None))
        ):
            config = dataclasses.replace(config, out=target)
    return config


def declared(config: Any) -> tuple[list[Output], list[tuple[str, Path]]]:
    """What a command with these settings writes, and what it reads, as its ``writes`` and ``reads`` say."""
    writes, reads = getattr(config, "writes", None), getattr(config, "reads", None)
    return writes() if writes else [], reads() if reads else []


@dataclass(frozen=True)
class DatasetTargets:
    """Where a command puts data sets: OUT/<name><suffix>, and OUT/config-<name>.yaml, the settings they have.

    Attributes:
        out: their folder.
        name: what their names begin with.
        suffixes: one for each data set.
        lists_skipped: whether OUT/skipped-<name>.json is written too.
        settings: kind of the settings; none: those of generate.

    Raises:
        ValueError: a name that is no plain folder name.
    """

    out: Path
    name: str
    suffixes: tuple[str, ...]
    lists_skipped: bool = False
    settings: Kind | None = None

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name or self.name.startswith("."):
            raise ValueError(f"name must be a plain folder name, got {self.name!r}")

    @property
    def record(self) -> Path:
        return self.out / f"config-{self.name}.yaml"

    @property
    def skipped(self) -> Path:
        return self.out / f"skipped-{self.name}.json"

    def declared(self) -> list[Output]:
        found = [Output("out", self.record, self.settings or GENERATE_SETTINGS)]
        if self.lists_skipped:
            found.append(Output("out", self.skipped, SKIPPED))
        # where the settings stand, data sets of their name are added to; else they must be new
        kind = ADDED_TO if self.record.is_file() else NEW
        return found + [Output("out", self.out / f"{self.name}{suffix}", kind) for suffix in self.suffixes]

    def claim(self, inputs: list[tuple[str, Path]]) -> None:
        """Ask the rule about each of them.

        Raises:
            ValueError: one of them is not own.
        """
        for output in self.declared():
            claim(output.path, output.kind, output.argument, inputs)

    def replace_differing(self, config: Any, identity: tuple[str, ...], who: str) -> None:
        """Delete the data sets of this name if they were made with other settings.

        Args:
            config: the settings now.
            identity (tuple): the settings that decide what a scene looks like.
            who (str): the command, for the message that says what is replaced.

        Raises:
            ValueError: one of them is not own; nothing has been deleted.
        """
        from subspace3d.settings import differing

        if not differing(self.record, config, identity):
            return
        replace(self._found(), DATASET, who)
        replace([self.skipped], SKIPPED, who)
        # last, so that a call that was cut off finds what is left to do
        replace([self.record], self.settings or GENERATE_SETTINGS, who)

    def check_same(self, config: Any, identity: tuple[str, ...], made: str) -> None:
        """Refuse to add to data sets of this name that other settings made, see `settings.check_same`.

        The settings of a run that ended before its first scene bind nothing.
        """
        from subspace3d.settings import check_same

        if any(next(_entries(folder), None) is not None for folder in self._found()):
            check_same(self.record, config, identity, made)

    def remove_empty(self) -> None:
        """Remove what killed processes left in the data sets, and those that hold nothing then."""
        for suffix in self.suffixes:
            folder = self.out / f"{self.name}{suffix}"
            sweep(folder)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _found(self) -> list[Path]:
        """Folders that are there and have the name of one of the data sets, of whatever settings."""
        made = re.compile(re.escape(self.name) + r"(_\d\d|_train|_test|_cross)?")
        folders = self.out.iterdir() if self.out.is_dir() else ()
        found = sorted(path for path in folders if path.is_dir() and made.fullmatch(path.name))
        # of names that begin alike some may be settings' of their own
        return [
            path
            for path in found
            if path.name == self.name or not self.record.with_name(f"config-{path.name}.yaml").exists()
        ]


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
        return path.is_dir() and not path.is_symlink() and any(_entries(path)) and _holds_only(path, kinds)

    try:
        return all(belongs(folder / name) for name in _entries(folder))
    except OSError:  # a folder that may not be read is somebody else's
        return False


def _entries(folder: Path) -> Iterator[str]:
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


# what the kinds of results are known by


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _has_header(name: str) -> Callable[[Path], bool]:
    """A safetensors file whose header names this format; also a damaged one."""
    return lambda path: f'\\"format\\": \\"{name}\\"'.encode() in _head(path)


def _is_checked_tensors(path: Path) -> bool:
    head = _head(path)
    return _CRC.search(head) is not None and b'"header":' not in head.partition(b"}")[0]


def _record(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_RECORD:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _settings_of(*keys: str) -> Callable[[Path], bool]:
    """Settings of a command as `settings.save` writes them."""

    def is_own(path: Path) -> bool:
        from subspace3d.settings import read_table

        try:
            return path.is_file() and set(keys) <= read_table(path).keys()
        except ValueError:
            # the settings of data sets are read again before they are written, with a message that says what is wrong
            return path.name.startswith("config-")

    return is_own


def settings_like(settings: dict[str, Any]) -> Kind:
    """Settings that have half of these keys or more: those of the same command, in whatever version."""

    def is_own(path: Path) -> bool:
        from subspace3d.settings import read_table

        try:
            return 2 * len(settings.keys() & read_table(path).keys()) >= len(settings)
        except ValueError:
            return False

    return Kind("settings of this command", False, is_own)


def _is_marked(path: Path, kind: str) -> bool:
    return _record(path / MARK).get("kind") == kind


def _is_run(path: Path) -> bool:
    if _is_marked(path, RUN.what) or _is_tuned(path / "tuned"):
        return True
    if (path / "config.yaml").is_file():
        return FINETUNE_SETTINGS.is_own(path / "config.yaml")
    return any("step" in _record(state) for state in path.glob("checkpoints/step_*/state.json")) or _is_metrics(
        path / "metrics.jsonl"
    )


def _is_metrics(path: Path) -> bool:
    if not path.is_file():
        return False
    head = _head(path)
    first = head.partition(b"\n")[0]
    return not head or (first.startswith(b'{"step": ') and all(key in first for key in (b'"skipped": ', b'"images": ')))


def _is_tuned(path: Path) -> bool:
    return _record(path / "tuned.json").get("format") == "subspace3d-tuned"


def _tuned_content(path: Path) -> set[str]:
    files = _record(path / "tuned.json").get("files")
    return {"tuned.json", *(f"adapter/{name}" for name in _PEFT), *(files if isinstance(files, dict) else ())}


def _is_scene(path: Path) -> bool:
    return _record(path / "scene.json").get("format") == "subspace3d-scene"


def _scene_content(path: Path) -> set[str]:
    frames = _record(path / "scene.json").get("frames")
    named = {
        frame.get(key)
        for frame in (frames if isinstance(frames, list) else ())
        if isinstance(frame, dict)
        for key in ("image", "depth", "mask")
    }
    return {"scene.json", *(os.path.normpath(name) for name in named if isinstance(name, str))}


def _dataset_content(path: Path) -> set[str]:
    scenes = [scene for scene in path.iterdir() if _is_scene(scene)]
    return {os.path.join(scene.name, name) for scene in scenes for name in _scene_content(scene)}


def _is_dataset(path: Path) -> bool:
    return all(_is_scene(path / name) for name in _entries(path))


def _is_adapted(path: Path) -> bool:
    return isinstance(_record(path / "adapt.json").get("settings"), dict)


def _adapted_content(path: Path) -> set[str]:
    events = {f"tensorboard/{file.name}" for file in path.glob("tensorboard/events.out.tfevents.*")}
    return {*_PEFT, "adapt.json", "metrics.jsonl", *events}


def _is_exported(path: Path) -> bool:
    return (path / "adapter_config.json").is_file() and _is_checked_tensors(path / "adapter_model.safetensors")


def _is_analysis(path: Path) -> bool:
    found = _record(path / "analysis.json").get("format") == "subspace3d-analysis"
    return found or _is_marked(path, ANALYSIS.what)


def _is_fit(path: Path) -> bool:
    return _record(path / "fit.json").get("format") == "subspace3d-fit" or _is_marked(path, FIT.what)


def _is_evaluation(path: Path) -> bool:
    if _is_marked(path, EVALUATION.what) or _record(path / "results.json").get("format") == "subspace3d-results":
        return True
    return any("key" in _record(file) for file in path.glob("methods/*.json"))


def _is_page(path: Path) -> bool:
    head = _head(path)
    if b'<meta name="generator" content="subspace3d">' in head:
        return True
    # of 0.1.0, which did not name itself
    return head.startswith(b"<!doctype html>") and b"<title>subspace3d: " in head


def _is_rows(path: Path) -> bool:
    lines = _head(path).splitlines()
    return bool(lines) and lines[0].startswith(b"{") and b'"device": "' in lines[0]


def _is_skipped(path: Path) -> bool:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # named so by this project alone, and read again with a message
    return isinstance(value, dict) and all(isinstance(reasons, list) for reasons in value.values())


def _is_sheet(path: Path) -> bool:
    return GENERATE_SETTINGS.is_own(path.with_name(f"config-{path.stem}.yaml"))


SUBSPACE = Kind("a mined subspace", False, _has_header("subspace3d-subspace"))
BASIS = Kind("a basis", False, _has_header("subspace3d-basis"))
TENSORS = Kind("a safetensors file", False, _is_checked_tensors)
SCENE = Kind("a scene", True, _is_scene, _scene_content)
DATASET = Kind("a data set", True, _is_dataset, _dataset_content)
ADAPTED = Kind("an adapter", True, _is_adapted, _adapted_content)
EXPORTED = Kind("an exported adapter", True, _is_exported, lambda path: set(_PEFT))
TUNED = Kind("a tuned result", True, _is_tuned, _tuned_content)
ANALYSIS = Kind("an analysis", True, _is_analysis)
FIT = Kind("a fit", True, _is_fit)
EVALUATION = Kind("an evaluation", True, _is_evaluation)
PAGE = Kind("a report", False, _is_page)
RUN = Kind("a fine-tuning run", True, _is_run, beside=(SUBSPACE, ANALYSIS, FIT, EVALUATION, PAGE))
FOLDER = Kind("a folder", True, lambda path: True, is_shared=True)
ADDED_TO = Kind("a data set", True, lambda path: True)
NEW = Kind("a data set (with its config-<name>.yaml)", True, lambda path: False)
SHEET = Kind("a contact sheet", False, _is_sheet)
ROWS = Kind("rows of a benchmark", False, _is_rows)
SKIPPED = Kind("a list of what was skipped", False, _is_skipped)
GENERATE_SETTINGS = Kind("settings of generate", False, _settings_of("out", "attribute", "preset", "scenes"))
CONVERT_SETTINGS = Kind("settings of convert", False, _settings_of("out", "from", "root"))
ADAPT_SETTINGS = Kind("settings of adapt", False, _settings_of("scenes", "out", "backbone", "rank"))
FINETUNE_SETTINGS = Kind("settings of finetune", False, _settings_of("scenes", "out", "method", "backbone"))
DEMO_SETTINGS = Kind("settings of demo", False, _settings_of("smoke", "seed"))
DEMO = Kind("a run of demo", True, lambda path: DEMO_SETTINGS.is_own(path / "config.yaml"))
EXPERIMENTS = Kind("a run of experiments", True, lambda path: "starts" in _record(path / "experiments.json"))


# for the settings of commands


def named(**paths: Any) -> list[tuple[str, Path]]:
    """(setting, path) of those that are given."""
    given = ((name, path if isinstance(path, tuple) else (path,)) for name, path in paths.items() if path is not None)
    return [(name, Path(path)) for name, several in given for path in several]


def tuned_folders(runs: Iterable[Path]) -> tuple[Path, ...]:
    """The folder with tuned.json of each run."""
    return tuple(run if (run / "tuned.json").is_file() else run / "tuned" for run in map(Path, runs))
