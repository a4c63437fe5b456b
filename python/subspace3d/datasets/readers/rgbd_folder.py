"""Plain RGB-D folders in the layout of the TUM RGB-D benchmark, one scene per folder with an intrinsics.txt.

<scene>/rgb/*.png        images; a folder called images or color is taken too
<scene>/depth/*.png      depth with the stem of its image, also depth_STEM; png, tiff, npy, npz, exr; may be missing
<scene>/intrinsics.txt   fx fy cx cy, or a matrix 3x3, 3x4 or 4x4; pixels from the centre of the first pixel
<scene>/groundtruth.txt  TUM: timestamp tx ty tz qx qy qz qw; or poses.txt: one 3x4 or 4x4 matrix per image and line
<scene>/rgb.txt, depth.txt  TUM: timestamp and file; frames and poses are then paired by time
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from subspace3d.datasets.readers import text
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import (
    by_stem,
    image_files,
    named_file,
    ordered,
    partners,
    report_incomplete,
    scene_name,
    some,
)
from subspace3d.datasets.readers.source import Content, Report, SourceScene, in_words, pinhole, pose_matrix
from subspace3d.datasets.readers.views import DepthFormat, View, content, pose_from_c2w, pose_from_w2c
from subspace3d.files import stays_inside, walk

IMAGE_FOLDERS = ("rgb", "images", "color")
DEPTH_FOLDERS = ("depth", "depths")
_LARGEST_GAP_S = 0.02  # between the times of an image, its depth and its pose
_TUM_STEP = 2e-4  # metres per step of a depth png
_POSES = ("groundtruth.txt", "poses.txt")
_WIDTHS = (8, 12, 16)  # numbers in a line of a pose


@dataclass
class Pose:
    """A line of a file of poses."""

    key: str | None  # its first column where it has 8
    matrix: np.ndarray | None  # [3, 4], as written
    fault: str = ""  # why there is no matrix


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Folders at or below ``root`` with an intrinsics.txt, named by their path."""
    found = [folder for folder, _, names in walk(root) if "intrinsics.txt" in names]
    report_incomplete(root, found, IMAGE_FOLDERS, ["intrinsics.txt"], report)
    scenes = [SourceScene(scene_name(folder, root), "", partial(_read, folder)) for folder in found]
    layout = "RGB-D folders, <scene>/rgb, depth, intrinsics.txt (fx fy cx cy) and groundtruth.txt or poses.txt"
    return some(scenes, layout, root, report)


def _read(folder: Path, config: ReaderConfig, report: Report) -> Content:
    return rgbd_content(config, report, folder, read_intrinsics(folder / "intrinsics.txt"), "rgbd")


def rgbd_content(
    config: ReaderConfig, report: Report, folder: Path, intrinsic: np.ndarray, kind: str, scale: float = 0.0
) -> Content:
    """The scene of a folder of images, depth and poses, by TUM's lists where there is an rgb.txt."""
    by_time = (folder / "rgb.txt").is_file()
    found = _timed(folder, report) if by_time else _named(folder, report)
    to_w2c = pose_from_c2w if config.poses == "c2w" else pose_from_w2c
    without = f"none within {_LARGEST_GAP_S} s" if by_time and any(depth for _, depth, _ in found) else ""
    views = []
    for image, depth, pose in found:
        try:
            if pose.matrix is None:
                raise ValueError(pose.fault)
            extrinsic = to_w2c(pose.matrix)
        except ValueError as error:
            report.leave_out(f"{image.name}: {in_words(error)}", depth is not None, camera=True)
            continue
        views.append(View(image.name, image, intrinsic, extrinsic, depth, bare=without if depth is None else ""))
    depth_format = DepthFormat(scale=scale or (_TUM_STEP if by_time else 0.0))
    built = content(views, config, report, folder, {"kind": kind, "scene": folder.name}, depth_format)
    built.provenance["poses"] = config.poses
    return built


def read_intrinsics(path: Path) -> np.ndarray:
    """K [3, 3] from the corner of the image, of a file of fx fy cx cy or of a matrix, from the first pixel's centre."""
    numbers = text.numbers(path)
    if numbers.size == 4:
        fx, fy, cx, cy = numbers
        intrinsic = pinhole(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), str(path))
    elif numbers.size in (9, 12, 16):
        intrinsic = pinhole(numbers.reshape({9: (3, 3), 12: (3, 4), 16: (4, 4)}[numbers.size]), str(path))
    else:
        raise ValueError(f"{path} must hold fx fy cx cy or a matrix 3x3 or 4x4, got {numbers.size} numbers")
    intrinsic[:2, 2] += 0.5
    return intrinsic


def _named(folder: Path, report: Report) -> list[tuple[Path, Path | None, Pose]]:
    """Images as people count them; poses line by line, or by the image's stem in the first column."""
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    if images is None:
        raise ValueError(f"{folder} must hold a folder of images called {' or '.join(IMAGE_FOLDERS)}")
    files = ordered(image_files(images, report))
    depths = depth_partners(folder, files, DEPTH_FOLDERS, report)
    poses = _poses_of(files, read_poses(folder), folder)
    found = []
    for file in files:
        if file not in poses:
            report.leave_out(f"{file.name}: no pose", file in depths)
        else:
            found.append((file, depths.get(file), poses[file]))
    return found


