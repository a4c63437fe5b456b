"""COLMAP models: every folder at or below ROOT with cameras and images, text or binary, is a scene.

<capture>/sparse/0/cameras.bin, images.bin   or .txt; sparse/ itself, colmap/, or the capture's folder
<capture>/images/NAME                        by the names in the model, which may have folders (rigs)
<capture>/depth/STEM.*                       depth of the image called STEM.*, optional; also depths/
<capture>/stereo/depth_maps/NAME.geometric.bin   COLMAP's own dense depth, else .photometric.bin
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.datasets.readers.colmap_model import Camera, has_model, read_model
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import (
    by_stem,
    named_file,
    report_incomplete,
    scene_name,
    some,
    unlisted,
)
from subspace3d.datasets.readers.source import Content, Report, SourceScene
from subspace3d.datasets.readers.undistort import Projection
from subspace3d.datasets.readers.views import DepthFormat, View, content
from subspace3d.files import natural, walk
from subspace3d.formats.images import MOST_PIXELS
from subspace3d.reading import read_bytes

_MODEL_FOLDERS = ("sparse", "colmap", "model", "models", "dense")  # between a capture and its models
_IMAGE_FOLDERS = ("images", "rgb", "color", "input", "resized_images", "undistorted_images", "image")
_DEPTH_FOLDERS = ("depth", "depths", "depth_maps")


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Models by the folder of their capture; several of one capture are several scenes."""
    layout = "COLMAP models, <capture>/sparse/0/cameras.bin and images.bin (or .txt) beside <capture>/images"
    models = []
    for folder, _, names in walk(root):
        if has_model(names):
            models.append(folder)
        else:
            _report_half(folder, names, report)
    captures = [_capture(model, root) for model in models]
    needed = "COLMAP model (cameras and images, .bin or .txt)"
    report_incomplete(root, captures, _IMAGE_FOLDERS, [needed], report)
    some(models, layout, root, report)
    scenes = []
    for model, capture in zip(models, captures):
        name = scene_name(capture, root)
        if captures.count(capture) > 1:
            name += "_" + "_".join(model.relative_to(capture).parts)
        scenes.append(SourceScene(name, "", partial(_read, model, capture)))
    return scenes


def _report_half(folder: Path, names: list[str], report: Report) -> None:
    for kind in ("bin", "txt"):
        pair = [f"cameras.{kind}", f"images.{kind}"]
        there = [name for name in pair if name in names]
        if there:
            (missing,) = set(pair) - set(there)
            report(f"{folder}: left out, it has {there[0]} but no {missing}")


def _capture(model: Path, root: Path) -> Path:
    """The folder beside whose model the images lie: of an undistorted workspace (dense/0) that itself."""
    folder = model
    while folder != root and (folder.name.lower() in _MODEL_FOLDERS or folder.name.isdigit()):
        if _images(folder) is not None:
            break
        folder = folder.parent
    return folder


def _images(capture: Path) -> Path | None:
    """The folder of the images, else the least reduced one of nerfstudio (images_2, images_4); none: no such."""
    found = next((capture / name for name in _IMAGE_FOLDERS if (capture / name).is_dir()), None)
    reduced = [path for path in capture.glob("images_[0-9]*") if path.is_dir()]
    return found or min(reduced, key=lambda path: natural(path.name), default=None)


