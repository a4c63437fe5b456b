"""Benchmarks of stereo from many views and of video depth: ETH3D, DTU, Sintel; and DA3-BENCH, which joins several.

ETH3D      <scene>/dslr_calibration_jpg/ (or _undistorted), images/, ground_truth_depth/dslr_images/NAME (raw float32)
DTU        scan1/images/00000000.jpg, cams/00000000_cam.txt; or Rectified/scan1/rect_001_3_r5000.png, Cameras/
Sintel     training/final/<sequence>/frame_0001.png, depth/<sequence>/*.dpt, camdata_left/<sequence>/*.cam
DA3-BENCH  eth3d/, 7scenes/, scannetpp/, hiroom/, dtu/, dtu64/ of its download
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from subspace3d.datasets.readers import indoor, text
from subspace3d.datasets.readers.binary_depth import read_dpt, read_pfm, read_raw, read_sintel_camera
from subspace3d.datasets.readers.colmap import pinhole_of
from subspace3d.datasets.readers.colmap_model import has_model, read_model
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import depth_there, image_files, report_incomplete, scene_name, some
from subspace3d.datasets.readers.source import Content, Report, SourceScene, in_words, pinhole
from subspace3d.datasets.readers.views import DepthFormat, View, content, pose_from_w2c
from subspace3d.files import natural, walk
from subspace3d.formats.images import open_image

_ETH3D_MODELS = ("dslr_calibration_jpg", "dslr_calibration_undistorted")
_DTU_DEPTHS = ("Depths_raw", "depth_raw", "Depths", "depth_raw/Depths")
_DTU_OTHERS = ("Depths", "depth_raw", "Cameras", "Points", "SampleSet", "SurfaceNormals")  # folders without images
_DTU_RECTIFIED = re.compile(r"rect_(?P<view>\d+)_3_r5000\.(png|jpg)")
_DTU_TRAIN_SCALE = 4  # the cameras of MVSNet's training images are those of maps a quarter as large


def find_eth3d(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Scenes by the folder above their calibration; that of the original images where they and depth are there."""
    models: dict[Path, list[Path]] = {}
    for folder, _, names in walk(root):
        if has_model(names) and folder.name in _ETH3D_MODELS:
            models.setdefault(folder.parent, []).append(folder)
    scenes = []
    for folder, found in models.items():
        found.sort(key=lambda model: _ETH3D_MODELS.index(model.name))
        model = next(filter(_has_images, found), found[0])
        scenes.append(SourceScene(scene_name(folder, root), "", partial(_eth3d, model)))
    needed = f"{' or '.join(_ETH3D_MODELS)} with cameras and images"
    report_incomplete(root, models, ["images", *_ETH3D_MODELS], [needed], report)
    return some(scenes, "ETH3D scenes, courtyard/dslr_calibration_undistorted/cameras.txt and images/", root, report)


def _has_images(model: Path) -> bool:
    try:
        return any((model.parent / "images" / name).is_file() for name, _, _ in read_model(model).images)
    except (OSError, ValueError):
        return False  # it is told when the scene is read


def _eth3d(model_folder: Path, config: ReaderConfig, report: Report) -> Content:
    folder, model = model_folder.parent, read_model(model_folder)
    # depth and masks belong to the original images
    original = model_folder.name == _ETH3D_MODELS[0]
    if not original and (folder / "ground_truth_depth").is_dir():
        report(
            "ground_truth_depth: not used: it belongs to the original images, of which images/dslr_images and "
            f"{_ETH3D_MODELS[0]} with cameras and images must be there"
        )

    def depth_of(name: str) -> Path:
        return folder / "ground_truth_depth/dslr_images" / Path(name).name

    for name, fault in model.faults.items():
        report.leave_out(f"{name}: {fault}", original and os.path.isfile(depth_of(name)), camera=True)
    sizes: dict[Path, tuple[int, int]] = {}
    cameras = {number: pinhole_of(camera) for number, camera in model.cameras.items()}
    views = []
    for name, number, pose in sorted(model.images, key=lambda image: natural(image[0])):
        camera, (intrinsic, projection) = model.cameras[number], cameras[number]
        size = (camera.height, camera.width)
        depth = depth_of(name)
        sizes[depth] = size
        there = depth if original and depth.is_file() else None
        bare = "no such file in ground_truth_depth" if original and there is None else ""
        views.append(View(name, folder / "images" / name, intrinsic, pose, there, size, projection, bare=bare))

    def read_depth(path: Path) -> np.ndarray:
        depth = read_raw(path, sizes[path]).copy()
        mask = folder / "masks_for_images/dslr_images" / f"{path.stem}.png"
        if mask.is_file():
            depth[np.array(open_image(mask, sizes[path]).convert("L")) == 1] = 0
        return depth

    source = {"kind": "eth3d", "scene": folder.name, "model": model_folder.name}
    return content(views, config, report, folder, source, DepthFormat(1.0, read_depth))


