"""nerfstudio captures: every folder at or below ROOT with a transforms.json is a scene.

``frames[i].transform_matrix`` is camera-to-world in OpenGL axes; intrinsics and distortion stand for all frames at the
top, or in a frame; ``depth_file_path`` and ``mask_path`` are optional. Files of Instant-NGP and of Blender's synthetic
scenes (``camera_angle_x`` alone, paths without suffix) are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import named_file, report_incomplete, scene_name, some, unlisted
from subspace3d.datasets.readers.source import (
    Capture,
    Content,
    Report,
    SourceScene,
    finite_number,
    in_words,
    pose_matrix,
)
from subspace3d.datasets.readers.undistort import Projection, brown, fisheye
from subspace3d.datasets.readers.views import DepthFormat, View, content, pose_from_opengl
from subspace3d.files import natural, read_record, walk
from subspace3d.formats.images import image_header

_FILE = re.compile(r"transforms(_train|_val|_test)?\.json")
_IMAGE_FOLDERS = ("images", "images_2", "images_4", "images_8")
_PERSPECTIVE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE", "")
_FISHEYE = ("OPENCV_FISHEYE", "FISHEYE")
_COEFFICIENTS = ("k1", "k2", "k3", "k4", "p1", "p2")
_DEPTH_KEYS = ("depth_file_path", "depth_path")  # the second is Instant-NGP's
# flags of Instant-NGP for lenses that are not read, and coefficients of models beyond nerfstudio's
_FOREIGN_LENSES = ("latlong", "equirectangular", "ftheta_p0", "orthographic")
_FOREIGN_COEFFICIENTS = ("k5", "k6", "s1", "s2", "s3", "s4")


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders by their path; transforms_train, _val and _test of one folder are scenes of their own."""
    files = [folder / name for folder, _, names in walk(root) for name in names if _FILE.fullmatch(name)]
    report_incomplete(root, [file.parent for file in files], _IMAGE_FOLDERS, ["transforms.json"], report)
    scenes = []
    for file in some(files, "nerfstudio captures, <capture>/transforms.json", root, report):
        suffix = file.stem.removeprefix("transforms")
        scenes.append(SourceScene(scene_name(file.parent, root) + suffix, "", partial(_read, file)))
    return scenes


def _read(file: Path, config: ReaderConfig, report: Report) -> Content:
    record: dict[str, Any] = dict(read_record(file, Capture))
    frames = record["frames"]
    some_depth = any(map(_names_depth, frames))
    views = []
    listed = []
    for index, frame in enumerate(frames):
        name = str(frame.get("file_path", "")) if isinstance(frame, dict) else ""
        path = named_file(file.parent, name)
        if name:
            listed.append(str(path.relative_to(file.parent)) if path.is_relative_to(file.parent) else name)
        try:
            view = _view(file, record, frame)
        except (OSError, ValueError) as error:
            report.leave_out(f"{name or f'frames[{index}]'}: {in_words(error)}", _names_depth(frame), camera=True)
            continue
        if some_depth and view.depth is None:
            view.bare = "the frame names none"
        views.append(view)
    views.sort(key=lambda view: natural(view.name))
    used = {str(Path(name).parent) for name in listed}
    if len(used) == 1 and not file.stem.endswith(("_train", "_val", "_test")):
        folder = file.parent / used.pop()
        names = [str((file.parent / name).relative_to(folder)) for name in listed]
        unlisted(folder, names, report, f"{file.name} does not name it")
    if any(_is_on(values.get("rolling_shutter")) for values in (record, *frames) if isinstance(values, dict)):
        report("rolling_shutter: used as if all rows of an image were taken at one time")
    source = {"kind": "nerfstudio", "file": file.name}
    step = finite_number(record, "integer_depth_scale", 0.0)
    if step < 0:
        raise ValueError(f"{file}: integer_depth_scale must be positive, got {step:g}")
    depth_format = DepthFormat(scale=step, unit_known=True)
    return content(views, config, report, file.parent, source, depth_format, unit="scene")


def _names_depth(frame: Any) -> bool:
    return isinstance(frame, dict) and any(map(frame.get, _DEPTH_KEYS))


def _view(file: Path, record: Mapping[str, Any], frame: Any) -> View:
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
        raise ValueError("a frame must be an object with a file_path")
    name = frame["file_path"]
    image = named_file(file.parent, name)
    pose = pose_matrix(frame.get("transform_matrix"), "transform_matrix")
    merged = {**record, **frame}
    size = tuple(int(finite_number(merged, key, 0)) for key in ("h", "w"))
    if 0 in size:
        size, _ = image_header(image)
    intrinsic = _intrinsic(merged, (size[0], size[1]))
    return View(
        name,
        image,
        intrinsic,
        pose_from_opengl(pose),
        _path(file.parent, frame, *_DEPTH_KEYS),
        (size[0], size[1]),
        _projection(merged, intrinsic),
        _path(file.parent, frame, "mask_path"),
    )


def _intrinsic(values: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if "fl_x" in values:
        fx = finite_number(values, "fl_x")
        fy = finite_number(values, "fl_y", fx)
    elif "camera_angle_x" in values:
        fx = width / 2 / np.tan(finite_number(values, "camera_angle_x") / 2)
        fy = height / 2 / np.tan(finite_number(values, "camera_angle_y") / 2) if "camera_angle_y" in values else fx
    else:
        raise ValueError("a frame must have fl_x or camera_angle_x, of its own or at the top of the file")
    if not (fx > 0 and fy > 0):
        raise ValueError(f"focal lengths must be positive, got {fx:g} and {fy:g}")
    cx, cy = finite_number(values, "cx", width / 2), finite_number(values, "cy", height / 2)
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _projection(values: Mapping[str, Any], intrinsic: np.ndarray) -> Projection | None:
    model = str(values.get("camera_model", ""))
    foreign = [key for key in _FOREIGN_LENSES if values.get(key)] + [
        key for key in _FOREIGN_COEFFICIENTS if finite_number(values, key, 0.0)
    ]
    if foreign:
        raise ValueError(f"a camera must be one of nerfstudio's models, got one with {', '.join(foreign)}")
    if values.get("is_fisheye") and model in ("", "OPENCV"):
        model = _FISHEYE[0]
    k1, k2, k3, k4, p1, p2 = (finite_number(values, key, 0.0) for key in _COEFFICIENTS)
    if model in _FISHEYE:
        return fisheye(intrinsic, (k1, k2, k3, k4))
    if model not in _PERSPECTIVE:
        raise ValueError(f"camera_model must be one of {', '.join(filter(None, _PERSPECTIVE + _FISHEYE))}, got {model}")
    return brown(intrinsic, (k1, k2, k3, k4), (p1, p2)) if any((k1, k2, k3, k4, p1, p2)) else None


def _path(folder: Path, frame: Mapping[str, Any], *keys: str) -> Path | None:
    key = next((key for key in keys if frame.get(key) is not None), None)
    if key is None:
        return None
    if not isinstance(frame[key], str):
        raise ValueError(f"{key} must be a path, got {str(frame[key])[:40]}")
    return named_file(folder, frame[key])


def _is_on(value: Any) -> bool:
    """Whether a list holds anything but zeros."""
    return isinstance(value, list) and any(value)
