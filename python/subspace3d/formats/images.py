"""Read and write the images, depth maps and masks of scenes; truncated files are named, nothing is unpickled."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from subspace3d.formats.exr import read_exr_depth
from subspace3d.reading import open_regular, open_zip

if TYPE_CHECKING:
    from PIL.Image import Image

DEPTH_SUFFIXES = (".png", ".tif", ".tiff", ".npy", ".npz", ".exr")
EXR_INVALID = 1e9  # renderers write a huge depth where a ray hits nothing
# what PIL reads besides may run other programs (EPS) or has not been looked at for as long
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
MOST_PIXELS = 1 << 27  # 134 million; the arrays behind them are a few times as many bytes
_MOST_SCANS = 64  # of a JPEG; every one costs the time of all its pixels, however few bytes it has
_MOST_AXES = 8  # of an array in an npy or npz file
_LARGEST_FILE = 1 << 30  # bytes of an image file
_ORIENTATION, _TILE_SIDES = 0x0112, (322, 323)  # tags of EXIF and TIFF


def open_image(path: Path, size: tuple[int, int] | None = None) -> Image:
    """Decode an image file.

    Args:
        path (Path): png, jpg, bmp, tiff or webp, of at most 134 million pixels; the checksums of a png are checked.
        size (tuple[int, int] | None): height and width it must have; none: any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole image, no regular file, too large, of another size, or stored turned or mirrored (an
            EXIF orientation other than 1): cameras belong to the pixels as they are stored, what shows the image
            turns them, and nothing tells which of the two was meant.
    """
    image, orientation = _decode(path, size)
    if orientation != 1:
        raise ValueError(
            f"{path} must be stored upright, its EXIF orientation is {str(orientation)[:20]}: write it anew as it is "
            "shown (PIL.ImageOps.exif_transpose), or drop the tag if the camera belongs to the pixels as stored"
        )
    if size is not None and image.size != (size[1], size[0]):
        raise ValueError(
            f"{path} must be {size[1]} x {size[0]} pixels as scene.json says, got {image.size[0]} x {image.size[1]}"
        )
    return image


def read_oriented(path: Path) -> tuple[np.ndarray, int]:
    """uint8 [H, W, 3] as the pixels are stored, and the EXIF orientation 1 to 8, see `turn_upright`.

    Raises:
        ValueError: see `open_image`; a turned tiff, whose pixels the decoder turns; an orientation that is none.
    """
    image, orientation = _decode(path, None)
    turned = orientation != 1
    if not isinstance(orientation, int) or not 1 <= orientation <= 8 or (turned and image.format == "TIFF"):
        raise ValueError(f"{path} must have an EXIF orientation from 1 to 8, and a tiff 1, got {str(orientation)[:20]}")
    return np.array(eight_bits(image, path).convert("RGB")), orientation


def image_header(path: Path) -> tuple[tuple[int, int], int]:
    """Height and width as the pixels are stored, and the EXIF orientation, from the first bytes alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no image that can be read.
    """
    from PIL import Image

    with open_regular(path, _LARGEST_FILE) as file:
        try:
            _check_webp(file.read(30))
            with Image.open(file, formats=_FORMATS) as image:
                _check_size(image)
                orientation = image.getexif().get(_ORIENTATION, 1)
                return (image.height, image.width), orientation if isinstance(orientation, int) else 0
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise what they happen to run into
            raise ValueError(f"{path} is not a whole image: {_fault(error, file)}") from error


def turn_upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """An array [H, W, ...] of pixels as stored, as EXIF orientation 1 to 8 says it is shown."""
    turned = {
        1: lambda: array,
        2: lambda: array[:, ::-1],
        3: lambda: array[::-1, ::-1],
        4: lambda: array[::-1],
        5: lambda: array.swapaxes(0, 1),
        6: lambda: np.rot90(array, -1),
        7: lambda: array[::-1, ::-1].swapaxes(0, 1),
        8: lambda: np.rot90(array),
    }
    return np.ascontiguousarray(turned[orientation]())


def _decode(path: Path, size: tuple[int, int] | None) -> tuple[Image, Any]:
    """The image and its EXIF orientation; of one that has not ``size``, which the caller refuses, no pixels."""
    from PIL import Image

    with open_regular(path, _LARGEST_FILE) as file:
        try:
            _check_webp(file.read(30))
            image = Image.open(file, formats=_FORMATS)
            # the header alone tells: a huge foreign image costs nothing
            _check_size(image)
            orientation = 1
            if size is None or image.size == (size[1], size[0]):
                if image.format == "PNG":
                    image.verify()
                    file.seek(0)
                    image = Image.open(file, formats=_FORMATS)
                # before the pixels, because PIL turns those of a tiff
                orientation = image.getexif().get(_ORIENTATION, 1)
                _check_scans(file)
                image.load()
        except MemoryError:
            raise
        except Exception as error:  # PIL's decoders raise what they happen to run into
            raise ValueError(f"{path} is not a whole image: {_fault(error, file)}") from error
    return image, orientation


def _fault(error: Exception, file: IO[bytes]) -> str:
    """What is wrong with an image file, in words of its own where the decoder speaks of an object in memory."""
    from PIL import UnidentifiedImageError

    if not isinstance(error, UnidentifiedImageError):
        return str(error)
    return "it is empty" if file.seek(0, 2) == 0 else f"it is none of {', '.join(_FORMATS)}"


def eight_bits(image: Image, path: Path) -> Image:
    """The image with 8 bits a channel: ``round(v / 257)`` for one of 16 bits, which PIL would clip at 255.

    Raises:
        ValueError: grey values of floating point or beyond 16 bits; names ``path``.
    """
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.array(image)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"{path} must have 8 or 16 bits a channel, got mode {image.mode}")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H, W, 3]; see `open_image` and `eight_bits`."""
    return np.array(eight_bits(open_image(path, size), path).convert("RGB"))


