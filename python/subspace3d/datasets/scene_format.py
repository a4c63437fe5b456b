"""Read and write scene folders: scene.json, images/NNNN.png, depth/NNNN.png, mask/NNNN.png.

Cameras are OpenCV (x right, y down, z forward), extrinsics are camera-from-world ``[R | t]``, depth is z-depth in the
scene's unit with 0 for invalid, and the centre of the top-left pixel is (0.5, 0.5). docs/formats.md has every field.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from subspace3d.files import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from PIL.Image import Image

FORMAT = "subspace3d-scene"
VERSION = 1
DEPTH_SCALE = 2e-4  # scene units per step of the 16-bit png: reaches 13.1 units
_PNG_MAX = 65535
_EXR_INVALID = 1e9  # renderers write a huge depth where a ray hits nothing


@dataclass
class Scene:
    """Views of one scene in memory; S views of height H and width W."""

    name: str
    images: np.ndarray  # uint8 [S, H, W, 3], sRGB
    depths: np.ndarray  # float32 [S, H, W], z-depth in the scene's unit, 0 = invalid
    intrinsics: np.ndarray  # float64 [S, 3, 3], pixels
    extrinsics: np.ndarray  # float64 [S, 3, 4], camera-from-world, OpenCV
    provenance: dict[str, Any] = field(default_factory=dict)


def find_scenes(root: Path) -> list[Path]:
    """Every folder at or below ``root`` that holds a scene.json, sorted; hidden folders are not entered.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: no scene lies below ``root``.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder of scenes: {root}")
    scenes = []
    for folder, children, files in os.walk(root):
        if "scene.json" in files:
            scenes.append(Path(folder))
            children.clear()
        else:
            children[:] = [child for child in children if not child.startswith(".")]
    if not scenes:
        raise ValueError(f"{root} must hold at least one folder with a scene.json, found none")
    return sorted(scenes)


def write_scene(
    folder: Path,
    images: np.ndarray,
    depths: np.ndarray,
    intrinsics: np.ndarray,
    extrinsics: np.ndarray,
    provenance: Mapping[str, Any],
    masks: np.ndarray | None = None,
    depth_scale: float = DEPTH_SCALE,
) -> None:
    """Write one scene folder; it appears under its name only when it is whole, and replaces what stood there.

    Args:
        folder (Path): the scene's folder.
        images (uint8 [S, H, W, 3]): sRGB.
        depths (float32 [S, H, W]): z-depth in the scene's unit, 0 = invalid.
        intrinsics (float [S, 3, 3]): pixels.
        extrinsics (float [S, 3, 4]): camera-from-world, OpenCV axes.
        provenance (dict): JSON-able record of how the scene came to be.
        masks (bool [S, H, W] | None): pixels whose depth counts; none: all.
        depth_scale (float): scene units per step of the 16-bit depth image.

    Raises:
        ValueError: shapes or types that do not fit, a depth that is negative, not finite or beyond
            65535 * ``depth_scale``, or a camera that is not one.
    """
    folder = Path(folder)
    images, depths = np.asarray(images), np.asarray(depths)
    intrinsics, extrinsics = np.asarray(intrinsics, np.float64), np.asarray(extrinsics, np.float64)
    _check_arrays(images, depths, intrinsics, extrinsics, masks, depth_scale, folder)
    with atomic_folder(folder) as temporary:
        frames = []
        for index in range(len(images)):
            frame: dict[str, Any] = {
                "image": f"images/{index:04d}.png",
                "depth": f"depth/{index:04d}.png",
                "mask": None,
                "intrinsics": intrinsics[index].tolist(),
                "extrinsics_w2c": extrinsics[index].tolist(),
            }
            _save_png(temporary / frame["image"], images[index])
            steps = np.rint(depths[index].astype(np.float64) / depth_scale).astype(np.uint16)
            _save_png(temporary / frame["depth"], steps)
            if masks is not None:
                frame["mask"] = f"mask/{index:04d}.png"
                _save_png(temporary / frame["mask"], np.where(masks[index], np.uint8(255), np.uint8(0)))
            frames.append(frame)
        record = {
            "format": FORMAT,
            "version": VERSION,
            "unit": "scene",
            "depth_scale": depth_scale,
            "width": int(images.shape[2]),
            "height": int(images.shape[1]),
            "frames": frames,
            "provenance": dict(provenance),
        }
        write_json(temporary / "scene.json", record)