def depth_partners(folder: Path, files: list[Path], names: tuple[str, ...], report: Report) -> dict[Path, Path]:
    """Depth files by image; those that go with none are reported.

    Raises:
        ValueError: there are depth files, and none goes with an image.
    """
    depths = by_stem(folder, names, report)
    pairs = partners(files, depths)
    if depths and not pairs:
        example = next(iter(depths.values()))
        raise ValueError(
            f"{folder} has {len(depths)} depth files like {example.name}, none of which has the name of an image "
            f"(like {files[0].stem if files else '0000'})"
        )
    if pairs:
        spare = set(depths.values()) - set(pairs.values())
        report.count(depths=len(spare))
        for path in sorted(spare):
            report(f"{path.name}: depth without an image of its name")
    return pairs


def _poses_of(files: list[Path], poses: list[Pose], folder: Path) -> dict[Path, Pose]:
    by_key = {pose.key: pose for pose in poses if pose.key is not None}
    exact = {file: by_key[file.stem] for file in files if file.stem in by_key}
    exact |= {file: by_key[file.name] for file in files if file.name in by_key}
    if exact:
        return exact
    by_number = {number: pose for key, pose in by_key.items() if (number := _number(key)) is not None}
    equal = {file: by_number[number] for file in files if (number := _number(file.stem)) in by_number}
    if equal:
        return equal
    if len(poses) != len(files):
        raise ValueError(
            f"{folder} must have one pose per image, got {len(poses)} poses and {len(files)} images "
            "(or name the image in the first of 8 columns)"
        )
    return dict(zip(files, poses))


def _number(stem: str) -> float | None:
    try:
        return float(stem)
    except ValueError:
        return None


def _timed(folder: Path, report: Report) -> list[tuple[Path, Path | None, Pose]]:
    """Images of rgb.txt with the depth and the pose nearest in time, at most 0.02 s away."""
    images = _read_list(folder / "rgb.txt")
    depths = _read_list(folder / "depth.txt") if (folder / "depth.txt").is_file() else []
    poses = read_poses(folder)
    if any(pose.key is None for pose in poses):
        raise ValueError(f"{folder} must have a groundtruth.txt with times beside rgb.txt")
    pose_times = np.array([text.floats([str(pose.key)], folder / "groundtruth.txt")[0] for pose in poses])
    depth_times = np.array([time for time, _ in depths])
    found = []
    for time, file in images:
        pose, depth = _nearest(pose_times, time), _nearest(depth_times, time)
        if pose is None:
            report.leave_out(f"{file.name}: no pose within {_LARGEST_GAP_S} s", depth is not None)
            continue
        found.append((file, None if depth is None else depths[depth][1], poses[pose]))
    return found


def _nearest(times: np.ndarray, time: float) -> int | None:
    if not len(times):
        return None
    index = int(np.abs(times - time).argmin())
    return index if abs(times[index] - time) <= _LARGEST_GAP_S else None


def _read_list(path: Path) -> list[tuple[float, Path]]:
    # a name may have blanks
    rows = [line.split(maxsplit=1) for line in text.lines(path)]
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{path} must have lines of a timestamp and a file")
    files = [named_file(path.parent, row[1]) for row in rows]
    outside = next((row[1] for row, file in zip(rows, files) if not stays_inside(path.parent, file)), None)
    if outside is not None:
        raise ValueError(f"{path} must name files inside its folder, got {outside!r:.80}")
    return [(text.floats(row[:1], path)[0], file) for row, file in zip(rows, files)]


def read_poses(folder: Path) -> list[Pose]:
    """The lines of groundtruth.txt, else of poses.txt; what is no pose has a fault and keeps its place.

    Raises:
        ValueError: there is no such file, or its lines are none of the kinds that are known.
    """
    path = next((folder / name for name in _POSES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder} must have a groundtruth.txt (TUM) or a poses.txt (one matrix per line)")
    rows = text.rows(path)
    width = Counter(map(len, rows)).most_common(1)[0][0] if rows else 0
    if width not in _WIDTHS:
        raise ValueError(
            f"{path} must have lines of 8 numbers (time tx ty tz qx qy qz qw), 12 (3x4) or 16 (4x4), "
            f"got {sorted({len(row) for row in rows}) or 'none'}"
        )
    return [_pose(row, width, path) for row in rows]


def _pose(row: list[str], width: int, path: Path) -> Pose:
    key = row[0] if width == 8 else None
    try:
        if len(row) != width:
            raise ValueError(f"a line of {path.name} has {len(row)} numbers, the others {width}")
        values = text.floats(row[1:] if width == 8 else row, path)
        if width == 8:
            return Pose(key, text.quaternion_pose(values))
        return Pose(key, pose_matrix(np.reshape(values, (-1, 4)).tolist(), "a pose")[:3])
    except ValueError as error:
        return Pose(key, None, str(error))
