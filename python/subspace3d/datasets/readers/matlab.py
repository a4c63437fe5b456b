"""Bounds what a MATLAB 5 file makes its reader build, before scipy reads it.

The file is a list of elements: a tag (type, bytes) and data. Element 15 is compressed and expands to one other; element
14 is an array, whose own elements are flags, size, name and content, which for cells and structs are arrays again.
"""

from __future__ import annotations

import math
import struct
import zlib

LARGEST = 1 << 28
"""Bytes, as stored and expanded; the files of ClearPose have a few million."""
_MOST_ARRAYS = 1 << 20
_DEEPEST = 8
_MATRIX, _COMPRESSED, _SIZES = 14, 15, 5
_HEADER = 128
_CELL, _STRUCT = 1, 2
_PLAIN = (_CELL, _STRUCT, 4, *range(6, 16))  # these, text and numbers; not sparse, objects, functions


def check_elements(data: bytes) -> None:
    """Raise ValueError unless ``data`` is a MATLAB 5 file that expands to at most 2^28 bytes in at most 2^20 arrays.

    Arrays may be nested 8 deep, which also bounds scipy's recursion, and declare no more cells than they have bytes
    for; they hold cells, structs, text and numbers.
    """
    if not data.startswith(b"MATLAB 5.0 MAT-file") or len(data) < _HEADER:
        raise ValueError("it must be a MATLAB 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    left, arrays, at = LARGEST, 0, _HEADER
    while at + 8 <= len(data):
        kind, count = struct.unpack_from(f"{order}II", data, at)
        at += 8
        content = memoryview(data)[at : at + count]
        if kind == _COMPRESSED:
            content = memoryview(zlib.decompressobj().decompress(content, left + 1))
            left -= len(content)
            if left < 0:
                raise ValueError(f"it expands to more than {LARGEST} bytes")
            arrays += _count_arrays(content, order, _MOST_ARRAYS - arrays)
        elif kind == _MATRIX:
            arrays += _count_arrays(memoryview(data)[at - 8 : at + count], order, _MOST_ARRAYS - arrays)
        at += count


def _count_arrays(data: memoryview, order: str, most: int) -> int:
    """Arrays in one element and in what it holds."""
    count, waiting = 0, [(0, len(data), 1)]
    while waiting:
        at, end, depth = waiting.pop()
        if depth > _DEEPEST + 1:
            raise ValueError(f"its arrays are nested more than {_DEEPEST} deep")
        while at + 8 <= end:
            kind, size = struct.unpack_from(f"{order}II", data, at)
            if kind >> 16:  # a small element: size and type in one word, data in the next
                at += 8
                continue
            at += 8
            if kind == _MATRIX:
                count += 1
                if count > most:
                    raise ValueError(f"it holds more than {_MOST_ARRAYS} arrays")
                if size:
                    _check_array(data[at : min(at + size, end)], order)
                waiting.append((at, min(at + size, end), depth + 1))
            at += size + -size % 8
    return count


def _check_array(data: memoryview, order: str) -> None:
    """Flags (16 bytes with their tag, the class in the lowest) and size come first."""
    if len(data) < 24:
        raise ValueError("an array in it is cut off")
    flags = struct.unpack_from(f"{order}I", data, 8)[0] & 0xFF
    if flags not in _PLAIN:
        raise ValueError(f"an array in it has class {flags}; read are cells, structs, text and numbers")
    kind, size = struct.unpack_from(f"{order}II", data, 16)
    start = 24
    if kind >> 16:
        kind, size, start = kind & 0xFFFF, kind >> 16, 20
    if kind != _SIZES or size % 4 or size > 128 or start + size > len(data):
        raise ValueError("an array in it has no size")
    sides = struct.unpack_from(f"{order}{size // 4}i", data, start)
    if min(sides, default=0) < 0 or (flags in (_CELL, _STRUCT) and 8 * math.prod(sides) > len(data)):
        raise ValueError(f"an array in it declares {list(sides)} entries in {len(data)} bytes")
