"""Read and write the images, depth maps and masks of scenes; truncated files are named, nothing is unpickled."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

EXR_INVALID = 1e9  # renderers write a huge depth where a ray hits nothing
# what PIL reads besides may run other programs (EPS) or has not been looked at for as long
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MOST_PIXELS = 1 << 27  # 134 million; the arrays behind them are a few times as many bytes


def open_image(path: Path, size: tuple[int, int] | None = None) -> Image:
    """Decode an image file.

    Args:
        path (Path): png, jpg, bmp, tiff or webp, of at most 134 million pixels; the checksums of a png are checked.
        size (tuple[int, int] | None): height and width it must have; none: any.

    Raises:
        ValueError: not a whole image, too large, or of another size.
    """
    from PIL import Image

    try:
        image = Image.open(path, formats=_FORMATS)
        # the header alone tells: a huge foreign image costs nothing
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
        if size is None or image.size == (size[1], size[0]):
            if image.format == "PNG":
                image.verify()
                image = Image.open(path, formats=_FORMATS)
            image.load()
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise what they happen to run into
        raise ValueError(f"{path} is not a whole image: {error}") from error
    if size is not None and image.size != (size[1], size[0]):
        raise ValueError(
            f"{path} must be {size[1]} x {size[0]} pixels as scene.json says, got {image.size[0]} x {image.size[1]}"
        )
    return image


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3]; see `open_image`."""
    return np.array(open_image(path, size).convert("RGB"))


def read_depth(path: Path, depth_scale: float, size: tuple[int, int] | None = None) -> np.ndarray:
    """float32 [H, W], 0 = invalid: `read_raw_depth`, where what is not finite or beyond 1e9 becomes 0.

    Raises:
        ValueError: not a whole file of one of these kinds, another size than ``size``, or a negative depth.
    """
    depth = read_raw_depth(path, depth_scale, size)
    depth[~np.isfinite(depth) | (depth > EXR_INVALID)] = 0
    if depth.min() < 0:
        raise ValueError(f"{path} must hold depths of at least 0, got {depth.min():g}")
    return depth


def read_raw_depth(path: Path, depth_scale: float, size: tuple[int, int] | None = None) -> np.ndarray:
    """float32 [H, W]: png values times ``depth_scale``; npy and exr values as they are.

    Raises:
        ValueError: not a whole file of one of these kinds, or another size than ``size``.
    """
    if path.suffix == ".png":
        image = open_image(path, size)
        if not image.mode.startswith("I"):
            raise ValueError(f"{path} must be a 16-bit greyscale png, got mode {image.mode}")
        return (np.array(image).astype(np.float64) * depth_scale).astype(np.float32)
    if path.suffix == ".npy":
        depth = _read_npy(path)
    elif path.suffix == ".exr":
        depth = _read_exr(path)
    else:
        raise ValueError(f"{path} must end in .png, .npy or .exr")
    if depth.ndim != 2 or not depth.size or (size is not None and depth.shape != size) or depth.dtype.kind not in "fiu":
        wanted = f"[{size[0]}, {size[1]}]" if size is not None else "[height, width]"
        raise ValueError(f"{path} must hold numbers {wanted}, got {depth.dtype} {list(depth.shape)}")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is invalid
        return depth.astype(np.float32)


def check_npy(file: IO[bytes], length: int) -> bool:
    """Check what the header of an open .npy file of ``length`` bytes declares, before anything is allocated for it.

    Leaves ``file`` at the data. True when that is a pickle, whose size the header does not tell.

    Raises:
        ValueError: no header, or fewer bytes behind it than it declares.
    """
    major, _ = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.hasobject:
        return True
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > length - file.tell():
        raise ValueError(f"an array {list(shape)} of {dtype} does not fit in {length} bytes")
    return False


def save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path, compress_level=6)


def _read_npy(path: Path) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            check_npy(file, path.stat().st_size)
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # the header is Python text, and its parser raises what it happens to run into
        raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error


def _read_exr(path: Path) -> np.ndarray:
    from subspace3d.mitsuba_variant import load_mitsuba

    _check_exr(path)
    mi = load_mitsuba()
    try:
        bitmap = np.array(mi.Bitmap(str(path)))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole EXR file: {error}") from error
    return bitmap[..., 0] if bitmap.ndim == 3 else bitmap


def _check_exr(path: Path) -> None:
    """Bound the size in the header: attribute ``dataWindow``, of type ``box2i``, 16 bytes: x and y, least and most."""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
    name = b"dataWindow\0box2i\0"
    start = head.find(name) + len(name) + 4
    if not head.startswith(b"v/1\x01") or name not in head or len(head) < start + 16:
        raise ValueError(f"{path} is not a whole EXR file: no dataWindow in its header")
    left, top, right, bottom = struct.unpack("<4i", head[start : start + 16])
    width, height = right - left + 1, bottom - top + 1
    if min(width, height) < 1 or width * height > MOST_PIXELS:
        raise ValueError(f"{path} must be an EXR of 1 to {MOST_PIXELS} pixels, its header says {width} x {height}")
