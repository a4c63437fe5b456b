"""Plain RGB-D folders in the layout of the TUM RGB-D benchmark, one scene per folder with an intrinsics.txt.

<scene>/rgb/*.png        images (png or jpg); a folder called images or color is taken too
<scene>/depth/*.png      depth with the stem of its image (png, npy, exr); may be missing
<scene>/intrinsics.txt   fx fy cx cy, or a 3x3 matrix; pixels from the centre of the first pixel
<scene>/groundtruth.txt  TUM: timestamp tx ty tz qx qy qz qw; or poses.txt: one 3x4 or 4x4 matrix per image and line
<scene>/rgb.txt, depth.txt  TUM: timestamp and file; frames and poses are then paired by time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.source import (
    Content,
    Report,
    SourceScene,
    depth_at,
    invert_pose,
    limit_side,
    nearest_rotation,
    rotation_from_quaternion,
    storable_depth,
)
from subspace3d.formats.images import read_depth, read_rgb
from subspace3d.formats.scene import Frame

_IMAGE_FOLDERS = ("rgb", "images", "color")
_IMAGES = (".png", ".jpg", ".jpeg")
_DEPTHS = (".png", ".npy", ".exr")
_LARGEST_GAP_S = 0.02  # between the times of an image, its depth and its pose
_MILLIMETRE, _TUM_STEP = 1e-3, 2e-4  # metres per step of a depth png


@dataclass
class _View:
    image: Path
    depth: Path | None
    pose: np.ndarray  # [3, 4], as written


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders at or below ``root`` with an intrinsics.txt, named by their path."""
    scenes = []
    for file in sorted(root.rglob("intrinsics.txt")):
        folder = file.parent
        name = "_".join(folder.relative_to(root).parts) or root.resolve().name
        scenes.append(SourceScene(name, "", _reader(config, folder)))
    if not scenes:
        raise ValueError(
            f"root must hold RGB-D folders: rgb/, depth/, intrinsics.txt (fx fy cx cy) and groundtruth.txt or "
            f"poses.txt; found no intrinsics.txt below {root}"
        )
    return scenes


def _reader(config: ReaderConfig, folder: Path) -> Callable[[Report], Content]:
    def read(report: Report) -> Content:
        intrinsic = _read_intrinsics(folder / "intrinsics.txt")
        by_time = (folder / "rgb.txt").is_file()
        views = _timed_views(folder, report) if by_time else _named_views(folder, report)
        views = views[:: config.frame_step or 1]
        if not views:
            raise ValueError(f"{folder}: no image has a pose")
        scale = config.depth_scale or (_TUM_STEP if by_time else _MILLIMETRE)
        inverted = config.poses == "c2w"

        def frames() -> Iterator[Frame]:
            for view in views:
                try:
                    frame = _frame(view, intrinsic, scale, inverted)
                except (OSError, ValueError) as error:
                    report(f"{view.image.name}: {error}")
                    continue
                yield limit_side(frame, config.max_side)

        provenance = {
            "source": {"kind": "rgbd", "scene": folder.name, "images": [view.image.name for view in views]},
            "poses": config.poses,
        }
        return Content(frames(), provenance, depth_scale=scale)

    return read


def _frame(view: _View, intrinsic: np.ndarray, scale: float, inverted: bool) -> Frame:
    image = read_rgb(view.image)
    depth = None
    if view.depth is not None:
        depth = depth_at(storable_depth(read_depth(view.depth, scale), scale), image.shape[:2])
    pose = view.pose
    extrinsic = invert_pose(pose) if inverted else np.c_[nearest_rotation(pose[:, :3]), pose[:, 3]]
    return Frame(image, intrinsic, extrinsic, depth, file=view.image)


def _read_intrinsics(path: Path) -> np.ndarray:
    numbers = np.array([number for row in _rows(path) for number in _floats(row, path)])
    if numbers.size == 4:
        fx, fy, cx, cy = numbers
    elif numbers.size == 9:
        fx, fy, cx, cy = numbers[[0, 4, 2, 5]]
    else:
        raise ValueError(f"{path} must hold fx fy cx cy or a 3x3 matrix, got {numbers.size} numbers")
    return np.array([[fx, 0, cx + 0.5], [0, fy, cy + 0.5], [0, 0, 1]])


