"""Folders of images without cameras or depth: every folder at or below ROOT that holds images is a scene."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import image_files, scene_name, some
from subspace3d.datasets.readers.source import Content, Report, SourceScene
from subspace3d.datasets.readers.views import View, content
from subspace3d.files import sha256, walk


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders by their path, images in natural order; hidden folders are not entered."""
    scenes = []
    for folder, _, _ in walk(root):
        foreign = Report()
        if image_files(folder, foreign) or foreign.reasons:
            scenes.append(SourceScene(scene_name(folder, root), "", partial(_read, folder)))
    return some(scenes, "images (png, jpg, webp, tiff, bmp)", root, report)


def _read(folder: Path, config: ReaderConfig, report: Report) -> Content:
    views = [View(path.name, path) for path in _different(image_files(folder, report), report)]
    return content(views, config, report, folder, {"kind": "images", "folder": folder.name}, unit="scene")


def _different(files: list[Path], report: Report) -> list[Path]:
    """Without exact copies of earlier files: a copy that is held out would judge what it taught."""
    sizes = Counter(path.stat().st_size for path in files)
    first: dict[str, Path] = {}
    kept = []
    for path in files:
        same = first.setdefault(sha256(path), path) if sizes[path.stat().st_size] > 1 else path
        if same is path:
            kept.append(path)
        else:
            report.leave_out(f"{path.name}: a copy (of {same.name})")
    return kept
