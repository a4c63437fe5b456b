"""Indoor benchmarks with measured or rendered depth: 7-Scenes, Neural RGB-D, ScanNet, ScanNet++, Bonn, HiRoom.

7-Scenes   <scene>/seq-01/frame-000000.color.png, .depth.png (mm, 65535 invalid), .pose.txt (c2w); TrainSplit.txt
NRGBD      <scene>/images/img0.png, depth/depth0.png (mm), poses.txt (c2w, OpenGL, four lines each), focal.txt
ScanNet    <scene>/color/0.jpg, depth/0.png (mm), pose/0.txt (c2w), intrinsic/intrinsic_color.txt
ScanNet++  <id>/dslr/ and <id>/iphone/, each colmap/, its images, render_depth/ or depth/ (mm)
Bonn       rgbd_bonn_<name>/ in TUM's layout without intrinsics
HiRoom     <scene>/image/, depth/ (65535 steps to 100 m), pose/*.npy (w2c), cam_K.npy, aliasing_mask/
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from subspace3d.datasets.readers import text
from subspace3d.datasets.readers.colmap import pinhole_of
from subspace3d.datasets.readers.colmap_model import has_model, read_model
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import depth_there, image_files, report_incomplete, scene_name, some
from subspace3d.datasets.readers.rgbd_folder import rgbd_content
from subspace3d.datasets.readers.source import Content, Report, SourceScene, in_words, pinhole
from subspace3d.datasets.readers.views import (
    DepthFormat,
    View,
    content,
    pose_from_c2w,
    pose_from_opengl,
    pose_from_w2c,
)
from subspace3d.files import natural, walk
from subspace3d.formats.images import image_header, open_image, read_numbers, read_stored_depth

_SEVEN = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])  # of 640 x 480, from the corner
_SEVEN_INVALID = 65535
_BONN = np.array([[542.822841, 0, 315.593520 + 0.5], [0, 542.576870, 237.756098 + 0.5], [0, 0, 1]])
_TUM_STEP = 2e-4
_HIROOM_STEP = 100 / 65535  # metres per step
_SCANNET = ("color", "pose", "intrinsic")
_SCANNETPP = ("dslr", "iphone")
_SCANNETPP_IMAGES = ("resized_images", "images", "rgb", "undistorted_images")


def find_7scenes(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Sequences as ``chess_seq-01``, in the split of TrainSplit.txt and TestSplit.txt where these are there."""
    scenes = []
    for folder, children, names in walk(root):
        for name in names:
            if re.fullmatch(r"seq-\d+\.zip", name) and name.removesuffix(".zip") not in children:
                report(f"{folder / name}: left out, it is not extracted")
        if re.fullmatch(r"seq-\d+", folder.name) and any(name.endswith(".color.png") for name in names):
            name = f"{folder.parent.name}_{folder.name}"
            scenes.append(SourceScene(name, _seven_split(folder), partial(_seven, folder)))
    return some(scenes, "7-Scenes, chess/seq-01/frame-000000.color.png and so on", root, report)


def _seven_split(folder: Path) -> str:
    number = int(folder.name.removeprefix("seq-"))
    for split in ("Train", "Test"):
        path = folder.parent / f"{split}Split.txt"
        if path.is_file() and number in [int(re.sub(r"\D", "", line) or -1) for line in text.lines(path)]:
            return split.lower()
    return ""


def _seven(folder: Path, config: ReaderConfig, report: Report) -> Content:
    views = []
    for image in sorted(folder.glob("*.color.png")):
        stem = image.name.removesuffix(".color.png")
        depth = folder / f"{stem}.depth.png"
        pose = _pose(image, folder / f"{stem}.pose.txt", depth, _c2w, report)
        if pose is not None:
            there, bare = depth_there(depth)
            views.append(View(image.name, image, _SEVEN, pose, there, (480, 640), bare=bare))
    source = {"kind": "7scenes", "sequence": f"{folder.parent.name}/{folder.name}"}
    return content(views, config, report, folder, source, DepthFormat(1e-3, invalid=_SEVEN_INVALID))