def _named_views(folder: Path, report: Report) -> list[_View]:
    """Images in the order of their names; poses line by line, or by the image's stem in the first column."""
    images = next((folder / name for name in _IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise ValueError(f"{folder} must hold a folder of images called {' or '.join(_IMAGE_FOLDERS)}")
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in _IMAGES)
    depths = {path.stem: path for path in (folder / "depth").glob("*") if path.suffix in _DEPTHS}
    stems, poses = _read_poses(folder)
    views = []
    if stems is None or not set(stems) & {file.stem for file in files}:
        if len(poses) != len(files):
            raise ValueError(
                f"{folder} must have one pose per image, got {len(poses)} poses and {len(files)} images "
                "(or name the image in the first of 8 columns)"
            )
        by_stem = {file.stem: pose for file, pose in zip(files, poses)}
    else:
        by_stem = dict(zip(stems, poses))
    for file in files:
        if file.stem not in by_stem:
            report(f"{file.name}: no pose")
        elif depths and file.stem not in depths:
            report(f"{file.name}: no depth")
        else:
            views.append(_View(file, depths.get(file.stem), by_stem[file.stem]))
    return views


def _timed_views(folder: Path, report: Report) -> list[_View]:
    """Images of rgb.txt with the depth and the pose nearest in time, at most 0.02 s away."""
    images = _read_list(folder / "rgb.txt")
    depths = _read_list(folder / "depth.txt") if (folder / "depth.txt").is_file() else []
    stems, poses = _read_poses(folder)
    if stems is None:
        raise ValueError(f"{folder} must have a groundtruth.txt with times beside rgb.txt")
    pose_times = np.array([_floats([stem], folder / "groundtruth.txt")[0] for stem in stems])
    depth_times = np.array([time for time, _ in depths])
    views = []
    for time, file in images:
        pose, depth = _nearest(pose_times, time), _nearest(depth_times, time)
        if pose is None:
            report(f"{file.name}: no pose within {_LARGEST_GAP_S} s")
        elif depths and depth is None:
            report(f"{file.name}: no depth within {_LARGEST_GAP_S} s")
        else:
            views.append(_View(file, None if depth is None else depths[depth][1], poses[pose]))
    return views


def _nearest(times: np.ndarray, time: float) -> int | None:
    if not len(times):
        return None
    index = int(np.abs(times - time).argmin())
    return index if abs(times[index] - time) <= _LARGEST_GAP_S else None


def _read_list(path: Path) -> list[tuple[float, Path]]:
    rows = _rows(path)
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{path} must have lines of a timestamp and a file")
    folder = path.parent.resolve()
    outside = [row[1] for row in rows if not (folder / row[1]).resolve().is_relative_to(folder)]
    if outside:
        raise ValueError(f"{path} must name files inside its folder, got {outside[0]!r}")
    return [(_floats(row[:1], path)[0], path.parent / row[1]) for row in rows]


def _read_poses(folder: Path) -> tuple[list[str] | None, np.ndarray]:
    """First columns where lines have 8 (TUM), else None; and poses [N, 3, 4] as written."""
    path = next((folder / name for name in ("groundtruth.txt", "poses.txt") if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} must have a groundtruth.txt (TUM) or a poses.txt (one matrix per line)")
    rows = _rows(path)
    widths = {len(row) for row in rows}
    if widths == {8}:
        numbers = np.array([_floats(row[1:], path) for row in rows])
        rotations = rotation_from_quaternion(numbers[:, 3:])
        return [row[0] for row in rows], np.concatenate([rotations, numbers[:, :3, None]], axis=2)
    if widths in ({12}, {16}):
        matrices = np.array([_floats(row, path) for row in rows])
        return None, matrices.reshape(len(rows), -1, 4)[:, :3]
    raise ValueError(
        f"{path} must have lines of 8 numbers (time tx ty tz qx qy qz qw), 12 (3x4) or 16 (4x4), "
        f"got {sorted(widths) or 'none'}"
    )


def _rows(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file: {error}") from error
    return [line.replace(",", " ").split() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _floats(words: list[str], path: Path) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers: {error}") from error
