"""Folders rendered by the scripts of the method's authors: a folder ``renderings`` and its ``opencv_cameras.json``.

The cameras stand beside ``renderings`` or in it: ``{"frames": [{w, h, fx, fy, cx, cy, w2c, file_path}]}`` with ``w2c``
4x4, OpenCV. To ``<i>_rgba.png`` belongs ``<i>_depth.exr``, z-depth in three equal channels, beyond 1e9 where there is
none; the background of the image is in its colours. A ``w2c`` may carry the scale of Blender's camera object, in all of
its rows: it is divided by the mean length of the columns of its rotation.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import scene_name, some, unlisted
from subspace3d.datasets.readers.source import Capture, Content, Report, SourceScene, finite_number, pose_matrix
from subspace3d.datasets.readers.views import DepthFormat, View, content, pose_from_w2c
from subspace3d.files import read_record, walk

CAMERAS, FOLDER = "opencv_cameras.json", "renderings"
_NUMBERS = ("w", "h", "fx", "fy", "cx", "cy")


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Scenes are named by the folder above ``renderings``."""
    scenes = []
    for folder, folders, _ in walk(root):
        if FOLDER not in folders:
            continue
        cameras = next((path for path in (folder / CAMERAS, folder / FOLDER / CAMERAS) if path.is_file()), None)
        if cameras is None:
            report(f"{folder / FOLDER}: left out, there is no {CAMERAS} beside it or in it")
            continue
        scenes.append(SourceScene(scene_name(folder, root), "", partial(_read, folder, cameras)))
    return some(scenes, f"{FOLDER}/ and {CAMERAS} of rendered scenes", root, report)


def _read(folder: Path, cameras: Path, config: ReaderConfig, report: Report) -> Content:
    frames = read_record(cameras, Capture)["frames"]
    views, names = [], list(map(_name, frames))
    for index, (name, frame) in enumerate(zip(names, frames)):
        try:
            views.append(_view(folder / FOLDER, name, frame))
        except ValueError as error:
            has_depth = _depth(folder / FOLDER, name) is not None
            report.leave_out(f"frames[{index}]: {error}", has_depth, camera=True)
    unlisted(folder / FOLDER, names, report, f"{CAMERAS} does not name it")
    source = {"kind": "renderings", "file": CAMERAS}
    return content(views, config, report, folder, source, DepthFormat(unit_known=True), unit="scene")


def _name(frame: Any) -> str:
    """File name of a frame's image; empty where it has none."""
    path = frame.get("file_path") if isinstance(frame, Mapping) else None
    return Path(path).name if isinstance(path, str) else ""


def _view(folder: Path, name: str, frame: Mapping[str, Any]) -> View:
    if not name:
        raise ValueError("a frame must be an object with a file_path")
    w, h, fx, fy, cx, cy = (finite_number(frame, key, below=1e9) for key in _NUMBERS)
    if not (fx > 0 and fy > 0 and w >= 1 and h >= 1):
        raise ValueError(f"{name}: w, h, fx and fy must be positive, got {w:g}, {h:g}, {fx:g} and {fy:g}")
    return View(
        name,
        folder / name,
        np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]]),
        pose_from_w2c(_pose(name, frame.get("w2c"))),
        _depth(folder, name),
        (int(h), int(w)),
    )


def _depth(folder: Path, name: str) -> Path | None:
    path = folder / name.replace("_rgba.png", "_depth.exr")
    return path if path.suffix == ".exr" and os.path.isfile(path) else None


def _pose(name: str, value: Any) -> np.ndarray:
    matrix = pose_matrix(value, f"{name}: w2c")
    scale = np.linalg.norm(matrix[:3, :3], axis=0).mean()
    if not scale > 0:
        raise ValueError(f"{name}: w2c must have a rotation, got {str(value)[:120]}")
    return matrix[:3] / scale
