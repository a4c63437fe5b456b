"""Read and write scene folders: scene.json, images/NNNN.png, depth/NNNN.png, mask/NNNN.png.

Cameras are OpenCV (x right, y down, z forward), extrinsics are camera-from-world ``[R | t]``, depth is z-depth in the
scene's unit with 0 for invalid, and the centre of the top-left pixel is (0.5, 0.5). docs/formats.md has every field.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from subspace3d import outputs
from subspace3d.cropping import Box, centred_box, crop_resize
from subspace3d.files import atomic_folder, inside, read_json, walk, write_json
from subspace3d.formats.images import MOST_PIXELS, open_image, read_depth, read_rgb, save_png
from subspace3d.schema import Positive, PositiveInt, Rule, check

FORMAT = "subspace3d-scene"
VERSION = 1
DEPTH_SCALE = 2e-4  # scene units per step of the 16-bit png: reaches 13.1 units
PNG_MAX = 65535
View = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # image, depth, intrinsic, extrinsic
_UNITS = {
    **dict.fromkeys(("metre", "metres", "meter", "meters"), "m"),
    **dict.fromkeys(("millimetre", "millimetres", "millimeter", "millimeters"), "mm"),
}


@dataclass
class Scene:
    """Views of one scene in memory; S views of height H and width W."""

    name: str
    images: np.ndarray  # uint8 [S, H, W, 3], sRGB
    depths: np.ndarray  # float32 [S, H, W], z-depth in the scene's unit, 0 = invalid
    intrinsics: np.ndarray  # float64 [S, 3, 3], pixels
    extrinsics: np.ndarray  # float64 [S, 3, 4], camera-from-world, OpenCV
    provenance: dict[str, Any] = field(default_factory=dict)
    has_depth: bool = True  # false: no frame of the scene has a depth map, and depths is zero
    translation_known: bool = True  # false: of the extrinsics only R is known, and t is zero
    unit: str = "scene"  # name of the unit of depths and translations; "m" and "mm" have a meaning

    @classmethod
    def of(cls, file: SceneFile, views: Iterable[View]) -> Scene:
        """The scene of some views of a file, all of one size."""
        images, depths, intrinsics, extrinsics = map(np.stack, zip(*views))
        known = file.translation_known
        return cls(file.name, images, depths, intrinsics, extrinsics, file.provenance, file.has_depth, known, file.unit)


@dataclass
class Frame:
    """One view to be written; height H and width W are those of the scene's first frame."""

    image: np.ndarray  # uint8 [H, W, 3], sRGB
    intrinsic: np.ndarray | None = None  # float [3, 3], pixels; None: unknown
    extrinsic: np.ndarray | None = None  # float [3, 4], camera-from-world, OpenCV; None: unknown
    depth: np.ndarray | None = None  # float32 [H, W], z-depth in the scene's unit, 0 = invalid; None: unknown
    mask: np.ndarray | None = None  # bool [H, W], where depth counts; None: everywhere
    file: Path | None = None  # image file that holds exactly ``image``: copied instead of encoding it again
    exact: bool = False  # store depth as float32 in a npy file, of any size, instead of in steps of a png