def find_nrgbd(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders with a focal.txt and a poses.txt."""
    found = [folder for folder, _, names in walk(root) if {"focal.txt", "poses.txt"} <= set(names)]
    report_incomplete(root, found, ["images"], ["focal.txt", "poses.txt"], report)
    scenes = [SourceScene(scene_name(folder, root), "", partial(_nrgbd, folder)) for folder in found]
    layout = "Neural RGB-D scenes, breakfast_room/images/img0.png, poses.txt, focal.txt and so on"
    return some(scenes, layout, root, report)


def _nrgbd(folder: Path, config: ReaderConfig, report: Report) -> Content:
    focal = text.numbers(folder / "focal.txt")
    if focal.size != 1 or not focal[0] > 0:
        raise ValueError(f"{folder / 'focal.txt'} must hold one positive number, got {focal.tolist()!s:.80}")
    rows = text.rows(folder / "poses.txt")
    if len(rows) % 4 or any(len(row) != 4 for row in rows):
        raise ValueError(f"{folder / 'poses.txt'} must hold four lines of four numbers per pose, got {len(rows)} lines")
    poses = np.array([text.floats(row, folder / "poses.txt") for row in rows]).reshape(-1, 4, 4)
    views = []
    for image in image_files(folder / "images", report):
        number = int(re.sub(r"\D", "", image.stem) or -1)
        listed, depth = 0 <= number < len(poses), folder / f"depth/depth{number}.png"
        try:
            if not listed:
                raise ValueError("no pose")
            # poses that tracking has not found are nan
            pose = pose_from_opengl(poses[number])
            (height, width), _ = image_header(image)
        except (OSError, ValueError) as error:
            report.leave_out(f"{image.name}: {in_words(error)}", depth.is_file(), listed)
            continue
        intrinsic = np.array([[focal[0], 0, width / 2], [0, focal[0], height / 2], [0, 0, 1]])
        there, bare = depth_there(depth)
        views.append(View(image.name, image, intrinsic, pose, there, (height, width), bare=bare))
    return content(views, config, report, folder, {"kind": "nrgbd", "scene": folder.name}, DepthFormat(1e-3))


def find_scannet(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders with color/, pose/ and intrinsic/, as SensReader exports them."""
    found = [folder for folder, children, _ in walk(root) if set(_SCANNET) <= set(children)]
    report_incomplete(root, found, [], _SCANNET, report)
    scenes = [SourceScene(scene_name(folder, root), "", partial(_scannet, folder)) for folder in found]
    return some(scenes, "exported ScanNet scenes, scene0000_00/color/0.jpg, depth/, pose/, intrinsic/", root, report)


def _scannet(folder: Path, config: ReaderConfig, report: Report) -> Content:
    file = folder / "intrinsic/intrinsic_color.txt"
    intrinsic = pinhole(text.matrix(file), str(file))
    intrinsic[:2, 2] += 0.5
    views = _views(folder, "color", ".txt", _c2w, intrinsic, report)
    return content(views, config, report, folder, {"kind": "scannet", "scene": folder.name}, DepthFormat(1e-3))


def find_scannetpp(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """``<id>_dslr`` and ``<id>_iphone`` where their COLMAP models are there."""
    scenes = []
    for folder, children, names in walk(root):
        if folder.name in _SCANNETPP and "colmap" not in children:
            report(f"{folder}: left out, it has no colmap/ with cameras and images")
        if folder.name == "colmap" and folder.parent.name in _SCANNETPP and not has_model(names):
            report(f"{folder}: left out, it has no cameras and images of COLMAP (.txt or .bin)")
        elif has_model(names) and folder.name == "colmap" and folder.parent.name in _SCANNETPP:
            device = folder.parent
            name = f"{scene_name(device.parent, root)}_{device.name}"
            scenes.append(
                SourceScene(name, "", partial(colmap_benchmark, folder, device, _SCANNETPP_IMAGES, "scannet++", ""))
            )
    layout = "ScanNet++ scenes, <id>/dslr/colmap/cameras.txt beside <id>/dslr/resized_images"
    return some(scenes, layout, root, report)


def colmap_benchmark(
    model_folder: Path,
    folder: Path,
    image_folders: tuple[str, ...],
    kind: str,
    only: str,
    config: ReaderConfig,
    report: Report,
) -> Content:
    """A scene of a COLMAP model in metres with depth in millimetres in render_depth/ or depth/ by the images' stems.

    Of the model's images those with ``only`` in their names.
    """
    model = read_model(model_folder)
    images = next((folder / name for name in image_folders if (folder / name).is_dir()), folder)
    depths = next((folder / name for name in ("render_depth", "depth") if (folder / name).is_dir()), None)

    def depth_of(name: str) -> Path | None:
        return None if depths is None else depths / f"{Path(name).stem}.png"

    for name, fault in model.faults.items():
        if only in name:
            path = depth_of(name)
            report.leave_out(f"{name}: {fault}", path is not None and os.path.isfile(path), camera=True)
    cameras = {number: pinhole_of(camera) for number, camera in model.cameras.items()}
    views = []
    for name, number, pose in sorted(model.images, key=lambda image: natural(image[0])):
        if only in name:
            camera, (intrinsic, projection) = model.cameras[number], cameras[number]
            path = depth_of(name)
            depth, bare = (None, "") if path is None else depth_there(path)
            size = (camera.height, camera.width)
            views.append(View(name, images / name, intrinsic, pose, depth, size, projection, bare=bare))
    source = {"kind": kind, "scene": folder.name, "model": model_folder.name}
    return content(views, config, report, folder, source, DepthFormat(1e-3))


def find_bonn(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders with rgb.txt and groundtruth.txt; all have the same camera."""
    found = [folder for folder, _, names in walk(root) if {"rgb.txt", "groundtruth.txt"} <= set(names)]
    report_incomplete(root, found, ["rgb"], ["rgb.txt", "groundtruth.txt"], report)
    scenes = [SourceScene(scene_name(folder, root), "", partial(_bonn, folder)) for folder in found]
    layout = "Bonn's sequences, rgbd_bonn_balloon/rgb.txt, depth.txt, groundtruth.txt and so on"
    return some(scenes, layout, root, report)


def _bonn(folder: Path, config: ReaderConfig, report: Report) -> Content:
    return rgbd_content(config, report, folder, _BONN, "bonn", _TUM_STEP)


def find_hiroom(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders with a cam_K.npy."""
    found = [folder for folder, _, names in walk(root) if "cam_K.npy" in names]
    report_incomplete(root, found, ["image"], ["cam_K.npy"], report)
    scenes = [SourceScene(scene_name(folder, root), "", partial(_hiroom, folder)) for folder in found]
    return some(scenes, "HiRoom scenes, <scene>/image/, depth/, pose/, cam_K.npy", root, report)


def _hiroom(folder: Path, config: ReaderConfig, report: Report) -> Content:
    intrinsic = pinhole(read_numbers(folder / "cam_K.npy"), str(folder / "cam_K.npy"))
    views = _views(folder, "image", ".npy", _w2c, intrinsic, report)
    source = {"kind": "hiroom", "scene": folder.name}
    return content(views, config, report, folder, source, DepthFormat(_HIROOM_STEP, _hiroom_depth))


def _hiroom_depth(path: Path) -> np.ndarray:
    """Metres; 0 where the picture of the edges is aliased."""
    depth = read_stored_depth(path).astype(np.float64) * _HIROOM_STEP
    mask = path.parent.parent / "aliasing_mask" / path.name
    if mask.is_file():
        depth[np.array(open_image(mask, (depth.shape[0], depth.shape[1])).convert("L")) > 0] = 0
    return depth


def _views(
    folder: Path,
    images: str,
    ending: str,
    read_pose: Callable[[Path], np.ndarray],
    intrinsic: np.ndarray,
    report: Report,
) -> list[View]:
    """Images of one camera, their poses in pose/ and depth in depth/ by stem; those without a pose are left out."""
    views = []
    for image in image_files(folder / images, report):
        depth = folder / f"depth/{image.stem}.png"
        pose = _pose(image, folder / f"pose/{image.stem}{ending}", depth, read_pose, report)
        if pose is not None:
            there, bare = depth_there(depth)
            views.append(View(image.name, image, intrinsic, pose, there, bare=bare))
    return views


def _pose(
    image: Path, path: Path, depth: Path, read: Callable[[Path], np.ndarray], report: Report
) -> np.ndarray | None:
    """camera-from-world of an image; where it cannot be read, the image is left out."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        report.leave_out(f"{image.name}: {in_words(error)}", depth.is_file(), path.is_file())
        return None


def _c2w(path: Path) -> np.ndarray:
    return pose_from_c2w(text.matrix(path))


def _w2c(path: Path) -> np.ndarray:
    return pose_from_w2c(read_numbers(path))
