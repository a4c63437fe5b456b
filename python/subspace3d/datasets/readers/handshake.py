"""Hand-shake bundles: short bursts of a hand-held phone in frame_bundle.npz files anywhere below ROOT.

SoaP: 42 frames with inverse depth from the phone's depth camera. Of the cameras only the rotation is known, from the
motion sensors. HNDR: 120 frames with LiDAR depth, its confidence, and the phone's own poses.
Both store images in portrait format while intrinsics (and HNDR's poses) belong to the landscape sensor. A phone has
OpenGL's axes: x right, y up, z to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.datasets.readers.config import ReaderConfig
from subspace3d.datasets.readers.folders import scene_name, some
from subspace3d.datasets.readers.npz_bundle import Bundle
from subspace3d.datasets.readers.source import (
    Content,
    Report,
    SourceScene,
    depth_at,
    is_beyond_png,
    limit_side,
    nearest_rotation,
    positive_depth,
    rotation_from_quaternion,
)
from subspace3d.files import walk
from subspace3d.formats.scene import DEPTH_SCALE, Frame
from subspace3d.geometry import FLIP

# the landscape image turned clockwise is the portrait image: x' = -y, y' = x
_TURN = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
_LEAST_CONFIDENCE = 1  # of HNDR's 0 (low) to 2 (high)
_UPRIGHT_ERROR = 0.1  # distance of the turned gravity from straight down that still counts as agreement


def find(config: ReaderConfig, root: Path, report: Report) -> list[SourceScene]:
    """Bundles by the folder they lie in; a compressed bundle (9 of 42 frames) is used where no whole one is."""
    bundles = {}
    for folder, _, names in walk(root):
        name = next((name for name in ("frame_bundle.npz", "compressed_frame_bundle.npz") if name in names), None)
        if name is not None:
            bundles[folder] = folder / name
    read = _read_soap if config.from_ == "soap" else _read_hndr
    scenes = []
    for folder in some(list(bundles), "bundles called frame_bundle.npz", root, report):
        scenes.append(SourceScene(scene_name(folder, root), "", partial(_read, bundles[folder], read)))
    return scenes


def _read(
    path: Path, read: Callable[[Bundle, range, Report], Iterator[Frame]], config: ReaderConfig, report: Report
) -> Content:
    bundle = Bundle(path, config.allow_pickle)
    chosen = range(0, _count(bundle, "num_rgb_frames" if config.from_ == "soap" else "num_frames"))
    chosen = chosen[:: config.frame_step or 1]

    def frames() -> Iterator[Frame]:
        try:
            for frame in read(bundle, chosen, report):
                yield limit_side(frame, config.max_side)
        except (TypeError, OverflowError) as error:  # a record may hold anything
            raise ValueError(f"{path} holds a value of an unexpected type: {error}") from error
        finally:
            bundle.close()

    has_depth = config.from_ == "hndr" or ("num_depth_frames" in bundle.names and _count(bundle, "num_depth_frames"))
    report.count(len(chosen), len(chosen) if has_depth else 0, len(chosen))
    provenance = {"source": {"kind": config.from_, "bundle": path.name, "frames": list(chosen)}}
    return Content(frames(), provenance, translation_known=config.from_ != "soap")


def _read_soap(bundle: Bundle, chosen: range, report: Report) -> Iterator[Frame]:
    """Frames with rotations from the motion sensors and translation 0; without depth where the bundle has none."""
    rotation_at = _device_rotations(bundle)
    count = _count(bundle, "num_depth_frames") if "num_depth_frames" in bundle.names else 0
    times = np.array([float(_record(bundle, f"depth_{index}", "timestamp")["timestamp"]) for index in range(count)])
    for index in chosen:
        info = _record(bundle, f"rgb_{index}", "rgb", "intrinsics", "timestamp")
        image = _image(info["rgb"], f"{bundle.path}: rgb_{index}")
        stored = np.asarray(info["intrinsics"], np.float64)
        if stored.shape != (3, 3):
            raise ValueError(f"{bundle.path}: rgb_{index} must have intrinsics [3, 3], got {list(stored.shape)}")
        # stored transposed and for the landscape sensor, from the centre of the first pixel
        intrinsic = np.array([[stored[1, 1], 0, stored[2, 1] + 0.5], [0, stored[0, 0], stored[2, 0] + 0.5], [0, 0, 1]])
        time = float(info["timestamp"])
        depth = None
        if count:
            nearest = _record(bundle, f"depth_{int(np.abs(times - time).argmin())}", "depth")
            inverse = np.asarray(nearest["depth"], np.float32)
            with np.errstate(divide="ignore"):
                depth = depth_at(positive_depth(1 / inverse), image.shape[:2])
        extrinsic = np.concatenate([FLIP @ rotation_at(time).T, np.zeros((3, 1))], axis=1)
        exact = depth is not None and is_beyond_png(depth, DEPTH_SCALE)
        yield Frame(image, intrinsic, extrinsic, depth, exact=exact)


def _device_rotations(bundle: Bundle) -> Callable[[float], np.ndarray]:
    """World-from-device rotation at a time, from the quaternions of the motion sensors.

    Whether a quaternion turns the device's axes into the world's or back is told by the measured gravity, which must
    come out straight down.

    Raises:
        ValueError: no motion, or gravity fits neither reading.
    """
    motion = _record(bundle, "motion", "timestamp", "quaternion", "gravity")
    times = np.asarray(motion["timestamp"], np.float64).ravel()
    quaternions = np.array(motion["quaternion"], np.float64).reshape(len(times), 4)
    gravity = np.asarray(motion["gravity"], np.float64).reshape(len(times), 3)
    if not len(times):
        raise ValueError(f"{bundle.path} must have at least one sample of motion")
    rotations = rotation_from_quaternion(quaternions)
    down = gravity / np.linalg.norm(gravity, axis=1, keepdims=True)
    errors = []
    for reading in (rotations, rotations.transpose(0, 2, 1)):
        turned = np.einsum("nij,nj->ni", reading, down)
        errors.append(float(np.linalg.norm(turned - [0, 0, -1], axis=1).mean()))
    if not min(errors) <= _UPRIGHT_ERROR:
        raise ValueError(f"{bundle.path}: motion's quaternions must turn gravity to -z, are off by {min(errors):.2g}")
    inverse = errors[1] < errors[0]

    # q and -q are one rotation: take each on the side of the one before
    signs = np.cumprod(np.where(np.sum(quaternions[1:] * quaternions[:-1], axis=1) < 0, -1.0, 1.0))
    quaternions[1:] *= signs[:, None]

    def at(time: float) -> np.ndarray:
        # at 100 Hz neighbours are so close that a straight line between them is the great circle
        quaternion = np.array([np.interp(time, times, component) for component in quaternions.T])
        rotation = rotation_from_quaternion(quaternion)
        return rotation.T if inverse else rotation

    return at


def _read_hndr(bundle: Bundle, chosen: range, report: Report) -> Iterator[Frame]:
    """Frames with the phone's poses; depth of low confidence is invalid."""
    for index in chosen:
        image = _image(bundle[f"img_{index}"], f"{bundle.path}: img_{index}")
        info = _record(bundle, f"info_{index}", "intrinsics", "world_to_camera")
        landscape = np.asarray(info["intrinsics"], np.float64)
        world_to_camera = np.asarray(info["world_to_camera"], np.float64)
        if landscape.shape != (3, 3) or world_to_camera.shape != (4, 4):
            raise ValueError(f"{bundle.path}: info_{index} must have intrinsics [3, 3] and world_to_camera [4, 4]")
        depth = positive_depth(bundle[f"depth_{index}"])
        if f"conf_{index}" in bundle.names:
            depth = np.where(np.asarray(bundle[f"conf_{index}"]) >= _LEAST_CONFIDENCE, depth, np.float32(0))
        height, width = image.shape[:2]
        extrinsic = FLIP @ world_to_camera[:3]
        intrinsic = np.array(landscape)
        if height > width:
            extrinsic = _TURN @ extrinsic
            # the landscape image is as high as the portrait one is wide
            (fx, fy), (cx, cy) = np.diag(landscape)[:2], landscape[:2, 2]
            intrinsic = np.array([[fy, 0, width - cy], [0, fx, cx], [0, 0, 1]])
        extrinsic[:, :3] = nearest_rotation(extrinsic[:, :3])
        exact = is_beyond_png(depth, DEPTH_SCALE)
        yield Frame(image, intrinsic, extrinsic, depth_at(depth, (height, width)), exact=exact)


def _count(bundle: Bundle, name: str) -> int:
    value = bundle[name]
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"{bundle.path}: {name} must be a number of frames, got {value!r}")
    if value > len(bundle.names):
        raise ValueError(f"{bundle.path}: {name} is {value}, but there are {len(bundle.names)} members in all")
    return int(value)


def _record(bundle: Bundle, name: str, *keys: str) -> dict[str, Any]:
    record = bundle[name]
    missing = [key for key in keys if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{bundle.path}: {name} must be a record with {', '.join(keys)}; {', '.join(missing)} missing")
    return record


def _image(array: Any, where: str) -> np.ndarray:
    image = np.asarray(array)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"{where} must be an image uint8 [H, W, 3 or 4], got {image.dtype} {list(image.shape)}")
    return np.ascontiguousarray(image[..., :3])