def find_dtu(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """``scan1`` and so on, of either layout."""
    scenes = []
    for folder, children, _ in walk(root):
        children[:] = [child for child in children if not child.startswith(_DTU_OTHERS)]
        if re.fullmatch(r"scan\d+(_train)?", folder.name):
            images = next((folder / name for name in ("images", "image") if (folder / name).is_dir()), folder)
            if image_files(images, Report()):
                scenes.append(SourceScene(folder.name, "", partial(_dtu, root, folder, images)))
            children.clear()
    return some(scenes, "DTU as MVSNet has it, scan1/images and cams/, or Rectified/scan1 and Cameras/", root, report)


def _dtu(root: Path, folder: Path, images: Path, config: ReaderConfig, report: Report) -> Content:
    train = folder.name.endswith("_train")
    cameras = folder / "cams" if (folder / "cams").is_dir() else root / "Cameras" / ("train" if train else "")
    if not cameras.is_dir():
        raise ValueError(f"{folder} must have cameras in {folder / 'cams'} or, for several scans, in {cameras}")
    bases = (root / name / folder.name for name in _DTU_DEPTHS)
    depths = next((base for base in bases if base.is_dir()), None)
    views = []
    for image in image_files(images, report):
        rectified = _DTU_RECTIFIED.fullmatch(image.name)
        if image.name.startswith("rect_") and rectified is None:
            continue  # the same view in another light
        number = int(rectified["view"]) - 1 if rectified else int(re.sub(r"\D", "", image.stem) or -1)
        camera = cameras / f"{number:08d}_cam.txt"
        depth = None if depths is None else depths / f"depth_map_{number:04d}.pfm"
        try:
            intrinsic, extrinsic = _dtu_camera(camera)
        except (OSError, ValueError) as error:
            has_depth = depth is not None and depth.is_file()
            report.leave_out(f"{image.name}: {in_words(error)}", has_depth, camera.is_file())
            continue
        if train:
            intrinsic[:2] *= _DTU_TRAIN_SCALE
        intrinsic[:2, 2] += 0.5
        there, bare = (None, "") if depth is None else depth_there(depth)
        views.append(View(image.name, image, intrinsic, extrinsic, there, bare=bare))
    source = {"kind": "dtu", "scan": folder.name}
    return content(views, config, report, folder, source, DepthFormat(1.0, read_pfm), unit="mm", allowed=[root])


def _dtu_camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    lines = text.lines(path)
    if len(lines) < 9 or lines[0] != "extrinsic" or lines[5] != "intrinsic":
        raise ValueError(f"{path} must hold the words extrinsic and intrinsic, each before its matrix")
    extrinsic = np.array([text.floats(line.split(), path) for line in lines[1:5]])
    intrinsic = np.array([text.floats(line.split(), path) for line in lines[6:9]])
    return pinhole(intrinsic, str(path)), pose_from_w2c(extrinsic)


def find_sintel(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Sequences of the training set; the images of the final pass, else those of the clean one."""
    base = root / "training" if (root / "training").is_dir() else root
    images = next((base / name for name in ("final", "clean") if (base / name).is_dir()), None)
    folders = [] if images is None else sorted(path for path in images.iterdir() if path.is_dir())
    scenes = [SourceScene(folder.name, "", partial(_sintel, base, folder)) for folder in folders]
    layout = "Sintel, training/final/alley_1/frame_0001.png, training/camdata_left and training/depth"
    return some(scenes, layout, root, report)


def _sintel(base: Path, folder: Path, config: ReaderConfig, report: Report) -> Content:
    views = []
    for image in image_files(folder, report):
        camera = base / "camdata_left" / folder.name / f"{image.stem}.cam"
        depth = base / "depth" / folder.name / f"{image.stem}.dpt"
        try:
            matrix, pose = read_sintel_camera(camera)
            intrinsic, extrinsic = pinhole(matrix, "its camera"), pose_from_w2c(pose)
        except (OSError, ValueError) as error:
            report.leave_out(f"{image.name}: {in_words(error)}", depth.is_file(), camera.is_file())
            continue
        intrinsic[:2, 2] += 0.5
        there, bare = depth_there(depth)
        views.append(View(image.name, image, intrinsic, extrinsic, there, bare=bare))
    source = {"kind": "sintel", "sequence": folder.name, "pass": folder.parent.name}
    return content(views, config, report, folder, source, DepthFormat(1.0, read_dpt), allowed=[base])


def find_da3_bench(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """The scenes of all parts that are there, as ``eth3d_courtyard`` and so on."""
    parts: dict[str, Callable[[ReaderConfig, Path, Report], list[SourceScene]]] = {
        "eth3d": find_eth3d,
        "7scenes": indoor.find_7scenes,
        "scannetpp": _da3_scannetpp,
        "hiroom": indoor.find_hiroom,
        "dtu": find_dtu,
        "dtu64": find_dtu,
    }
    scenes = []
    for name, find in parts.items():
        if (root / name).is_dir():
            of_part = Report()
            try:
                found = find(config, root / name, of_part)
            except ValueError as error:
                report(f"{root / name}: left out, {error}")
                continue
            report.add(of_part)
            # one data set, whatever splits the parts have
            scenes += [replace(scene, name=f"{name}_{scene.name}", split="") for scene in found]
    return some(scenes, f"the extracted parts of DA3-BENCH ({', '.join(parts)})", root, report)


def _da3_scannetpp(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """``<id>``: the images of the phone in merge_dslr_iphone/colmap/sparse_render_rgb."""
    scenes = []
    for folder in sorted(root.glob("*/merge_dslr_iphone")):
        model = folder / "colmap/sparse_render_rgb"
        read = partial(indoor.colmap_benchmark, model, folder, ("images",), "scannet++", "iphone")
        scenes.append(SourceScene(folder.parent.name, "", read))
    return some(scenes, "<id>/merge_dslr_iphone/colmap/sparse_render_rgb", root, report)
