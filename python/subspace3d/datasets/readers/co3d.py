"""Co3D with the annotations of VGGT's trainer: <category>_train.jgz and _test.jgz, zipped JSON.

{sequence: [{"filepath": "<category>/<sequence>/images/frame000001.jpg", "extri": 3x4, "intri": 3x3}, ...]}: pixels,
camera-from-world in OpenCV axes. Depth lies at depths/<image>.geometric.png (bits of float16), where it counts at
depth_masks/<stem>.png.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.datasets.readers.binary_depth import read_half_png
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import depth_there
from subspace3d.datasets.readers.source import Content, Report, SourceScene, pinhole
from subspace3d.datasets.readers.views import DepthFormat, View, content, pose_from_w2c
from subspace3d.files import natural
from subspace3d.reading import open_regular, parse_json
from subspace3d.schema import check

_FILE = re.compile(r"(?P<category>\w+)_(?P<split>train|test)\.jgz")
_FOLDERS = (".", "annotations", "co3d_anno")
_LARGEST, _MOST_VALUES = 1 << 30, 1 << 25  # bytes once unzipped, and values in them


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Sequences as ``<category>_<sequence>``, in the split of their file."""
    files = sorted(path for folder in _FOLDERS for path in (root / folder).glob("*.jgz") if _FILE.fullmatch(path.name))
    scenes = []
    for file in files:
        match = _FILE.fullmatch(file.name)
        assert match is not None
        try:
            annotations = _annotations(file)
        except ValueError as error:
            report(f"{file.name}: {error}")
            continue
        for sequence, frames in annotations.items():
            name = f"{match['category']}_{sequence}"
            scenes.append(SourceScene(name, match["split"], partial(_read, root, file, sequence, frames)))
    if not scenes and report.reasons:
        raise ValueError(f"root: no annotations in {root} can be read; first: {report.reasons[0]}")
    if not scenes:
        raise ValueError(
            "root must hold the folders of Co3D's categories and the annotations of VGGT's trainer, "
            f"<category>_train.jgz, beside them, in annotations/ or in co3d_anno/; found none in {root}"
        )
    return scenes


def _annotations(path: Path) -> dict[str, list[Any]]:
    with open_regular(path) as file:
        try:
            with gzip.open(file) as unzipped:
                data = unzipped.read(_LARGEST + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no zipped JSON that can be read: {error}") from error
    if len(data) > _LARGEST:
        raise ValueError(f"{path} must be at most {_LARGEST} bytes once unzipped, it has more")
    return check(parse_json(data, str(path), _MOST_VALUES), dict[str, list[Any]], path)


def _read(root: Path, file: Path, sequence: str, frames: Any, config: ReaderConfig, report: Report) -> Content:
    views = sorted(_views(root, frames, report), key=lambda view: natural(view.name))
    source = {"kind": "co3d", "annotations": file.name, "sequence": sequence}
    depth_format = DepthFormat(read=read_half_png, unit_known=True)
    return content(views, config, report, root, source, depth_format, unit="scene")


def _views(root: Path, frames: list[Any], report: Report) -> Iterator[View]:
    for index, frame in enumerate(frames):
        name = str(frame.get("filepath", "")) if isinstance(frame, dict) else ""
        image = root / name
        depth = image.parent.parent / "depths" / f"{image.name}.geometric.png"
        try:
            if not name:
                raise ValueError("a frame must have a filepath")
            intrinsic = pinhole(_numbers(frame, "intri"), "intri")
            extrinsic = pose_from_w2c(_numbers(frame, "extri"))
        except ValueError as error:
            has_camera = isinstance(frame, dict) and frame.get("extri") is not None
            report.leave_out(f"{name or f'frame {index}'}: {error}", os.path.isfile(depth), has_camera)
            continue
        mask = image.parent.parent / "depth_masks" / f"{image.stem}.png"
        there, bare = depth_there(depth)
        has_mask = there is not None and mask.is_file()
        yield View(name, image, intrinsic, extrinsic, there, mask=mask if has_mask else None, bare=bare)


def _numbers(frame: dict[str, Any], key: str) -> np.ndarray:
    try:
        return np.array(frame.get(key), np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{key} must be a matrix of numbers: {error}") from error