def load_scene(path: Path, image_size: int | None = None, frames: Sequence[int] | None = None) -> Scene:
    """Read a scene folder, or only some of its frames, at its own size or as squares of ``image_size`` pixels.

    For a square the centre of a wider or taller image is cut out first, then images are resized by area (Lanczos when
    enlarged), depth by the nearest pixel centre, and the intrinsics follow. Depth outside a frame's mask becomes 0.

    Args:
        path (Path): the scene's folder, or the scene.json in it.
        image_size (int | None): side of the square images wanted, in pixels; none: as stored.
        frames (sequence of int | None): frame indices, in the order wanted; none: all.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that breaks the format; names the file and the rule.
    """
    folder = Path(path).parent if Path(path).name == "scene.json" else Path(path)
    file = folder / "scene.json"
    record = _read_record(file)
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    chosen = range(len(record["frames"])) if frames is None else frames
    images, depths, intrinsics, extrinsics = [], [], [], []
    for index in chosen:
        if not 0 <= index < len(record["frames"]):
            raise ValueError(f"frames must lie in 0..{len(record['frames']) - 1} for {file}, got {index}")
        frame = record["frames"][index]
        where = f"{file}: frames[{index}]"
        intrinsic, extrinsic = _read_camera(frame, where)
        image, depth = _read_frame(folder, frame, record, where)
        if image_size is not None:
            image, depth, intrinsic = _square(image, depth, intrinsic, image_size)
        images.append(image)
        depths.append(depth)
        intrinsics.append(intrinsic)
        extrinsics.append(extrinsic)
    if not images:
        raise ValueError(f"frames must name at least one frame of {file}, got none")
    return Scene(
        folder.name,
        np.stack(images),
        np.stack(depths),
        np.stack(intrinsics),
        np.stack(extrinsics),
        record.get("provenance") or {},
    )


def _check_arrays(
    images: np.ndarray,
    depths: np.ndarray,
    intrinsics: np.ndarray,
    extrinsics: np.ndarray,
    masks: np.ndarray | None,
    depth_scale: float,
    folder: Path,
) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise ValueError(f"images must be uint8 [S >= 1, H, W, 3], got {images.dtype} {list(images.shape)}")
    count, height, width, _ = images.shape
    wanted = {"depths": (count, height, width), "intrinsics": (count, 3, 3), "extrinsics": (count, 3, 4)}
    for name, array in (("depths", depths), ("intrinsics", intrinsics), ("extrinsics", extrinsics)):
        if array.shape != wanted[name]:
            raise ValueError(f"{name} must be {list(wanted[name])} beside the images, got {list(array.shape)}")
    if masks is not None and np.shape(masks) != wanted["depths"]:
        raise ValueError(f"masks must be {list(wanted['depths'])} beside the images, got {list(np.shape(masks))}")
    if not (np.isfinite(depth_scale) and depth_scale > 0):
        raise ValueError(f"depth_scale must be positive, got {depth_scale}")
    if not np.isfinite(depths).all() or depths.min() < 0:
        raise ValueError(f"depths of {folder} must be finite and at least 0 (0 = invalid)")
    if depths.max() > _PNG_MAX * depth_scale:
        raise ValueError(
            f"depths of {folder} must be at most {_PNG_MAX * depth_scale:g} (65535 * depth_scale), got {depths.max():g}"
        )
    for index in range(count):
        _check_camera(intrinsics[index], extrinsics[index], f"camera {index} of {folder}")


def _check_camera(intrinsic: np.ndarray, extrinsic: np.ndarray, where: str) -> None:
    if intrinsic.shape != (3, 3) or extrinsic.shape != (3, 4):
        raise ValueError(
            f"{where}: intrinsics must be 3x3 and extrinsics_w2c 3x4, "
            f"got {list(intrinsic.shape)} and {list(extrinsic.shape)}"
        )
    if not (np.isfinite(intrinsic).all() and np.isfinite(extrinsic).all()):
        raise ValueError(f"{where}: intrinsics and extrinsics_w2c must be finite")
    fx, fy = intrinsic[0, 0], intrinsic[1, 1]
    zeros = intrinsic[[0, 1, 2, 2], [1, 0, 0, 1]]
    if not (fx > 0 and fy > 0 and np.all(zeros == 0) and intrinsic[2, 2] == 1):
        raise ValueError(
            f"{where}: intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0, "
            f"got {intrinsic.tolist()}"
        )
    rotation = extrinsic[:, :3]
    error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if error > 1e-4 or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"{where}: extrinsics_w2c must be [R | t] with R a rotation, "
            f"got |R R^T - I| = {error:.2g} and det R = {np.linalg.det(rotation):.3g}"
        )


