"""What every reader hands to the converter, and the geometry they share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from typing_extensions import TypedDict

from subspace3d.cropping import Box, crop_resize
from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.formats.scene import DEPTH_SCALE, PNG_MAX, Frame
from subspace3d.schema import Rule

PARTS = ("images", "depths", "cameras")
_ROTATION_ERROR = 1e-2  # entries of a matrix further from any rotation than this are a fault, not rounding


class Capture(TypedDict):
    """A record of frames, each of which is checked when it is used: a bad one costs that frame."""

    frames: Annotated[list[Any], Rule("a list of at least one frame", lambda value: len(value) > 0)]


@dataclass
class Report:
    """What was found in a scene, and one sentence about everything that was left out, like ``0001.png: no pose``."""

    reasons: list[str] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))

    def __call__(self, sentence: str) -> None:
        self.reasons.append(sentence)

    def count(self, images: int = 0, depths: int = 0, cameras: int = 0) -> None:
        """Add to what was found, whether or not it can be used."""
        for part, number in zip(PARTS, (images, depths, cameras)):
            self.found[part] += number

    def leave_out(self, sentence: str, depth: bool = False, camera: bool = False) -> None:
        """Report an image that cannot be used, and count it, with whatever else of it was found."""
        self.count(1, depth, camera)
        self(sentence)

    def add(self, other: Report) -> None:
        """Add all of another report."""
        self.reasons += other.reasons
        self.count(**other.found)


@dataclass
class SourceScene:
    """A scene that was found; ``read`` does the work when its turn comes, in another process perhaps."""

    name: str  # of the scene's folder
    split: str  # train, test or "" where the data set has no splits
    read: Callable[[ReaderConfig, Report], Content]  # can be pickled


@dataclass
class Content:
    """What a scene becomes. ``frames`` is consumed once, one frame at a time."""

    frames: Iterable[Frame]
    provenance: dict[str, Any] = field(default_factory=dict)
    unit: str = "m"
    depth_scale: float = DEPTH_SCALE
    translation_known: bool = True


def in_words(error: Exception) -> str:
    """Why something cannot be used, in words for a `Report`."""
    return f"no such file: {error.filename}" if isinstance(error, FileNotFoundError) and error.filename else str(error)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """U V^T of the SVD U S V^T of a 3x3 matrix that is a rotation up to rounding.

    Raises:
        ValueError: it is further than 0.01 from every rotation in some entry, or a reflection.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise ValueError(f"a camera's rotation must be 3x3 and finite, got {matrix.tolist()}")
    u, _, vt = np.linalg.svd(matrix)
    rotation = u @ vt
    error = float(np.abs(rotation - matrix).max())
    if error > _ROTATION_ERROR or np.linalg.det(rotation) < 0:
        raise ValueError(f"a camera's rotation must be a rotation, got {_not_a_rotation(matrix, rotation, error)}")
    return rotation


def _not_a_rotation(matrix: np.ndarray, rotation: np.ndarray, error: float) -> str:
    size = float(np.linalg.norm(matrix)) / 3**0.5
    if np.linalg.det(rotation) < 0:
        return "a reflection (determinant below 0)"
    if size > 0 and np.abs(matrix / size - rotation).max() <= _ROTATION_ERROR:
        return f"one times {size:.4g}: divide the rotation by that"
    return f"one that is off by {error:.2g}"


def upper_rows(pose: np.ndarray, what: str = "a pose") -> np.ndarray:
    """[R | t] float64 [3, 4] of a pose [3, 4] or [4, 4].

    Raises:
        ValueError: the last row of four is not 0 0 0 1; names ``what``.
    """
    pose = np.asarray(pose, np.float64)
    if len(pose) == 4 and np.abs(pose[3] - [0, 0, 0, 1]).max() > _ROTATION_ERROR:
        raise ValueError(f"{what} must have the last row 0 0 0 1, got {pose[3].tolist()}; is it transposed?")
    return pose[:3]


