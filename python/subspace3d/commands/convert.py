"""Turn a data set on disk into scenes, OUT/<name>[_<split>]/<scene>/scene.json.

A scene that stands is not made again, so a run that was cut off continues. What is left out, and why, is printed and
kept in OUT/skipped-<name>.json.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from subspace3d import outputs, settings
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.source import Report, SourceScene
from subspace3d.files import read_record, sweep, write_json
from subspace3d.formats.scene import Frame, write_frames
from subspace3d.log import logger
from subspace3d.progress import Progress

_READERS = {
    "thuman": ("scans", "find_thuman"),
    "2k2k": ("scans", "find_2k2k"),
    "clearpose": ("clearpose", "find"),
    "soap": ("handshake", "find"),
    "hndr": ("handshake", "find"),
    "rgbd": ("rgbd_folder", "find"),
}
# settings that decide what a scene looks like, by kind
_IMAGE_SETTINGS = ("from_", "frame_step", "max_side")
_IDENTITY = {
    "thuman": ("from_", "resolution", "spp", "scan_views", "scan_scale"),
    "2k2k": ("from_", "resolution", "spp", "scan_views", "scan_scale"),
    "clearpose": _IMAGE_SETTINGS,
    "soap": _IMAGE_SETTINGS,
    "hndr": _IMAGE_SETTINGS,
    "rgbd": (*_IMAGE_SETTINGS, "poses", "depth_scale"),
}
_SPLIT_SOURCES = ("thuman", "2k2k", "clearpose")
_SHOWN = 10  # reasons printed


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ReaderConfig):
    """Turn a data set on disk into scenes: OUT/<name>[_<split>]/<scene>/scene.json."""

    out: Path
    """Folder of the data sets."""
    name: str = ""
    """Prefix of the data set names; empty: the kind."""
    only: tuple[str, ...] = ()
    """Convert only the scenes of these names; none: all."""
    overwrite: bool = False
    """Replace data sets of this name that were made with other settings, and say which; otherwise they are refused."""

    def lock(self) -> tuple[Path, str]:
        """Data sets of different names may be made in one folder at a time."""
        return self.out, Path(self.name or self.from_).name

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(root=self.root)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.FOLDER), *self._targets().declared()]

    def _targets(self) -> outputs.DatasetTargets:
        suffixes = ("_train", "_test") if self.from_ in _SPLIT_SOURCES else ("",)
        return outputs.DatasetTargets(self.out, self.name or self.from_, suffixes, True, outputs.CONVERT_SETTINGS)

    def replace_others(self) -> None:
        """Delete the data sets of this name that other settings made, if that is asked for."""
        self._targets().claim(self.reads())
        if self.overwrite:
            self._targets().replace_differing(self, _IDENTITY[self.from_], "convert --overwrite")


def run(config: ConvertConfig) -> list[Path]:
    """Convert what is missing and return the folders of the data sets.

    Raises:
        FileNotFoundError: the root does not exist.
        ValueError: the root does not have the layout of the kind, scenes of this name were made with other settings,
            or no scene could be converted.
    """
    config = outputs.check(config)
    kind = config.from_
    name = config.name or kind
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"name must be a plain folder name, got {name!r}")
    if not config.root.is_dir():
        raise FileNotFoundError(f"root: no such folder: {config.root}")
    record = config.out / f"config-{name}.yaml"
    config.replace_others()
    settings.check_same(record, config, _IDENTITY[kind], "scenes")
    skipped: dict[str, list[str]] = {}
    module, function = _READERS[kind]
    find = getattr(importlib.import_module(f"subspace3d.datasets.readers.{module}"), function)
    scenes = _choose(find(config, config.root, skipped.setdefault("root", []).append), config.only)
    settings.save(record, config)
    folders = {_place(config.out, name, scene): scene for scene in scenes}
    datasets = sorted({folder.parent for folder in folders})
    before = _read_skipped(config.out / f"skipped-{name}.json")
    try:
        done = _convert_all(folders, f"convert {name}", skipped, before)
    finally:
        _remove_leftovers(datasets)
        # of scenes outside this run (--only) the earlier reasons still hold
        skipped = {key: reasons for key, reasons in (before | skipped).items() if reasons}
        write_json(config.out / f"skipped-{name}.json", skipped)
    _print_skipped(skipped, config.out / f"skipped-{name}.json")
    if not done:
        first = next((reasons[0] for reasons in skipped.values()), "")
        raise ValueError(f"root: none of the {len(scenes)} scenes in {config.root} could be converted; first: {first}")
    logger.info(f"{done} of {len(scenes)} scenes in {', '.join(map(str, datasets))}")
    logger.info(f"next: subspace3d validate {config.out}")
    return [folder for folder in datasets if folder.is_dir()]


def _choose(scenes: list[SourceScene], only: tuple[str, ...]) -> list[SourceScene]:
    names = {scene.name for scene in scenes}
    unknown = sorted(set(only) - names)
    if unknown:
        raise ValueError(f"only must name scenes that are there ({', '.join(sorted(names)[:4])}, ...), got {unknown}")
    return [scene for scene in scenes if not only or scene.name in only]


def _place(out: Path, name: str, scene: SourceScene) -> Path:
    return out / (f"{name}_{scene.split}" if scene.split else name) / scene.name


def _convert_all(
    folders: dict[Path, SourceScene], label: str, skipped: dict[str, list[str]], before: dict[str, list[str]]
) -> int:
    standing = {folder for folder in folders if (folder / "scene.json").is_file()}
    done = len(standing)
    with Progress(label, len(folders), "scene", initial=done) as progress:
        for folder, scene in folders.items():
            if folder in standing:
                skipped[scene.name] = before.get(scene.name, [])
                continue
            reasons = skipped.setdefault(scene.name, [])
            try:
                _convert(folder, scene, reasons.append)
                done += 1
            except (ValueError, OSError) as error:
                reasons.append(f"left out: {error}")
            progress.advance(note=scene.name)
    return done


def _convert(folder: Path, scene: SourceScene, report: Report) -> None:
    content = scene.read(report)

    def at_least_one() -> Iterator[Frame]:
        count = 0
        for frame in content.frames:
            count += 1
            yield frame
        if count == 0:
            raise ValueError("none of its frames can be used")

    provenance = {**content.provenance, "split": scene.split or None}
    write_frames(
        folder,
        at_least_one(),
        provenance,
        content.unit,
        content.depth_scale,
        translation_known=content.translation_known,
    )


def _read_skipped(path: Path) -> dict[str, list[str]]:
    return read_record(path, dict[str, list[str]]) if path.is_file() else {}


def _remove_leftovers(datasets: list[Path]) -> None:
    """Remove unfinished scene folders, which a process that was killed could not remove itself."""
    for folder in datasets:
        sweep(folder)


def _print_skipped(skipped: dict[str, list[str]], path: Path) -> None:
    lines = [f"{name}: {reason}" for name, reasons in skipped.items() for reason in reasons]
    for line in lines[:_SHOWN]:
        logger.info(f"skipped {line}")
    if len(lines) > _SHOWN:
        logger.info(f"skipped {len(lines) - _SHOWN} more, see {path}")
