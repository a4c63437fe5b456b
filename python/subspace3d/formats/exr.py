"""Depth from OpenEXR files: the header is read here and bounded before Mitsuba decodes the pixels."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import IO

import numpy as np

from subspace3d.reading import open_regular

LARGEST_PIXELS = 1 << 28
"""Bytes that all channels together may have once decoded."""
_LARGEST_HEADER = 1 << 20
_MAGIC = b"v/1\x01"
_TILED, _LONG_NAMES = 0x200, 0x400
_BYTES = (4, 2, 4)  # of a number of the pixel types uint, half and float
_DEPTH_NAMES = ("z", "depth")
_COLOURS = ("R", "G", "B")


def read_exr_depth(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """float [H, W]: the channel called Z or depth (in whatever layer), else the only one, else R, G and B if equal.

    Args:
        path (Path): an EXR of one part, scan lines or tiles of one level, whose channels have at most 2^28 bytes.
        size (tuple[int, int] | None): height and width it must have; none: any.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole EXR file of that kind, of another size, or no channel that is clearly the depth.
    """
    with open_regular(path) as file:
        try:
            names, shape = _read_header(file)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path} is not an EXR file that can be read: {error}") from error
    if size is not None and shape != size:
        raise ValueError(f"{path} must be {size[1]} x {size[0]} pixels as scene.json says, got {shape[1]} x {shape[0]}")
    wanted = _depth_channels(path, names)

    from subspace3d.mitsuba_variant import load_mitsuba

    mi = load_mitsuba()
    try:
        bitmap = mi.Bitmap(str(path))
        # Mitsuba has an order of its own
        stored = [field.name for field in bitmap.struct_()]
        pixels = np.array(bitmap)
    except RuntimeError as error:
        raise ValueError(f"{path} is not a whole EXR file: {error}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if len(names) == 1:
        stored = names
    if pixels.shape[:2] != shape or len(stored) != pixels.shape[2] or not set(wanted) <= set(stored):
        raise ValueError(f"{path} was not decoded as its header says: {stored}, {list(pixels.shape)}")
    depth, *others = (pixels[..., stored.index(name)] for name in wanted)
    if not all(np.array_equal(depth, other, equal_nan=True) for other in others):
        raise ValueError(f"{path} must have a channel called Z or depth, its channels R, G and B differ")
    return depth


def _depth_channels(path: Path, names: list[str]) -> tuple[str, ...]:
    found = tuple(name for name in names if name.rpartition(".")[2].lower() in _DEPTH_NAMES)
    if len(found) == 1:
        return found
    if not found and len(names) == 1:
        return (names[0],)
    if not found and set(names) - {"A"} == set(_COLOURS):
        return _COLOURS
    raise ValueError(f"{path} must have one channel that is the depth, called Z or depth; it has {', '.join(names)}")


def _read_header(file: IO[bytes]) -> tuple[list[str], tuple[int, int]]:
    """Names of the channels, and (height, width)."""
    head = file.read(_LARGEST_HEADER)
    version = struct.unpack_from("<I", head, 4)[0]
    if head[:4] != _MAGIC or version & 0xFF != 2:
        raise ValueError("no EXR file of version 2")
    if version & ~0xFF & ~(_TILED | _LONG_NAMES):
        raise ValueError("it has several parts or deep pixels")
    attributes = _attributes(head)
    for name, kind in (("channels", "chlist"), ("dataWindow", "box2i")):
        if attributes.get(name, ("",))[0] != kind:
            raise ValueError(f"no {name} in its header")
    left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"][1])
    height, width = bottom - top + 1, right - left + 1
    channels = _channels(attributes["channels"][1])
    row = sum(_BYTES[kind] for kind in channels.values())
    if min(height, width) < 1 or height * width * row > LARGEST_PIXELS:
        raise ValueError(f"{width} x {height} pixels of {row} bytes must be at most {LARGEST_PIXELS} bytes")
    if version & _TILED:
        kind, value = attributes.get("tiles", ("", b""))
        across, down, mode = struct.unpack("<2IB", value)
        if kind != "tiledesc" or mode & 0xF or not 0 < math.prod((across, down)) * row <= LARGEST_PIXELS:
            raise ValueError("its tiles must have one level and fit in the bound for pixels")
    return list(channels), (height, width)


def _attributes(head: bytes) -> dict[str, tuple[str, bytes]]:
    """Name -> (type, value), up to the empty name that ends the header."""
    at = 8
    found: dict[str, tuple[str, bytes]] = {}
    while True:
        name, at = _text(head, at)
        if not name:
            return found
        kind, at = _text(head, at)
        length = struct.unpack_from("<i", head, at)[0]
        at += 4
        if length < 0 or at + length > len(head):
            raise ValueError(f"its header must have at most {_LARGEST_HEADER} bytes")
        if name in found:
            raise ValueError(f"{name} stands twice in its header")
        found[name] = (kind, head[at : at + length])
        at += length


def _channels(data: bytes) -> dict[str, int]:
    at = 0
    found: dict[str, int] = {}
    while True:
        name, at = _text(data, at)
        if not name:
            break
        kind, _, x_step, y_step = struct.unpack_from("<iIii", data, at)
        at += 16
        if name in found or kind not in (0, 1, 2) or (x_step, y_step) != (1, 1):
            raise ValueError(f"channel {name} stands twice, has an unknown type or is sub-sampled")
        found[name] = kind
    if not found:
        raise ValueError("it has no channels")
    return found


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.find(b"\0", at, at + 256)
    if end < 0:
        raise ValueError("a name in its header does not end")
    return data[at:end].decode("latin-1"), end + 1
