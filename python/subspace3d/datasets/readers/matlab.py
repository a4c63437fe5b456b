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
_MOST_ELEMENTS = 1 << 21  # four for each array; 320,000 in a scene of ClearPose with 10,000 frames
_DEEPEST = 8
_MATRIX, _COMPRESSED, _SIZES = 14, 15, 5
_HEADER = 128
_CELL, _STRUCT = 1, 2
_PLAIN = (_CELL, _STRUCT, 4, *range(6, 16))  # these, text and numbers; not sparse, objects, functions


def check_elements(data: bytes) -> None:
    """Raise ValueError unless ``data`` is a MATLAB 5 file that expands to at most 2^28 bytes in at most 2^21 elements.

    Arrays may be nested 8 deep, which also bounds scipy's recursion, and declare no more cells than they have bytes
    for; they hold cells, structs, text and numbers.
    """
    if not data.startswith(b"MATLAB 5.0 MAT-file") or len(data) < _HEADER:
        raise ValueError("it must be a MATLAB 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    left, elements, at = LARGEST, 0, _HEADER
    while at + 8 <= len(data):
        kind, count = struct.unpack_from(f"{order}II", data, at)
        at += 8
        content = memoryview(data)[at : at + count]
        if kind == _COMPRESSED:
            content = memoryview(zlib.decompressobj().decompress(content, left + 1))
            left -= len(content)
            if left < 0:
                raise ValueError(f"it expands to more than {LARGEST} bytes")
            elements += _count_elements(content, order, _MOST_ELEMENTS - elements)
        elif kind == _MATRIX:
            elements += _count_elements(memoryview(data)[at - 8 : at + count], order, _MOST_ELEMENTS - elements)
        at += count


def _count_elements(data: memoryview, order: str, most: int) -> int:
    """Elements in an array and in the arrays it holds."""
    if len(data) < 8 or struct.unpack_from(f"{order}I", data)[0] != _MATRIX:
        raise ValueError("a compressed element in it must be an array")
    count, open_arrays = 0, [(0, len(data))]
    while open_arrays:
        at, end = open_arrays.pop()
        if at + 8 > end:
            continue
        count += 1
        if count > most:
            raise ValueError(f"it holds more than {_MOST_ELEMENTS} elements")
        kind, size = struct.unpack_from(f"{order}II", data, at)
        if kind >> 16:  # a small element: size and type in one word, data in the next
            open_arrays.append((at + 8, end))
            continue
        at += 8
        open_arrays.append((at + size + -size % 8, end))
        if kind == _MATRIX and size:
            last = min(at + size, end)
            _check_array(data[at:last], order)
            open_arrays.append((at, last))
            if len(open_arrays) > _DEEPEST + 1:
                raise ValueError(f"its arrays are nested more than {_DEEPEST} deep")
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
