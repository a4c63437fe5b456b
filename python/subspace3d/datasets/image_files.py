"""Read and write the images, depth maps and masks of scenes; truncated files are named, nothing is unpickled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

EXR_INVALID = 1e9  # renderers write a huge depth where a ray hits nothing


def open_image(path: Path, size: tuple[int, int] | None = None) -> Image:
    """Decode an image file.

    Args:
        path (Path): any format that PIL reads.
        size (tuple[int, int] | None): height and width it must have; none: any.

    Raises:
        ValueError: not a whole image, or of another size.
    """
    from PIL import Image

    try:
        image = Image.open(path)
        if size is None or image.size == (size[1], size[0]):  # before decoding: a huge foreign image costs nothing
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
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
        try:
            depth = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a whole .npy file of numbers: {error}") from error
    elif path.suffix == ".exr":
        depth = _read_exr(path)
    else:
        raise ValueError(f"{path} must end in .png, .npy or .exr")
    if depth.ndim != 2 or (size is not None and depth.shape != size) or depth.dtype.kind not in "fiu":
        wanted = f"[{size[0]}, {size[1]}]" if size is not None else "[height, width]"
        raise ValueError(f"{path} must hold numbers {wanted}, got {depth.dtype} {list(depth.shape)}")
    return depth.astype(np.float32)


def save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path, compress_level=6)


def _read_exr(path: Path) -> np.ndarray:
    from subspace3d.scenes.variant import load_mitsuba

    mi = load_mitsuba()
    try:
        bitmap = np.array(mi.Bitmap(str(path)))
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole EXR file: {error}") from error
    return bitmap[..., 0] if bitmap.ndim == 3 else bitmap