def _read(folder: Path, capture: Path, config: ReaderConfig, report: Report) -> Content:
    model = read_model(folder)
    images = _images(capture) or capture
    if images.name.startswith("images_"):
        report(f"{images.name}: used, there is no folder images; the cameras are reduced as its images are")
    files = {name: named_file(images, name) for name in (*(name for name, _, _ in model.images), *model.faults)}
    stems = {name: _stem(path, images) for name, path in files.items()}
    if images == capture and not any(map(os.path.isfile, files.values())):
        raise ValueError(
            f"{capture} must have the model's images in a folder images, or {', '.join(_IMAGE_FOLDERS[1:4])}"
        )
    dense = capture / "stereo/depth_maps"
    depths = {} if dense.is_dir() else by_stem(capture, _DEPTH_FOLDERS, report)

    def depth_of(name: str) -> Path | None:
        return _dense_depth(dense, name) if dense.is_dir() else depths.get(stems[name])

    for name, fault in model.faults.items():
        report.leave_out(f"{name}: {fault}", depth_of(name) is not None, camera=True)
    cameras = {number: pinhole_of(camera) for number, camera in model.cameras.items()}
    views = []
    for name, number, pose in sorted(model.images, key=lambda image: natural(image[0])):
        camera = model.cameras[number]
        intrinsic, projection = cameras[number]
        depth = depth_of(name)
        bare = "there is none of its name" if depth is None and (depths or dense.is_dir()) else ""
        size = (camera.height, camera.width)
        views.append(View(name, files[name], intrinsic, pose, depth, size, projection, bare=bare))
    spare = set(depths) - set(stems.values())
    report.count(depths=len(spare))
    for stem in sorted(spare):
        report(f"{depths[stem].name}: depth without an image of its name")
    if images != capture:
        names = [str(path.relative_to(images)) for path in files.values() if path.is_relative_to(images)]
        unlisted(images, names, report, "the model has no pose of it")
    source = {"kind": "colmap", "model": folder.name, "models": sorted({c.model for c in model.cameras.values()})}
    # COLMAP's own scale is arbitrary
    depth_format = DepthFormat(read=_read_dense if dense.is_dir() else None, unit_known=True)
    return content(views, config, report, capture, source, depth_format, unit="scene")


def pinhole_of(camera: Camera) -> tuple[np.ndarray, Projection | None]:
    """K [3, 3], and the projection of a camera that is distorted.

    Raises:
        ImportError: a distorted camera without pycolmap.
    """
    single = camera.model in ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "SIMPLE_RADIAL_FISHEYE", "RADIAL_FISHEYE")
    single = single or camera.model in ("SIMPLE_DIVISION", "SIMPLE_FISHEYE")
    fx, fy, cx, cy = (camera.params[0], *camera.params[:3]) if single else camera.params[:4]
    intrinsic = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    extra = camera.params[3:] if single else camera.params[4:]
    bent = "FISHEYE" in camera.model or camera.model in ("FOV", "EUCM")
    if not bent and not any(extra):
        return intrinsic, None
    import pycolmap

    native: Any = pycolmap.Camera(model=camera.model, width=camera.width, height=camera.height, params=camera.params)

    def project(rays: np.ndarray) -> np.ndarray:
        directions = np.concatenate([rays, np.ones((len(rays), 1))], axis=1)
        return np.asarray(native.img_from_cam(directions), np.float64)

    return intrinsic, Projection(project, (camera.model, camera.width, camera.height, camera.params))


def _stem(path: Path, folder: Path) -> str:
    """By which depth goes with an image: its path below the folder of the images, without suffix."""
    return str((path.relative_to(folder) if path.is_relative_to(folder) else path).with_suffix(""))


def _dense_depth(folder: Path, name: str) -> Path | None:
    kinds = (folder / f"{name}.{kind}.bin" for kind in ("geometric", "photometric"))
    return next((path for path in kinds if path.is_file()), None)


def _read_dense(path: Path) -> np.ndarray:
    """COLMAP's dense maps: ``width&height&channels&`` and float32, rows after each other."""
    data = read_bytes(path, 4 * MOST_PIXELS + 64)
    words = data[:64].split(b"&", 3)
    if len(words) != 4 or not all(word.isdigit() for word in words[:3]):
        raise ValueError(f"{path} must begin with width&height&channels&")
    width, height, channels = map(int, words[:3])
    start = sum(len(word) + 1 for word in words[:3])
    if channels != 1 or len(data) != start + 4 * width * height:
        raise ValueError(f"{path} must hold {width} x {height} numbers of 4 bytes, it has {len(data) - start} bytes")
    return np.frombuffer(data, "<f4", offset=start).reshape(height, width)
