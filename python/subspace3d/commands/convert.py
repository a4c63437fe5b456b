"""Turn a data set on disk into scenes, OUT/<name>[_<split>]/<scene>/scene.json.

A scene that stands is not made again, so a run that was cut off continues. What is left out, and why, is printed and
kept in OUT/skipped-<name>.json.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from subspace3d import outputs, settings
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.source import PARTS, Report, SourceScene
from subspace3d.files import read_record, sweep, write_json
from subspace3d.formats.scene import Frame, SceneFile, write_frames
from subspace3d.log import logger
from subspace3d.progress import Progress

_READERS = {
    "colmap": ("colmap", "find"),
    "nerfstudio": ("nerfstudio", "find"),
    "images": ("images", "find"),
    "renderings": ("renderings", "find"),
    "co3d": ("co3d", "find"),
    "7scenes": ("indoor", "find_7scenes"),
    "nrgbd": ("indoor", "find_nrgbd"),
    "scannet": ("indoor", "find_scannet"),
    "scannet++": ("indoor", "find_scannetpp"),
    "bonn": ("indoor", "find_bonn"),
    "hiroom": ("indoor", "find_hiroom"),
    "eth3d": ("stereo", "find_eth3d"),
    "dtu": ("stereo", "find_dtu"),
    "sintel": ("stereo", "find_sintel"),
    "da3-bench": ("stereo", "find_da3_bench"),
    "thuman": ("scans", "find_thuman"),
    "2k2k": ("scans", "find_2k2k"),
    "clearpose": ("clearpose", "find"),
    "soap": ("handshake", "find"),
    "hndr": ("handshake", "find"),
    "rgbd": ("rgbd_folder", "find"),
}
# settings that decide what a scene looks like, by kind
_IMAGE_SETTINGS = ("from_", "frame_step", "max_side")
_VIEW_SETTINGS = (*_IMAGE_SETTINGS, "depth_scale", "exif")
_SCAN_SETTINGS = ("from_", "resolution", "spp", "scan_views", "scan_scale")
_IDENTITY: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_READERS, _VIEW_SETTINGS),
    "thuman": _SCAN_SETTINGS,
    "2k2k": _SCAN_SETTINGS,
    "clearpose": _IMAGE_SETTINGS,
    "soap": _IMAGE_SETTINGS,
    "hndr": _IMAGE_SETTINGS,
    "rgbd": (*_VIEW_SETTINGS, "poses"),
    "bonn": (*_VIEW_SETTINGS, "poses"),
}
_SUFFIXES = {
    **dict.fromkeys(("thuman", "2k2k", "clearpose", "co3d"), ("_train", "_test")),
    "7scenes": ("_train", "_test", ""),
}
_SHOWN = 10  # reasons printed
_NOTED = ": used"  # in what is told of something that was used
_LOST = "left out: "  # before the reason that costs a whole scene


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
        suffixes = _SUFFIXES.get(self.from_, ("",))
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
    reports = {"root": Report()}
    module, function = _READERS[kind]
    find = getattr(importlib.import_module(f"subspace3d.datasets.readers.{module}"), function)
    scenes = _choose(find(config, config.root, reports["root"]), config.only)
    settings.save(record, config)
    folders = {_place(config.out, name, scene): scene for scene in scenes}
    if len(folders) < len(scenes):
        raise ValueError(f"root: two scenes below {config.root} would have one name; convert their folders one by one")
    datasets = sorted({folder.parent for folder in folders})
    standing = sum((folder / "scene.json").is_file() for folder in folders)
    before = _read_skipped(config.out / f"skipped-{name}.json")
    try:
        done = _convert_all(folders, f"convert {name}", reports, before)
    finally:
        _remove_leftovers(datasets)
        # of scenes outside this run (--only) the earlier reasons still hold
        now = {scene: report.reasons for scene, report in reports.items()}
        skipped = {key: reasons for key, reasons in (before | now).items() if reasons}
        write_json(config.out / f"skipped-{name}.json", skipped)
    _print_skipped(now, config.out / f"skipped-{name}.json")
    if not done:
        first = next((reasons[0] for reasons in now.values() if reasons), "")
        raise ValueError(f"root: none of the {len(scenes)} scenes in {config.root} could be converted; first: {first}")
    for line in summary(folders, reports):
        logger.info(line)
    logger.info(f"{done} of {len(scenes)} scenes in {', '.join(map(str, datasets))}")
    if standing:
        logger.info(
            f"{standing} were there before and were not read again; a scene is made anew once its folder is deleted"
        )
    logger.info(f"next: subspace3d validate {shlex.quote(str(config.out))}")
    return [folder for folder in datasets if folder.is_dir()]


def summary(folders: Mapping[Path, SourceScene], reports: Mapping[str, Report]) -> Iterator[str]:
    """How many images, depth maps and cameras were found, used and left out, and why, in lines."""
    found, used = Counter[str](), Counter[str]()
    lost, noted = Counter[str](), Counter[str]()
    for folder, scene in folders.items():
        report = reports[scene.name]
        here, kept = Counter(report.found), Counter[str]()
        if (folder / "scene.json").is_file():
            file = SceneFile(folder)
            # of a scene that stood before this run
            here = here if here.total() else Counter(file.provenance.get("found") or {})
            kept = file.counts()
            here |= kept
        found += here
        used += kept
        for sentence in report.reasons:
            (noted if _NOTED in sentence else lost)[kind_of(sentence)] += 1
    words = []
    for part in PARTS:
        less = found[part] - used[part]
        words.append(f"{found[part]} {part} found, {used[part]} used" + (f", {less} left out" if less else ""))
    yield "; ".join(words)
    for what, reasons in (("left out", lost), ("noted", noted)):
        if reasons:
            yield f"{what}: " + "; ".join(f"{n} x {why}" for why, n in reasons.most_common(5))
    if not used["cameras"]:
        yield "no cameras: the images serve tuning that needs none; they cannot be trained on or evaluated otherwise"
    elif not used["depths"]:
        yield "no depth: cameras can be trained and evaluated, depth and points cannot"


def kind_of(sentence: str) -> str:
    """A sentence about one file in words that are the same for others: without its name, paths and numbers."""
    name, _, why = sentence.rpartition(": ") if sentence.count(": ") == 1 else sentence.partition(": ")
    words = [
        word for word in re.split(r" \(|; first: |, got \[", why or name)[0].split() if not re.search(r"[/\\]", word)
    ]
    text = re.sub(r"-?\d[\d.e+-]*", "N", " ".join(words)).rstrip(":;,")
    return text if len(text) <= 90 else text[:89] + "…"


def _choose(scenes: list[SourceScene], only: tuple[str, ...]) -> list[SourceScene]:
    names = {scene.name for scene in scenes}
    unknown = sorted(set(only) - names)
    if unknown:
        raise ValueError(f"only must name scenes that are there ({', '.join(sorted(names)[:4])}, ...), got {unknown}")
    return [scene for scene in scenes if not only or scene.name in only]


def _place(out: Path, name: str, scene: SourceScene) -> Path:
    return out / (f"{name}_{scene.split}" if scene.split else name) / scene.name


def _convert_all(
    folders: dict[Path, SourceScene], label: str, reports: dict[str, Report], before: dict[str, list[str]]
) -> int:
    standing = {folder for folder in folders if (folder / "scene.json").is_file()}
    done = len(standing)
    with Progress(label, len(folders), "scene", initial=done) as progress:
        for folder, scene in folders.items():
            if folder in standing:
                reports[scene.name] = Report(before.get(scene.name, []))
                continue
            # the root itself may be the scene
            report = reports.setdefault(scene.name, Report())
            try:
                _convert(folder, scene, report)
                done += 1
            except (ValueError, OSError) as error:
                report(f"{_LOST}{error}")
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

    found = {"found": report.found} if any(report.found.values()) else {}
    provenance = {**content.provenance, **found, "split": scene.split or None}
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


def _telling_first(skipped: Mapping[str, list[str]]) -> list[str]:
    """``scene: reason``: scenes that were lost, then one of each kind of reason in each scene, then the rest."""
    seen: set[tuple[str, str]] = set()
    lost: list[str] = []
    new: list[str] = []
    more: list[str] = []
    for scene, reasons in skipped.items():
        for reason in reasons:
            key = (scene, kind_of(reason))
            (lost if reason.startswith(_LOST) else more if key in seen else new).append(f"{scene}: {reason}")
            seen.add(key)
    return lost + new + more


def _print_skipped(skipped: dict[str, list[str]], path: Path) -> None:
    lines = _telling_first(skipped)
    for line in lines[:_SHOWN]:
        logger.info(f"{'noted' if _NOTED in line else 'skipped'} {line}")
    if len(lines) > _SHOWN:
        logger.info(f"skipped or noted {len(lines) - _SHOWN} more, see {path}")
