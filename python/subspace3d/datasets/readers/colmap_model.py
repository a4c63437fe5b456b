"""The cameras and images of a COLMAP model, text or binary, record by record.

They are read here and not by pycolmap because one pose that is no number makes it refuse the whole model, a quaternion
of zeros becomes an identity there without a word, and the text form loses what follows a space in a name.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from subspace3d.datasets.readers.source import rotation_from_quaternion
from subspace3d.reading import read_bytes, read_text

_LARGEST = 1 << 31  # bytes of a list of images with their points
_POINT = 24  # bytes of a point of an image: x, y, id of the 3D point
# binary id -> name and number of parameters
MODELS = {
    0: ("SIMPLE_PINHOLE", 3), 1: ("PINHOLE", 4), 2: ("SIMPLE_RADIAL", 4), 3: ("RADIAL", 5), 4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8), 6: ("FULL_OPENCV", 12), 7: ("FOV", 5), 8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5), 10: ("THIN_PRISM_FISHEYE", 12), 11: ("RAD_TAN_THIN_PRISM_FISHEYE", 16),
    12: ("SIMPLE_DIVISION", 4), 13: ("DIVISION", 5), 14: ("SIMPLE_FISHEYE", 3), 15: ("FISHEYE", 4), 16: ("EUCM", 6),
}  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """One camera of a model, as COLMAP has it: the centre of the top-left pixel is (0.5, 0.5)."""

    model: str
    width: int
    height: int
    params: tuple[float, ...]


@dataclass
class Model:
    """What was read; ``faults`` has the names of images and what is wrong with them."""

    cameras: dict[int, Camera]
    images: list[tuple[str, int, np.ndarray]]  # name, camera, camera-from-world [3, 4]
    faults: dict[str, str] = field(default_factory=dict)


def has_model(names: list[str]) -> bool:
    """Whether a folder with files of these names holds a model."""
    return any({f"cameras.{kind}", f"images.{kind}"} <= set(names) for kind in ("bin", "txt"))


def read_model(folder: Path) -> Model:
    """The binary form where it is there, else the text.

    Raises:
        ValueError: a list is truncated or none of COLMAP's; names the file.
    """
    if (folder / "cameras.bin").is_file() and (folder / "images.bin").is_file():
        cameras_file, images_file = folder / "cameras.bin", folder / "images.bin"
        read_cameras, read_images = _binary_cameras, _binary_images
    else:
        cameras_file, images_file = folder / "cameras.txt", folder / "images.txt"
        read_cameras, read_images = _text_cameras, _text_images
    try:
        model = Model(read_cameras(cameras_file), [])
    except (struct.error, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{cameras_file} is not a whole list of COLMAP's cameras: {error}") from error
    try:
        read_images(images_file, model)
    except (struct.error, IndexError, ValueError) as error:
        raise ValueError(f"{images_file} is not a whole list of COLMAP's images: {error}") from error
    model.images.sort(key=lambda image: image[0])
    return model


def _text_cameras(path: Path) -> dict[int, Camera]:
    cameras = {}
    for line in read_text(path, _LARGEST).splitlines():
        if line.strip() and not line.startswith("#"):
            number, model, width, height, *params = line.split()
            cameras[int(number)] = _camera(model, int(width), int(height), tuple(map(float, params)))
    return cameras


def _text_images(path: Path, model: Model) -> None:
    lines = [line for line in read_text(path, _LARGEST).split("\n") if not line.startswith("#")]
    while lines and not lines[-1].strip():
        lines.pop()
    # every second line has the points of the image, and is empty where it has none
    for line in lines[::2]:
        words = line.strip().split(maxsplit=9)
        if len(words) != 10:
            raise ValueError(f"a line must have 10 entries (id, qw qx qy qz, tx ty tz, camera, name), got {line!r:.80}")
        _add(model, words[9], int(words[8]), np.array(words[1:8], np.float64))


def _binary_cameras(path: Path) -> dict[int, Camera]:
    data = read_bytes(path, _LARGEST)
    at, cameras = 8, {}
    for _ in range(struct.unpack_from("<Q", data)[0]):
        number, kind, width, height = struct.unpack_from("<iiQQ", data, at)
        if kind not in MODELS:
            raise ValueError(f"a camera model of number {kind} is not known")
        name, count = MODELS[kind]
        cameras[number] = _camera(name, width, height, struct.unpack_from(f"<{count}d", data, at + 24))
        at += 24 + 8 * count
    return cameras


def _binary_images(path: Path, model: Model) -> None:
    data = read_bytes(path, _LARGEST)
    at = 8
    for _ in range(struct.unpack_from("<Q", data)[0]):
        _, *pose, camera = struct.unpack_from("<i7di", data, at)
        at += 64
        end = data.index(b"\0", at)
        name = data[at:end].decode("utf-8", "surrogateescape")
        points = struct.unpack_from("<Q", data, end + 1)[0]
        at = end + 9 + points * _POINT
        if at > len(data):
            raise ValueError(f"it ends among the points of {name}")
        _add(model, name, camera, np.array(pose))


def _camera(model: str, width: int, height: int, params: tuple[float, ...]) -> Camera:
    known = dict(MODELS.values())
    if model not in known or len(params) != known[model] or min(width, height) < 1:
        raise ValueError(
            f"a camera must be one of {', '.join(known)} with its parameters, got {model} of {width} x {height} pixels "
            f"with {len(params)}"
        )
    return Camera(model, width, height, params)


def _add(model: Model, name: str, camera: int, pose: np.ndarray) -> None:
    if camera not in model.cameras:
        model.faults[name] = f"there is no camera {camera}"
        return
    if not np.isfinite(pose).all() or not np.any(pose[:4]):
        model.faults[name] = (
            f"its pose is not finite, or its quaternion is zero (qvec {pose[:4].tolist()}, tvec {pose[4:].tolist()})"
        )
        return
    rotation = rotation_from_quaternion(pose[[1, 2, 3, 0]])
    model.images.append((name, camera, np.concatenate([rotation, pose[4:, None]], axis=1)))
