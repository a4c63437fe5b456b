"""Depth files that only benchmarks have: PFM, Sintel's .dpt, raw float32, float16 in the bits of a png."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np

from subspace3d.formats.images import MOST_PIXELS, read_stored_depth
from subspace3d.reading import read_bytes

# one byte of white space follows the scale
_PFM = re.compile(rb"Pf\s+(\d{1,9})\s+(\d{1,9})\s+(-?[\d.]{1,20})\s")
SINTEL_TAG = 202021.25  # first float of Sintel's files
_LARGEST = 4 * MOST_PIXELS + 256  # bytes


def read_pfm(path: Path) -> np.ndarray:
    """Grey portable float map, float32 [H, W]; its rows go from the bottom to the top.

    Raises:
        ValueError: another file, or one that is not whole.
    """
    data = read_bytes(path, _LARGEST)
    match = _PFM.match(data)
    if match is None:
        raise ValueError(f"{path} must be a grey PFM: Pf, width, height and scale")
    width, height, scale = int(match[1]), int(match[2]), float(match[3])
    return _array(data, match.end(), width, height, "<f4" if scale < 0 else ">f4", path)[::-1]


def read_dpt(path: Path) -> np.ndarray:
    """Sintel's depth, float32 [H, W]: tag 202021.25, width, height, then rows from the top."""
    data = read_bytes(path, _LARGEST)
    if len(data) < 12 or struct.unpack_from("<f", data)[0] != SINTEL_TAG:
        raise ValueError(f"{path} must begin with Sintel's tag {SINTEL_TAG}")
    width, height = struct.unpack_from("<ii", data, 4)
    return _array(data, 12, width, height, "<f4", path)


def read_raw(path: Path, size: tuple[int, int]) -> np.ndarray:
    """float32 numbers of an image of known height and width, as ETH3D writes them; not finite: no depth."""
    return _array(read_bytes(path, _LARGEST), 0, size[1], size[0], "<f4", path)


def read_half_png(path: Path) -> np.ndarray:
    """float32 [H, W] from a png of 16 bits whose values are the bits of float16, as Co3D writes depth."""
    stored = read_stored_depth(path)
    if stored.dtype.kind not in "iu" or stored.dtype.itemsize < 2 or stored.min() < 0 or stored.max() > 0xFFFF:
        raise ValueError(f"{path} must be a png of 16 bits")
    return stored.astype(np.uint16).view(np.float16).astype(np.float32)


def read_sintel_camera(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """K [3, 3] from the first pixel's centre and the camera-from-world [3, 4] of a .cam file."""
    data = read_bytes(path, 4096)
    if len(data) != 4 + 8 * 21 or struct.unpack_from("<f", data)[0] != SINTEL_TAG:
        raise ValueError(
            f"{path} must be Sintel's tag {SINTEL_TAG} and 21 numbers of 8 bytes, it has {len(data)} bytes"
        )
    numbers = np.frombuffer(data, "<f8", offset=4)
    return numbers[:9].reshape(3, 3), numbers[9:].reshape(3, 4)


def _array(data: bytes, start: int, width: int, height: int, order: str, path: Path) -> np.ndarray:
    if min(width, height) < 1 or len(data) != start + 4 * width * height:
        raise ValueError(
            f"{path} must hold {width} x {height} numbers of 4 bytes, it has {max(0, len(data) - start)} bytes for them"
        )
    return np.frombuffer(data, order, offset=start).reshape(height, width).astype(np.float32)