def rotation_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """R [..., 3, 3] of quaternions [..., 4] in the order x, y, z, w; they need not have length 1.

    Raises:
        ValueError: a quaternion of length 0.
    """
    quaternion = np.asarray(quaternion, np.float64)
    length = np.linalg.norm(quaternion, axis=-1, keepdims=True)
    if not (length > 0).all():
        raise ValueError("a quaternion must not be zero")
    x, y, z, w = np.moveaxis(quaternion / length, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def finite_number(values: Mapping[str, Any], key: str, default: float | None = None, below: float = math.inf) -> float:
    """The number under ``key`` of a JSON record.

    Raises:
        ValueError: it is none, not finite, or not smaller than ``below``.
    """
    value = values.get(key, default)
    if not isinstance(value, bool) and isinstance(value, int | float):
        with contextlib.suppress(OverflowError):
            number = float(value)
            if abs(number) < below:
                return number
    raise ValueError(f"{key} must be a finite number, got {str(value)[:40]}")


def pose_matrix(value: Any, what: str) -> np.ndarray:
    """A pose of a JSON record, float64 3x4 or 4x4.

    Raises:
        ValueError: it is no finite matrix of these sizes; names ``what``.
    """
    try:
        matrix = np.array(value, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} must hold numbers: {error}") from error
    if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
        raise ValueError(f"{what} must be 4x4 and finite, got {str(value)[:120]}")
    upper_rows(matrix, what)
    return matrix


def depth_at(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The depth map [h, w] at ``size`` pixels of the same view, each from the depth pixel it lies in.

    Raises:
        ValueError: the aspect ratios differ by more than 1 %.
    """
    if depth.ndim != 2 or not depth.size:
        raise ValueError(f"depth must be [height, width], got {list(depth.shape)}")
    height, width = depth.shape
    if abs(height * size[1] / (width * size[0]) - 1) > 0.01:
        raise ValueError(f"depth of {width} x {height} pixels must have the aspect of its {size[1]} x {size[0]} image")
    rows = (np.arange(size[0]) * 2 + 1) * height // (2 * size[0])
    columns = (np.arange(size[1]) * 2 + 1) * width // (2 * size[1])
    return depth[np.ix_(rows, columns)]


def positive_depth(depth: np.ndarray) -> np.ndarray:
    """float32; what is not finite or not positive becomes 0."""
    with np.errstate(over="ignore"):
        depth = np.asarray(depth, np.float32)
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(0))


def is_beyond_png(depth: np.ndarray, depth_scale: float) -> bool:
    """Whether a depth is too large for the 65535 steps of a png."""
    return bool(depth.max(initial=0) > PNG_MAX * depth_scale)


def pinhole(matrix: np.ndarray, where: str) -> np.ndarray:
    """K [3, 3] float64 of a matrix 3x3, 3x4 or 4x4; skew stays in it.

    Raises:
        ValueError: it is transposed, or no camera matrix at all; names ``where``.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape not in ((3, 3), (3, 4), (4, 4)) or not np.isfinite(matrix).all():
        raise ValueError(f"{where}: intrinsics must be a finite matrix 3x3 or 4x4, got {matrix.tolist()!s:.120}")
    if matrix.shape[1] == 4 and not np.array_equal(matrix[:3, 3], np.zeros(3)):
        raise ValueError(f"{where}: the last column of intrinsics must be 0, got {matrix[:3, 3].tolist()}")
    matrix = matrix[:3, :3]
    if matrix[2, 0] != 0 or matrix[2, 1] != 0:
        raise ValueError(
            f"{where}: intrinsics must be [[fx, skew, cx], [0, fy, cy], [0, 0, 1]], got {matrix.tolist()}; are they "
            "transposed?"
        )
    if matrix[1, 0] != 0 or matrix[2, 2] != 1 or not (matrix[0, 0] > 0 and matrix[1, 1] > 0):
        raise ValueError(
            f"{where}: intrinsics must be [[fx, skew, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0, "
            f"got {matrix.tolist()}"
        )
    return matrix.copy()


def limit_side(frame: Frame, max_side: int) -> Frame:
    """The frame reduced so that its longer side is ``max_side`` pixels; as it is when it is no longer, or for 0."""
    height, width = frame.image.shape[:2]
    if max_side == 0 or max(height, width) <= max_side:
        return frame
    size = (max(1, round(height * max_side / max(height, width))), max(1, round(width * max_side / max(height, width))))
    return cut(frame, (0, 0, width, height), size)


def cut(frame: Frame, box: Box, size: tuple[int, int]) -> Frame:
    """The part ``box`` of a frame in ``size`` pixels; its camera, depth and mask follow where they are known."""
    shape = frame.image.shape[:2]
    depth = np.zeros(shape, np.float32) if frame.depth is None else frame.depth
    known = np.eye(3) if frame.intrinsic is None else frame.intrinsic
    image, depth, intrinsic = crop_resize(frame.image, depth, known, box, size)
    mask = None
    if frame.mask is not None:
        mask = crop_resize(frame.image, frame.mask.astype(np.float32), known, box, size)[1] > 0
    return Frame(
        image,
        None if frame.intrinsic is None else intrinsic,
        frame.extrinsic,
        None if frame.depth is None else depth,
        mask,
        exact=frame.exact,
    )
