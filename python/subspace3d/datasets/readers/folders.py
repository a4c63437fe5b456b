"""What readers of folders share: names of scenes, images, and depth files that go with them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from subspace3d.datasets.readers.source import Report
from subspace3d.files import natural, walk
from subspace3d.formats.images import DEPTH_SUFFIXES

Found = TypeVar("Found")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
_FOREIGN = (".heic", ".heif", ".avif", ".dng", ".gif", ".raw", ".cr2", ".nef", ".arw")  # images that are not read
_ADDED = re.compile(r"^(depth|disp|rgb|color|image|frame|img)[_.-]?|[_.-](depth|rgb|color|image)$", re.IGNORECASE)


def some(found: list[Found], what: str, root: Path, report: Report) -> list[Found]:
    """What was found; where that is nothing, ValueError with the layout that was looked for, and what came near it."""
    if not found:
        near = f"; first: {report.reasons[0]}" if report.reasons else ""
        raise ValueError(f"root must hold {what}; found none below {root}{near}")
    return found


def report_incomplete(
    root: Path, scenes: Iterable[Path], marks: Iterable[str], needed: Iterable[str], report: Report
) -> None:
    """Report every folder that has some of the entries of a scene, yet is none and neither holds nor belongs to one.

    Args:
        root (Path): below which to look.
        scenes (Iterable[Path]): folders of the scenes that were found.
        marks (Iterable[str]): names of files and folders that make a folder look like a scene.
        needed (Iterable[str]): the names without which it is none; each is a mark as well.
        report (Report): is told what there is and what is missing.
    """
    taken, needed = list(scenes), list(needed)
    for folder, children, names in walk(root):
        here = {*children, *names}
        mark = next((name for name in (*marks, *needed) if name in here), None)
        if mark is None or any(folder.is_relative_to(scene) or scene.is_relative_to(folder) for scene in taken):
            continue
        missing = " and no ".join(name for name in needed if name not in here)
        report(f"{folder}: left out, it has {mark} but no {missing}")
        children.clear()


def scene_name(folder: Path, root: Path) -> str:
    """The path below the root in one word; of the root itself its own name.

    Raises:
        ValueError: ``root`` is a part of the scene.
    """
    if not folder.is_relative_to(root):
        raise ValueError(f"root must be the folder of the scene, {folder}, or one above it, got {root}")
    return "_".join(folder.relative_to(root).parts) or root.resolve().name


def image_files(folder: Path, report: Report) -> list[Path]:
    """Images in a folder in natural order; those in formats that are not read are reported."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: natural(path.name)):
        suffix = path.suffix.lower()
        if suffix in _FOREIGN:
            report.leave_out(f"{path.name}: images of the kind {suffix} are not read, export them as jpg or png")
        elif suffix in IMAGE_SUFFIXES and not path.name.startswith("."):
            found.append(path)
    return found


def named_file(folder: Path, name: str) -> Path:
    r"""The file that a list calls ``name``, as other systems spell it.

    With \ for /, accents composed or not, letters of another case, or without the suffix of an image. Where there is no
    such file, or more than one, the name as it is.
    """
    plain = folder / name
    if not name:
        return plain
    for path in (plain, folder / name.replace("\\", "/")):
        endings = ("", ".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
        # not with_suffix: what looks like one may be none, as in v.1
        spelled = (path.with_name(path.name + end) for end in endings if path.name)
        found = next(filter(os.path.isfile, spelled), None)
        if found is not None:
            return found
    return _spelled_alike(folder / name.replace("\\", "/")) or plain


def _spelled_alike(path: Path) -> Path | None:
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return None
    wanted = _letters(path.name)
    found = [name for name in names if _letters(name) == wanted]
    if not found:
        found = [name for name in names if _letters(Path(name).stem) == wanted and _is_image(name)]
    return path.parent / found[0] if len(found) == 1 else None


def _letters(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def ordered(files: list[Path]) -> list[Path]:
    """By the number that every stem is (a time has a fraction), else in natural order."""
    try:
        return sorted(files, key=lambda path: (float(path.stem), path.name))
    except ValueError:
        return sorted(files, key=lambda path: natural(path.name))


def depth_there(path: Path) -> tuple[Path | None, str]:
    """The depth file of an image, or none and why."""
    return (path, "") if path.is_file() else (None, f"no such file ({path.name})")


def by_stem(folder: Path, names: Iterable[str], report: Report) -> dict[str, Path]:
    """Depth files by their path below the first of the folders ``names``, without suffix; others are reported."""
    base = next((folder / name for name in names if (folder / name).is_dir()), None)
    if base is None:
        return {}
    found: dict[str, Path] = {}
    for below, _, inside in walk(base):
        for path in (below / name for name in inside if not name.startswith(".")):
            stem = str(path.relative_to(base).with_suffix(""))
            if path.suffix.lower() not in DEPTH_SUFFIXES:
                report(f"{path.name}: a file in {base.name} that is no depth of a kind that is read")
            elif stem in found:
                report(f"{path.name}: {found[stem].name} of the same name is used in its place")
            else:
                found[stem] = path
    return found


def partners(images: list[Path], depths: dict[str, Path]) -> dict[Path, Path]:
    """The depth file of each image: the same stem, else the same without a word like depth_ or _color."""
    plain: dict[str, Path] = {}
    doubtful = set()
    for stem, path in depths.items():
        key = _plain(stem)
        doubtful |= {key} if key in plain else set()
        plain[key] = path
    result = {}
    for image in images:
        stem = image.stem
        if stem in depths:
            result[image] = depths[stem]
        elif _plain(stem) in plain and _plain(stem) not in doubtful:
            result[image] = plain[_plain(stem)]
    return result


def unlisted(folder: Path, names: Iterable[str], report: Report, why: str) -> None:
    """Report the images below a folder that no list names."""
    if not folder.is_dir():
        return
    listed = {str(Path(name)) for name in names}
    for base, _, inside in walk(folder):
        for name in inside:
            path = str((base / name).relative_to(folder))
            if not name.startswith(".") and _is_image(name) and path not in listed:
                report.leave_out(f"{path}: {why}")


def _plain(stem: str) -> str:
    return _ADDED.sub("", stem)