class SceneFile:
    """A scene.json, read and checked; its images, depth maps and masks are read frame by frame.

    Args:
        path (Path): the scene's folder, or the scene.json in it.

    Raises:
        FileNotFoundError: there is no such scene.
        ValueError: scene.json breaks the format; names the file and the rule.
    """

    def __init__(self, path: Path) -> None:
        self.folder = Path(path).parent if Path(path).name == "scene.json" else Path(path)
        self.file = self.folder / "scene.json"
        record = _read_record(self.file)
        self.name = self.folder.name
        unit = record.get("unit", "scene")
        self.unit: str = _UNITS.get(unit, unit)
        self.size: tuple[int, int] = (record["height"], record["width"])
        self.depth_scale = float(record["depth_scale"])
        self.translation_known: bool = record.get("translation_known", True)
        self.provenance: dict[str, Any] = record.get("provenance") or {}
        self._frames: list[dict[str, Any]] = record["frames"]
        counts = self.counts()
        self.has_depth = counts["depths"] > 0
        self.has_cameras = counts["cameras"] == len(self)

    def __len__(self) -> int:
        return len(self._frames)

    def counts(self) -> Counter[str]:
        """Frames, and those with a depth map and with both parts of a camera."""
        return Counter(
            images=len(self._frames),
            depths=sum(frame.get("depth") is not None for frame in self._frames),
            cameras=sum(
                frame.get("intrinsics") is not None and frame.get("extrinsics_w2c") is not None
                for frame in self._frames
            ),
        )

    def camera(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Intrinsics float64 [3, 3] and extrinsics float64 [3, 4] of a frame.

        Raises:
            ValueError: they break the format, or are unknown.
        """
        intrinsic, extrinsic = self.intrinsic(index), self.extrinsic(index)
        if intrinsic is None or extrinsic is None:
            lacking = " and ".join(
                name for name, part in (("intrinsics", intrinsic), ("extrinsics_w2c", extrinsic)) if part is None
            )
            raise ValueError(
                f"{self.file}: frames[{index}] must have a camera here, it has no {lacking}; scenes without cameras "
                "serve only where no camera and no depth is compared with"
            )
        return intrinsic, extrinsic

    def intrinsic(self, index: int) -> np.ndarray | None:
        """float64 [3, 3], pixels; None: unknown."""
        return self._matrix(index, "intrinsics", _check_intrinsic)

    def extrinsic(self, index: int) -> np.ndarray | None:
        """float64 [3, 4], camera-from-world, OpenCV; None: unknown."""
        return self._matrix(index, "extrinsics_w2c", _check_extrinsic)

    def _matrix(self, index: int, name: str, check_matrix: Callable[[np.ndarray, str], None]) -> np.ndarray | None:
        frame, where = self._frame(index)
        if frame.get(name) is None:
            return None
        try:
            matrix = np.array(frame[name], dtype=np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{where}: {name} must be a matrix of numbers: {error}") from error
        check_matrix(matrix, where)
        return matrix

    def image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3], sRGB."""
        frame, where = self._frame(index)
        return read_rgb(inside(self.folder, frame.get("image"), f"{where}.image"), self.size)

    def depth(self, index: int) -> np.ndarray | None:
        """float32 [H, W] in the scene's unit, before the mask; None: this frame has no depth map."""
        path = self.depth_path(index)
        return None if path is None else read_depth(path, self.depth_scale, self.size)

    def depth_path(self, index: int) -> Path | None:
        return self._path(index, "depth")

    def mask(self, index: int) -> np.ndarray | None:
        """bool [H, W], where depth counts; None: everywhere."""
        path = self._path(index, "mask")
        return None if path is None else np.array(open_image(path, self.size).convert("L")) > 0

    def paths(self, index: int) -> list[Path]:
        """The image, the depth map and the mask of a frame, those that it names."""
        found = (self._path(index, name) for name in ("image", "depth", "mask"))
        return [path for path in found if path is not None]

    def valid_depth(self, index: int) -> np.ndarray:
        """float32 [H, W]: the depth inside the mask, 0 elsewhere and in a frame without depth."""
        depth, mask = self.depth(index), self.mask(index)
        if depth is None:
            return np.zeros(self.size, np.float32)
        return depth if mask is None else np.where(mask, depth, np.float32(0))

    def square(self, index: int, intrinsic: np.ndarray) -> Box:
        """The box of `centred_box` for a frame with these intrinsics; its error names the frame."""
        try:
            return centred_box(intrinsic, self.size)
        except ValueError as error:
            raise ValueError(f"{self.file}: frames[{index}]: {error}") from error

    def _path(self, index: int, name: str) -> Path | None:
        frame, where = self._frame(index)
        return None if frame.get(name) is None else inside(self.folder, frame[name], f"{where}.{name}")

    def _frame(self, index: int) -> tuple[dict[str, Any], str]:
        if not 0 <= index < len(self._frames):
            raise ValueError(f"frames must lie in 0..{len(self._frames) - 1} for {self.file}, got {index}")
        return self._frames[index], f"{self.file}: frames[{index}]"


def find_scenes(root: Path) -> list[Path]:
    """Every folder at or below ``root`` that holds a scene.json, sorted; hidden folders are not entered.

    Links to folders are followed, and a scene that several lead to is found once.

    Raises:
        FileNotFoundError: ``root`` does not exist.
        ValueError: no scene lies below ``root``.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder of scenes: {root}")
    scenes = []
    for folder, children, names in walk(root):
        if "scene.json" in names:
            scenes.append(folder)
            children.clear()
    if not scenes:
        raise ValueError(f"{root} must hold at least one folder with a scene.json, found none; convert makes scenes")
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
    """Write one scene folder from arrays; see `write_frames`.

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
    images, depths = np.asarray(images), np.asarray(depths)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise ValueError(f"images must be uint8 [S >= 1, H, W, 3], got {images.dtype} {list(images.shape)}")
    count, height, width, _ = images.shape
    wanted = {"depths": (count, height, width), "intrinsics": (count, 3, 3), "extrinsics": (count, 3, 4)}
    for name, array in (("depths", depths), ("intrinsics", intrinsics), ("extrinsics", extrinsics)):
        if np.shape(array) != wanted[name]:
            raise ValueError(f"{name} must be {list(wanted[name])} beside the images, got {list(np.shape(array))}")
    if masks is not None and np.shape(masks) != wanted["depths"]:
        raise ValueError(f"masks must be {list(wanted['depths'])} beside the images, got {list(np.shape(masks))}")
    frames = (
        Frame(images[i], intrinsics[i], extrinsics[i], depths[i], None if masks is None else masks[i])
        for i in range(count)
    )
    write_frames(folder, frames, provenance, depth_scale=depth_scale)


def write_frames(
    folder: Path,
    frames: Iterable[Frame],
    provenance: Mapping[str, Any],
    unit: str = "scene",
    depth_scale: float = DEPTH_SCALE,
    translation_known: bool = True,
) -> int:
    """Write one scene folder frame by frame and return the number of frames.

    The folder appears under its name only when it is whole, and replaces a scene that stood there.

    Args:
        folder (Path): the scene's folder.
        frames (Iterable[Frame]): at least one; consumed one at a time.
        provenance (dict): JSON-able record of how the scene came to be.
        unit (str): name of the unit of depth and translation.
        depth_scale (float): units per step of the 16-bit depth image.
        translation_known (bool): false when only the rotations of the cameras are known.

    Raises:
        ValueError: no frame, shapes or types that do not fit, a depth that is negative, not finite or beyond
            65535 * ``depth_scale``, a camera that is not one, or a folder that holds anything else than a scene.
    """
    folder = Path(folder)
    if not (np.isfinite(depth_scale) and depth_scale > 0):
        raise ValueError(f"depth_scale must be positive, got {depth_scale}")
    folder = outputs.claim(folder, outputs.SCENE, "folder")
    records: list[dict[str, Any]] = []
    size: tuple[int, ...] = ()
    with atomic_folder(folder) as temporary:
        for index, frame in enumerate(frames):
            size = size or frame.image.shape[:2]
            _check_frame(frame, size, depth_scale, f"frame {index} of {folder}")
            records.append(_write_frame(temporary, index, frame, depth_scale))
        if not records:
            raise ValueError(f"frames of {folder} must be at least one, got none")
        record = {
            "format": FORMAT,
            "version": VERSION,
            "unit": unit,
            "depth_scale": depth_scale,
            "width": int(size[1]),
            "height": int(size[0]),
            **({} if translation_known else {"translation_known": False}),
            "frames": records,
            "provenance": dict(provenance),
        }
        write_json(temporary / "scene.json", record)
    return len(records)


def _write_frame(folder: Path, index: int, frame: Frame, depth_scale: float) -> dict[str, Any]:
    suffix = ".png" if frame.file is None else frame.file.suffix.lower()
    record: dict[str, Any] = {
        "image": f"images/{index:04d}{suffix}",
        "depth": None,
        "mask": None,
        "intrinsics": None if frame.intrinsic is None else np.asarray(frame.intrinsic, np.float64).tolist(),
        "extrinsics_w2c": None if frame.extrinsic is None else np.asarray(frame.extrinsic, np.float64).tolist(),
    }
    if frame.file is None:
        save_png(folder / record["image"], frame.image)
    else:
        (folder / "images").mkdir(exist_ok=True)
        shutil.copyfile(frame.file, folder / record["image"])
    if frame.depth is not None and frame.exact:
        record["depth"] = f"depth/{index:04d}.npy"
        (folder / "depth").mkdir(exist_ok=True)
        np.save(folder / record["depth"], np.asarray(frame.depth, np.float32))
    elif frame.depth is not None:
        record["depth"] = f"depth/{index:04d}.png"
        steps = np.rint(frame.depth.astype(np.float64) / depth_scale).astype(np.uint16)
        save_png(folder / record["depth"], steps)
    if frame.mask is not None:
        record["mask"] = f"mask/{index:04d}.png"
        save_png(folder / record["mask"], np.where(frame.mask, np.uint8(255), np.uint8(0)))
    return record


def load_scene(path: Path, image_size: int | None = None, frames: Sequence[int] | None = None) -> Scene:
    """Read a scene folder, or only some of its frames, at its own size or as squares of ``image_size`` pixels.

    For a square the largest one around the principal point is cut out and resized, see `crop_resize`. Depth outside
    a frame's mask, and of a frame without depth, is 0.

    Args:
        path (Path): the scene's folder, or the scene.json in it.
        image_size (int | None): side of the square images wanted, in pixels; none: as stored.
        frames (sequence of int | None): frame indices, in the order wanted; none: all.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that breaks the format; names the file and the rule.
    """
    scene = SceneFile(path)
    views: list[View] = []
    for index in _chosen(scene, image_size, frames):
        intrinsic, extrinsic = scene.camera(index)
        image, depth = scene.image(index), scene.valid_depth(index)
        if image_size is not None:
            box = scene.square(index, intrinsic)
            image, depth, intrinsic = crop_resize(image, depth, intrinsic, box, (image_size, image_size))
        views.append((image, depth, intrinsic, extrinsic))
    return Scene.of(scene, views)


def load_images(path: Path, image_size: int | None = None, frames: Sequence[int] | None = None) -> np.ndarray:
    """The images of a scene, whose cameras and depth need not be known, uint8 [S, H, W, 3].

    For a square the largest one around the principal point is cut out and resized; around the middle of the image where
    the intrinsics are unknown. Arguments and errors are those of `load_scene`.
    """
    scene = SceneFile(path)
    images = []
    for index in _chosen(scene, image_size, frames):
        image, intrinsic = scene.image(index), scene.intrinsic(index)
        if image_size is not None:
            height, width = scene.size
            middle = np.array([[1.0, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
            intrinsic = middle if intrinsic is None else intrinsic
            box = scene.square(index, intrinsic)
            image, _, _ = crop_resize(image, np.zeros(scene.size, np.float32), intrinsic, box, (image_size, image_size))
        images.append(image)
    return np.stack(images)


def _chosen(scene: SceneFile, image_size: int | None, frames: Sequence[int] | None) -> Sequence[int]:
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    chosen = range(len(scene)) if frames is None else frames
    if not len(chosen):
        raise ValueError(f"frames must name at least one frame of {scene.file}, got none")
    return chosen


def _check_frame(frame: Frame, size: tuple[int, ...], depth_scale: float, where: str) -> None:
    image = frame.image
    if image.dtype != np.uint8 or image.shape != (*size, 3):
        raise ValueError(f"{where}: image must be uint8 {[*size, 3]}, got {image.dtype} {list(image.shape)}")
    for name, array in (("depth", frame.depth), ("mask", frame.mask)):
        if array is not None and array.shape != size:
            raise ValueError(f"{where}: {name} must be {list(size)} as the image, got {list(array.shape)}")
    if frame.depth is not None:
        if not np.isfinite(frame.depth).all() or frame.depth.min() < 0:
            raise ValueError(f"{where}: depth must be finite and at least 0 (0 = invalid)")
        if not frame.exact and frame.depth.max() > PNG_MAX * depth_scale:
            raise ValueError(
                f"{where}: depth must be at most {PNG_MAX * depth_scale:g} (65535 * depth_scale), "
                f"got {frame.depth.max():g}"
            )
    if frame.intrinsic is not None:
        _check_intrinsic(np.asarray(frame.intrinsic, np.float64), where)
    if frame.extrinsic is not None:
        _check_extrinsic(np.asarray(frame.extrinsic, np.float64), where)


def _check_intrinsic(intrinsic: np.ndarray, where: str) -> None:
    if intrinsic.shape != (3, 3) or not np.isfinite(intrinsic).all():
        raise ValueError(f"{where}: intrinsics must be 3x3 and finite, got {_shown(intrinsic)}")
    fx, fy = intrinsic[0, 0], intrinsic[1, 1]
    zeros = intrinsic[[0, 1, 2, 2], [1, 0, 0, 1]]
    if not (fx > 0 and fy > 0 and np.all(zeros == 0) and intrinsic[2, 2] == 1):
        raise ValueError(
            f"{where}: intrinsics must be [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0, "
            f"got {intrinsic.tolist()}"
        )


def _check_extrinsic(extrinsic: np.ndarray, where: str) -> None:
    if extrinsic.shape != (3, 4) or not np.isfinite(extrinsic).all():
        raise ValueError(f"{where}: extrinsics_w2c must be 3x4 and finite, got {_shown(extrinsic)}")
    rotation = extrinsic[:, :3]
    with np.errstate(over="ignore", invalid="ignore"):  # of huge entries the error is infinite or NaN
        error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if not error <= 1e-4 or np.linalg.det(rotation) < 0:
        raise ValueError(
            f"{where}: extrinsics_w2c must be [R | t] with R a rotation, "
            f"got |R R^T - I| = {error:.2g} and det R = {np.linalg.det(rotation):.3g}"
        )


def _shown(matrix: np.ndarray) -> str:
    return str(matrix.tolist() if matrix.size <= 12 else list(matrix.shape))


class _FrameRecord(TypedDict):
    image: NotRequired[Any]  # paths and cameras are checked when the frame is read: one bad frame costs that frame
    depth: NotRequired[Any]
    mask: NotRequired[Any]
    intrinsics: NotRequired[Any]
    extrinsics_w2c: NotRequired[Any]


class SceneRecord(TypedDict):
    """scene.json; docs/formats.md has every field."""

    format: str
    version: int
    width: PositiveInt
    height: PositiveInt
    depth_scale: Positive
    unit: NotRequired[str]
    translation_known: NotRequired[bool]
    frames: Annotated[list[_FrameRecord], Rule("a list of at least one object", lambda value: len(value) > 0)]
    provenance: NotRequired[dict[str, Any] | None]


def _read_record(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"no such scene: {file}")
    record = read_json(file)
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("version") != VERSION:
        raise ValueError(f'{file} must say "format": "{FORMAT}", "version": {VERSION}')
    checked = check(record, SceneRecord, file)
    if checked["width"] * checked["height"] > MOST_PIXELS:
        raise ValueError(f"{file}: width times height must be at most {MOST_PIXELS} pixels")
    return dict(checked)
