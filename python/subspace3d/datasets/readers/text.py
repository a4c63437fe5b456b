"""Lists of numbers in text files, as data sets write cameras and poses."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from subspace3d.datasets.readers.source import rotation_from_quaternion
from subspace3d.reading import read_text

_LARGEST = 1 << 26  # bytes of a list of files or poses
_COMMENT = re.compile(r"(^|\s)#.*")


def lines(path: Path) -> list[str]:
    """Lines without comments (from a # on) and empty ones."""
    stripped = (_COMMENT.sub("", line).strip() for line in read_text(path, _LARGEST).splitlines())
    return [line for line in stripped if line]


def rows(path: Path) -> list[list[str]]:
    """Words of every line, separated by blanks or commas."""
    return [line.replace(",", " ").split() for line in lines(path)]


def floats(words: list[str], path: Path) -> list[float]:
    """Numbers, which may be nan or infinite.

    Raises:
        ValueError: a word that is none; names the file.
    """
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers: {error}") from error


def numbers(path: Path) -> np.ndarray:
    """All numbers of a file, float64 [N]; raises what `floats` raises."""
    return np.array([number for row in rows(path) for number in floats(row, path)])


def matrix(path: Path) -> np.ndarray:
    """A file of one matrix 3x3, 3x4 or 4x4, finite.

    Raises:
        ValueError: another count of numbers, or one that is not finite.
    """
    values = numbers(path)
    shape = {9: (3, 3), 12: (3, 4), 16: (4, 4)}.get(values.size)
    if shape is None or not np.isfinite(values).all():
        raise ValueError(f"{path} must hold one finite matrix 3x3, 3x4 or 4x4, got {values.size} numbers")
    return values.reshape(shape)


def quaternion_pose(values: list[float]) -> np.ndarray:
    """[R | t] [3, 4] of tx ty tz qx qy qz qw.

    Raises:
        ValueError: not finite, or a quaternion of zeros.
    """
    array = np.array(values, np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"a pose must be finite, got {values}")
    return np.concatenate([rotation_from_quaternion(array[3:]), array[:3, None]], axis=1)