def _check_size(image: Any) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
    tags = getattr(image, "tag_v2", {})
    if math.prod(int(tags.get(side, 1)) for side in _TILE_SIDES) > MOST_PIXELS:
        raise ValueError(f"a tile has more than {MOST_PIXELS} pixels")


def _check_scans(file: IO[bytes]) -> None:
    """Bound the passes over its pixels that a JPEG asks for; encoders write about ten."""
    place = file.tell()
    file.seek(0)
    if file.read(2) == b"\xff\xd8":
        # coded data never holds the marker of a scan; the pictures of an EXIF header do
        count, last = 0, b""
        while chunk := file.read(1 << 20):
            count += (last + chunk).count(b"\xff\xda")
            last = chunk[-1:]
        if count > _MOST_SCANS:
            raise ValueError(f"it has {count} scans, more than {_MOST_SCANS}")
    file.seek(place)


def _check_webp(start: bytes) -> None:
    """Bound the canvas in the first 30 bytes of a webp: its decoder allocates that when the file is opened."""
    if start[:4] != b"RIFF" or start[8:12] != b"WEBP":
        return
    kind = start[12:16]
    if kind == b"VP8X":
        width, height = (int.from_bytes(start[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"VP8L":
        bits = int.from_bytes(start[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (int.from_bytes(start[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    if width * height > MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MOST_PIXELS}")


def read_depth(path: Path, depth_scale: float, size: tuple[int, int] | None = None) -> np.ndarray:
    """float32 [H, W], 0 = invalid: `read_raw_depth`, where what is not finite, beyond 1e9 or -1 becomes 0.

    Raises:
        ValueError: not a whole file of one of these kinds, another size than ``size``, or another negative depth.
    """
    return clean_depth(read_raw_depth(path, depth_scale, size), path)


def clean_depth(depth: np.ndarray, path: Path) -> np.ndarray:
    """float32 with 0 for what is invalid; raises what `read_depth` raises."""
    depth = np.array(depth, np.float32)
    depth[~np.isfinite(depth) | (depth > EXR_INVALID) | (depth == -1)] = 0
    if depth.min() < 0:
        raise ValueError(f"{path} must hold depths of at least 0 (-1: invalid), got {depth.min():g}")
    return depth


def read_raw_depth(path: Path, depth_scale: float, size: tuple[int, int] | None = None) -> np.ndarray:
    """float32 [H, W] in scene units, see `read_stored_depth`: integers times ``depth_scale``, others as they are.

    Raises:
        ValueError: not a whole file of one of these kinds, or another size than ``size``.
    """
    depth = read_stored_depth(path, size)
    if depth.dtype == np.uint8 and path.suffix.lower() == ".png":
        raise ValueError(f"{path} must be a 16-bit greyscale png, got one of 8 bits")
    # the integers of a npy file are values, those of an image steps
    if depth.dtype.kind in "iu" and path.suffix.lower() not in (".npy", ".npz"):
        depth = depth.astype(np.float64) * depth_scale
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is invalid
        return depth.astype(np.float32)


def read_stored_depth(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """The numbers [H, W] of a depth file as stored: integers of 8 or 16 bits from a png, else integers or floats.

    Args:
        path (Path): a grey png or tiff; npy; npz (its only array, or the one called depth); exr, see `read_exr_depth`.
            The case of the suffix does not count, axes of length 1 are taken off.
        size (tuple[int, int] | None): height and width it must have; none: any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole file of one of these kinds, or another size than ``size``.
    """
    suffix = path.suffix.lower()
    if suffix in (".png", ".tif", ".tiff"):
        image = open_image(path, size)
        if image.mode not in ("L", "F") and not image.mode.startswith("I"):
            raise ValueError(f"{path} must be a grey {suffix[1:]} of depths, got mode {image.mode}")
        return np.array(image)
    if suffix == ".npy":
        depth = read_numbers(path)
    elif suffix == ".npz":
        depth = _read_npz(path)
    elif suffix == ".exr":
        depth = read_exr_depth(path, size)
    else:
        raise ValueError(f"{path} must end in {', '.join(DEPTH_SUFFIXES)}")
    if depth.ndim > 2:
        depth = depth.reshape([side for side in depth.shape if side != 1])
    if depth.ndim != 2 or not depth.size or (size is not None and depth.shape != size) or depth.dtype.kind not in "fiu":
        wanted = f"[{size[0]}, {size[1]}]" if size is not None else "[height, width]"
        raise ValueError(f"{path} must hold numbers {wanted}, got {depth.dtype} {list(depth.shape)}")
    return depth


def read_numbers(path: Path) -> np.ndarray:
    """The array of a .npy file, never unpickled; raises ValueError where it is none of numbers."""
    with open_regular(path, 16 * MOST_PIXELS) as file:
        return _numbers(file, file.seek(0, 2), path)


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
    if dtype.kind not in "biufcSU" or not dtype.itemsize or len(shape) > _MOST_AXES:
        raise ValueError(f"an array {list(shape)[:_MOST_AXES]} of {dtype} is none of plain numbers or text")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > length - file.tell():
        raise ValueError(f"an array {list(shape)} of {dtype} does not fit in {length} bytes")
    return False


def save_png(path: Path, array: np.ndarray) -> None:
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array)).save(path, compress_level=6)


def _read_npz(path: Path) -> np.ndarray:
    with open_regular(path, 16 * MOST_PIXELS) as file:
        try:
            archive = open_zip(file)
        except ValueError as error:
            raise ValueError(f"{path} is not a whole .npz file: {error}") from error
        members = {name.removesuffix(".npy"): name for name in archive.namelist()}
        name = members.get("depth") or (next(iter(members.values())) if len(members) == 1 else None)
        if name is None:
            raise ValueError(f"{path} must hold one array or one called depth, it has {', '.join(members)[:80]}")
        length = archive.getinfo(name).file_size
        if length > 16 * MOST_PIXELS:
            raise ValueError(f"{path}: {name} has {length} bytes, more than {16 * MOST_PIXELS}")
        try:
            # reading stops at the length that was checked, whatever the data say
            data = io.BytesIO(archive.read(name))
        except Exception as error:  # broken members may do any
            raise ValueError(f"{path}: {name} is not whole: {error}") from error
        return _numbers(data, length, path)


def _numbers(file: IO[bytes], length: int, path: Path) -> np.ndarray:
    try:
        file.seek(0)
        if check_npy(file, length):
            raise ValueError("it holds a pickle")
        file.seek(0)
        return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # the header is Python text, and its parser raises what it happens to run into
        raise ValueError(f"{path} is not a whole {path.suffix} file of numbers: {error}") from error
