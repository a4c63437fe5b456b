"""ClearPose: ROOT/set1/scene1/000000-color.png, -depth_true.png, ..., metadata.mat.

A frame's ``rotation_translation_matrix`` is camera-to-world and gets inverted; depth in metres is the png divided by
``factor_depth``. The principal point counts from the centre of the first pixel there, from its corner here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import some
from subspace3d.datasets.readers.matlab import LARGEST, check_elements
from subspace3d.datasets.readers.source import Content, Report, SourceScene, in_words, limit_side
from subspace3d.datasets.readers.views import pose_from_c2w
from subspace3d.formats.images import read_depth, read_rgb
from subspace3d.formats.scene import Frame
from subspace3d.reading import read_bytes

_FRAME_STEP, _TEST_FRAMES = 100, 12  # the paper keeps one frame of a hundred, and tests on so many of these
_TEST_SCENE = {1: 5, 2: 6, 3: 8, 4: 6, 5: 6, 6: 6, 7: 6}  # the last scene of each training set
_TEST_SETS = (8, 9)
_TRAINING_QUANTILE = 98  # farther training depth, in percent of a frame's valid pixels, does not count


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Scenes by set and number, as ``set1_scene1``."""
    scenes = []
    for folder in sorted(root.glob("set*/scene*"), key=lambda path: (_number(path.parent), _number(path))):
        if not folder.is_dir():
            continue
        if not (folder / "metadata.mat").is_file():
            report(f"{folder}: no metadata.mat in it")
            continue
        group, number = _number(folder.parent), _number(folder)
        split = "test" if group in _TEST_SETS or _TEST_SCENE.get(group) == number else "train"
        name = f"{folder.parent.name}_{folder.name}"
        scenes.append(SourceScene(name, split, partial(_read, folder, split)))
    return some(scenes, "ClearPose scenes, set1/scene1/metadata.mat and so on", root, report)


def _number(folder: Path) -> int:
    digits = re.sub(r"\D", "", folder.name)
    return int(digits) if digits else 0


def _read(folder: Path, split: str, config: ReaderConfig, report: Report) -> Content:
    metadata = _read_metadata(folder / "metadata.mat")
    step = config.frame_step or _FRAME_STEP
    keys = [key for key in sorted(metadata) if int(key) % step == 0]
    if not keys:
        raise ValueError(f"{folder}: no frame has a number that is a multiple of {step} (--frame-step)")
    if split == "test" and not config.frame_step and len(keys) > _TEST_FRAMES:
        keys = [keys[index * (len(keys) - 1) // (_TEST_FRAMES - 1)] for index in range(_TEST_FRAMES)]
    factors = {float(metadata[key]["factor_depth"]) for key in keys}
    if len(factors) != 1 or not min(factors) > 0:
        raise ValueError(f"{folder}: factor_depth must be one positive number, got {sorted(factors)}")
    scale = 1 / factors.pop()
    report.count(len(keys), len(keys), len(keys))
    used: list[str] = []
    frames = _frames(folder, metadata, keys, scale, split == "train", config.max_side, report, used)
    # complete once the frames are consumed
    provenance = {"source": {"kind": "clearpose", "scene": f"{folder.parent.name}/{folder.name}", "frames": used}}
    return Content(frames, provenance, depth_scale=scale)


def _read_metadata(path: Path) -> dict[str, dict[str, np.ndarray]]:
    from scipy.io import loadmat

    data = read_bytes(path, LARGEST)
    try:
        check_elements(data)
        content = loadmat(io.BytesIO(data))
    except Exception as error:  # scipy raises what its parsers happen to run into
        raise ValueError(f"{path} is not a whole MATLAB file: {error}") from error
    result = {}
    for key, value in content.items():
        if re.fullmatch(r"\d+", key):
            result[key] = _fields(value, f"{path}: {key}")
    if not result:
        raise ValueError(f"{path} must have one entry per frame, named by its number")
    return result


def _fields(value: Any, where: str) -> dict[str, np.ndarray]:
    names = getattr(getattr(value, "dtype", None), "names", None) or ()
    intrinsics = "camera_intrinsics" if "camera_intrinsics" in names else "intrinsic_matrix"
    wanted = {intrinsics: (3, 3), "rotation_translation_matrix": (3, 4), "factor_depth": (1, 1)}
    fields = {}
    for name, shape in wanted.items():
        try:
            array = np.asarray(value[name].flat[0], np.float64) if name in names and value.size else np.zeros(0)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {name} must hold numbers: {error}") from error
        if array.size != np.prod(shape):
            raise ValueError(f"{where} must have {name} of shape {list(shape)}, got {list(array.shape)}")
        fields["intrinsics" if name == intrinsics else name] = array.reshape(shape)
    fields["factor_depth"] = fields["factor_depth"][0, 0]
    return fields


def _frames(
    folder: Path,
    metadata: dict[str, dict[str, np.ndarray]],
    keys: list[str],
    scale: float,
    training: bool,
    max_side: int,
    report: Report,
    used: list[str],
) -> Iterator[Frame]:
    for key in keys:
        try:
            frame = _frame(folder, key, metadata[key], scale, training)
        except (OSError, ValueError) as error:
            report(f"frame {key}: {in_words(error)}")
            continue
        used.append(key)
        yield limit_side(frame, max_side)


def _frame(folder: Path, key: str, fields: dict[str, np.ndarray], scale: float, training: bool) -> Frame:
    file, depth_file = folder / f"{key}-color.png", folder / f"{key}-depth_true.png"
    for path in (file, depth_file):
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name}")
    image = read_rgb(file)
    depth = read_depth(depth_file, scale, image.shape[:2])
    if training and (depth > 0).any():
        depth[depth > np.percentile(depth[depth > 0], _TRAINING_QUANTILE)] = 0
    intrinsic = fields["intrinsics"].copy()
    intrinsic[:2, 2] += 0.5
    return Frame(image, intrinsic, pose_from_c2w(fields["rotation_translation_matrix"]), depth, file=file)