def _read_record(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no such scene: {file}")
    record = read_json(file)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f'{file} must say "format": "{FORMAT}", "version": {VERSION}')
    for key in ("width", "height"):
        if type(record.get(key)) is not int or record[key] < 1:
            raise ValueError(f"{file}: {key} must be a positive integer, got {record.get(key)!r}")
    scale = record.get("depth_scale")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"{file}: depth_scale must be a positive number, got {scale!r}")
    frames = record.get("frames")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, dict) for frame in frames):
        raise ValueError(f"{file}: frames must be a list of at least one object")
    return record


def _read_camera(frame: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        intrinsic = np.array(frame.get("intrinsics"), dtype=np.float64)
        extrinsic = np.array(frame.get("extrinsics_w2c"), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: intrinsics and extrinsics_w2c must be matrices of numbers: {error}") from error
    _check_camera(intrinsic, extrinsic, where)
    return intrinsic, extrinsic


def _read_frame(
    folder: Path, frame: Mapping[str, Any], record: Mapping[str, Any], where: str
) -> tuple[np.ndarray, np.ndarray]:
    size = (record["height"], record["width"])
    image = np.array(_open_image(_inside(folder, frame.get("image"), f"{where}.image"), size).convert("RGB"))
    depth = _read_depth(_inside(folder, frame.get("depth"), f"{where}.depth"), size, record["depth_scale"])
    if frame.get("mask") is not None:
        mask = _open_image(_inside(folder, frame["mask"], f"{where}.mask"), size).convert("L")
        depth = np.where(np.array(mask) > 0, depth, np.float32(0))
    return image, depth


def _inside(folder: Path, name: object, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} must be a path relative to the scene's folder, got {name!r}")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{where} must stay inside the scene's folder, got {name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file: {path}")
    return path


def _open_image(path: Path, size: tuple[int, int]) -> Image:
    from PIL import Image

    try:
        image = Image.open(path)
        if image.size == (size[1], size[0]):  # before decoding, so that a huge foreign image costs nothing
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a whole image: {error}") from error
    if image.size != (size[1], size[0]):
        raise ValueError(
            f"{path} must be {size[1]} x {size[0]} pixels as scene.json says, got {image.size[0]} x {image.size[1]}"
        )
    return image


def _read_depth(path: Path, size: tuple[int, int], depth_scale: float) -> np.ndarray:
    if path.suffix == ".png":
        image = _open_image(path, size)
        if not image.mode.startswith("I"):
            raise ValueError(f"{path} must be a 16-bit greyscale png, got mode {image.mode}")
        return (np.array(image).astype(np.float64) * depth_scale).astype(np.float32)
    if path.suffix == ".npy":
        try:
            depth = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error
    elif path.suffix == ".exr":
        depth = _read_exr(path)
    else:
        raise ValueError(f"{path} must end in .png, .npy or .exr")
    if depth.shape != size or depth.dtype.kind not in "fiu":
        raise ValueError(f"{path} must hold numbers [{size[0]}, {size[1]}], got {depth.dtype} {list(depth.shape)}")
    depth = depth.astype(np.float32)
    depth[~np.isfinite(depth) | (depth > _EXR_INVALID)] = 0
    if depth.min() < 0:
        raise ValueError(f"{path} must hold depths of at least 0, got {depth.min():g}")
    return depth


def _read_exr(path: Path) -> np.ndarray:
    from subspace3d.scenes.variant import load_mitsuba

    mi = load_mitsuba()
    try:
        bitmap = np.array(mi.Bitmap(str(path)))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole EXR file: {error}") from error
    return bitmap[..., 0] if bitmap.ndim == 3 else bitmap


def _square(
    image: np.ndarray, depth: np.ndarray, intrinsic: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from PIL import Image

    height, width = depth.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    depth = depth[top : top + side, left : left + side]
    intrinsic = intrinsic - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]])
    if side == size:
        return image, depth, intrinsic
    filter_ = Image.Resampling.BOX if size < side else Image.Resampling.LANCZOS
    image = np.array(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), filter_))
    nearest = np.floor((np.arange(size) + 0.5) * side / size).astype(np.int64)
    intrinsic = intrinsic * np.array([[size / side], [size / side], [1.0]])
    return image, depth[np.ix_(nearest, nearest)], intrinsic


def _save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path, compress_level=6)
