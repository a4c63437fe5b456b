"""Turn a data set on disk into scenes, OUT/<name>[_<split>]/<scene>/scene.json.

A scene that stands is not made again, so a run that was cut off continues. Each scene is a job of its own. What is left
out, and why, is printed and kept in OUT/skipped-<name>.json.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from subspace3d import outputs, settings
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.source import PARTS, Report, SourceScene, in_words
from subspace3d.files import read_record, write_json
from subspace3d.formats.dataset_targets import DatasetTargets
from subspace3d.formats.scene import Frame, SceneFile, write_frames
from subspace3d.jobs.cluster import Cluster, absolute, joined_cluster
from subspace3d.jobs.options import ClusterOptions
from subspace3d.jobs.pool import run_jobs
from subspace3d.jobs.work import exit_on_failures
from subspace3d.log import logger
from subspace3d.machine import usable_cores
from subspace3d.mitsuba_variant import choose_variant, set_threads
from subspace3d.progress import Progress
from subspace3d.settings import require

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
_RENDERED = ("thuman", "2k2k")  # the views of scans
_SHOWN = 10  # reasons printed
_KINDS = 5  # kinds of reasons in the last lines
_NOTED = ": used"  # in what is told of something that was used
_LOST = "left out: "  # before the reason that costs a whole scene
# from its first word with a slash to its suffix: names may have blanks
_PATH = re.compile(r"\S*[/\\].*?\.\w{1,5}(?=[\s:,;)]|$)|\S*[/\\]\S*")
# a size like 4x4 belongs to the rule, other numbers to the file
_NUMBER = re.compile(r"\b(\dx\d)\b|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ReaderConfig, ClusterOptions):
    """Turn a data set on disk into scenes: OUT/<name>[_<split>]/<scene>/scene.json."""

    out: Path
    """Folder of the data sets."""
    name: str = ""
    """Prefix of the data set names; empty: the kind."""
    only: tuple[str, ...] = ()
    """Convert only the scenes of these names; none: all."""
    workers: int = 1
    """Scenes converted at a time, each in a process of its own."""
    overwrite: bool = False
    """Replace data sets of this name that were made with other settings, and say which; otherwise they are refused."""

    def __post_init__(self) -> None:
        ReaderConfig.__post_init__(self)
        ClusterOptions.__post_init__(self)
        require(self.workers >= 1, "workers", "at least 1", self.workers)

    def lock(self) -> tuple[Path, str]:
        """Data sets of different names may be made in one folder at a time."""
        return self.out, Path(self.name or self.from_).name

    def reads(self) -> list[tuple[str, Path]]:
        return outputs.named(root=self.root)

    def writes(self) -> list[outputs.Output]:
        return [outputs.Output("out", self.out, outputs.FOLDER), *self.targets.declared()]

    @property
    def targets(self) -> DatasetTargets:
        """Where the scenes go."""
        suffixes = _SUFFIXES.get(self.from_, ("",))
        return DatasetTargets(self.out, self.name or self.from_, suffixes, True, outputs.CONVERT_SETTINGS)

    def replace_others(self) -> None:
        """Delete the data sets of this name that other settings made, if that is asked for."""
        self.targets.claim(self.reads())
        if self.overwrite:
            self.targets.replace_differing(self, _IDENTITY[self.from_], "convert --overwrite")


def run(config: ConvertConfig) -> list[Path]:
    """Convert what is missing and return the folders of the data sets.

    Raises:
        FileNotFoundError: the root does not exist.
        ValueError: the root does not have the layout of the kind, scenes of this name were made with other settings,
            no scene could be converted, or no cluster.
        SystemExit: with 1 if processes died over scenes; the others stand.
    """
    if config.ray:
        config = absolute(config, "root", "out")
    config = outputs.check(config)
    targets = config.targets
    if not config.root.is_dir():
        raise FileNotFoundError(f"root: no such folder: {config.root}")
    config.replace_others()
    targets.check_same(config, _IDENTITY[config.from_], "scenes")
    reports = {"root": Report()}
    scenes = _find(config, reports["root"])
    settings.save(targets.record, config)
    datasets = sorted({folder.parent for folder in scenes})
    standing = sum(_stands(folder) for folder in scenes)
    before = _read_skipped(targets.skipped)
    try:
        failures = _convert_all(config, scenes, reports, before)
    finally:
        targets.remove_empty()
        # of scenes outside this run (--only) the earlier reasons still hold
        order = dict.fromkeys(["root", *(scene.name for scene in scenes.values())])
        now = {scene: reports[scene].reasons for scene in order if scene in reports}
        skipped = {key: reasons for key, reasons in (before | now).items() if reasons}
        write_json(targets.skipped, skipped)
    _print_skipped(now, targets.skipped)
    exit_on_failures("convert", "scenes", failures, len(scenes), config.out)
    done = sum(_stands(folder) for folder in scenes)
    if not done:
        reasons = [reason for those in now.values() for reason in those]
        lost = [reason.removeprefix(_LOST) for reason in reasons if reason.startswith(_LOST)]
        first = next(iter(lost or reasons), "")
        raise ValueError(f"root: none of the {len(scenes)} scenes in {config.root} could be converted; first: {first}")
    for line in summary(scenes, reports, config.root):
        logger.info(line)
    logger.info(f"{done} of {len(scenes)} scenes in {', '.join(map(str, datasets))}")
    if standing:
        logger.info(
            f"{standing} were there before and were not read again; a scene is made anew once its folder is deleted"
        )
    logger.info(f"next: subspace3d validate {shlex.quote(str(config.out))}")
    return [folder for folder in datasets if folder.is_dir()]


def _find(config: ConvertConfig, report: Report) -> dict[Path, SourceScene]:
    """The scenes that are wanted, by their folders in OUT."""
    module, function = _READERS[config.from_]
    find = getattr(importlib.import_module(f"subspace3d.datasets.readers.{module}"), function)
    scenes = _choose(find(config, config.root, report), config.only)
    folders = {_place(config.out, config.targets.name, scene): scene for scene in scenes}
    if len(folders) < len(scenes):
        raise ValueError(f"root: two scenes below {config.root} would have one name; convert their folders one by one")
    return folders


def summary(folders: Mapping[Path, SourceScene], reports: Mapping[str, Report], root: Path) -> Iterator[str]:
    """How many images, depth maps and cameras were found, used and left out, and why, in lines."""
    found, used = Counter[str](), Counter[str]()
    for folder, scene in folders.items():
        report = reports[scene.name]
        here, kept = Counter(report.found), Counter[str]()
        if _stands(folder):
            file = SceneFile(folder)
            # of a scene that stood before this run
            here = here if here.total() else Counter(file.provenance.get("found") or {})
            kept = file.counts()
            here |= kept
        found += here
        used += kept
    # the root itself may be a scene
    told = dict.fromkeys(["root", *(scene.name for scene in folders.values())])
    reasons = [sentence.replace(f"{root}/", "/") for name in told for sentence in reports[name].reasons]
    lost = Counter(kind_of(sentence) for sentence in reasons if _NOTED not in sentence)
    noted = Counter(kind_of(sentence) for sentence in reasons if _NOTED in sentence)
    words = []
    for part in PARTS:
        less = found[part] - used[part]
        words.append(f"{found[part]} {part} found, {used[part]} used" + (f", {less} left out" if less else ""))
    yield "; ".join(words)
    for what, kinds in (("left out", lost), ("noted", noted)):
        if kinds:
            more = len(kinds) - _KINDS
            yield f"{what}: " + "; ".join(
                [f"{n} x {why}" for why, n in kinds.most_common(_KINDS)] + [f"{more} more kinds"] * (more > 0)
            )
    if not used["cameras"]:
        yield "no cameras: the images serve tuning that needs none; they cannot be trained on or evaluated otherwise"
    elif not used["depths"]:
        yield "no depth: cameras can be trained and evaluated, depth and points cannot"


def kind_of(sentence: str) -> str:
    """A sentence about one file in words that are the same for others: without its name, paths and numbers."""
    name, _, why = sentence.rpartition(": ") if sentence.count(": ") == 1 else sentence.partition(": ")
    rule = _PATH.sub(" ", re.split(r" \(|; first: |, got \[", why or name)[0])
    text = _NUMBER.sub(lambda match: match[1] or "N", " ".join(rule.split())).rstrip(" :;,")
    return text if len(text) <= 90 else text[:89] + "…"


def _choose(scenes: list[SourceScene], only: tuple[str, ...]) -> list[SourceScene]:
    names = {scene.name for scene in scenes}
    unknown = sorted(set(only) - names)
    if unknown:
        raise ValueError(f"only must name scenes that are there ({', '.join(sorted(names)[:4])}, ...), got {unknown}")
    return [scene for scene in scenes if not only or scene.name in only]


def _place(out: Path, name: str, scene: SourceScene) -> Path:
    return out / (f"{name}_{scene.split}" if scene.split else name) / scene.name


def _stands(folder: Path) -> bool:
    return (folder / "scene.json").is_file()


def _convert_all(
    config: ConvertConfig,
    scenes: Mapping[Path, SourceScene],
    reports: dict[str, Report],
    before: Mapping[str, list[str]],
) -> dict[str, str]:
    """Convert what is missing and add what was left out to ``reports``; returns what processes died of."""
    folders = {str(folder): folder for folder in scenes}
    missing = [place for place, folder in folders.items() if not _stands(folder)]
    for folder, scene in scenes.items():
        if _stands(folder):
            reports[scene.name] = Report(before.get(scene.name, []))
    if not missing:
        return {}
    label = f"convert {config.targets.name}"
    with Progress(label, len(scenes), "scene", initial=len(scenes) - len(missing)) as progress:

        def take(place: str, report: Report) -> None:
            # the root itself may be the scene
            reports.setdefault(scenes[folders[place]].name, Report()).add(report)

        def ended(place: str) -> None:
            progress.advance(note=folders[place].name)

        on_cpu = config.from_ not in _RENDERED or config.variant in ("llvm", "scalar")
        with joined_cluster(config, on_cpu) as cluster:
            if cluster is not None or config.workers > 1:
                wanted = {place: scenes[folders[place]] for place in missing}
                return _convert_side_by_side(config, wanted, cluster, ended, take)
        for place in missing:
            take(place, _convert(folders[place], scenes[folders[place]], config))
            ended(place)
    return {}


def _convert_side_by_side(
    config: ConvertConfig,
    scenes: Mapping[str, SourceScene],
    cluster: Cluster | None,
    ended: Callable[[str], object],
    take: Callable[[str, Report], object],
) -> dict[str, str]:
    workers = min(config.workers, len(scenes))
    threads = max(1, usable_cores() // workers) if cluster is None else cluster.cpus
    if cluster is not None and config.from_ in _RENDERED:
        # one variant for all scenes, whatever machine renders them
        config = dataclasses.replace(config, variant=cluster.call(choose_variant, config.variant, cluster.gpus > 0))
    return run_jobs(list(scenes), _set_up, (config, scenes, threads), workers, ended, cluster=cluster, take=take)


def _set_up(argument: tuple[ConvertConfig, Mapping[str, SourceScene], int], worker: int) -> Callable[[str], Report]:
    config, scenes, threads = argument
    if config.from_ in _RENDERED:
        set_threads(choose_variant(config.variant), threads)
    return lambda place: _convert(Path(place), scenes[place], config)


def _convert(folder: Path, scene: SourceScene, config: ConvertConfig) -> Report:
    """Make one scene, anew if it stands: then its process died before it could say what was left out."""
    report = Report()
    try:
        _write(folder, scene, config, report)
    except (ValueError, OSError) as error:
        report(f"{_LOST}{in_words(error)}")
    return report


def _write(folder: Path, scene: SourceScene, config: ConvertConfig, report: Report) -> None:
    content = scene.read(config, report)

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
