"""Read npz bundles member by member; pickled members only when allowed, and then without unpickling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.formats.images import check_npy
from subspace3d.formats.pickled_arrays import read_object
from subspace3d.reading import open_regular, open_zip

_LARGEST_MEMBER = 1 << 28  # bytes once decompressed; a 12-megapixel image is a seventh of it


class Bundle:
    """The members of an npz file, decoded when asked for.

    Args:
        path (Path): the file.
        allow_pickle (bool): rebuild the arrays and plain values in members that are pickled, see `pickled_arrays`.

    Raises:
        ValueError: not a whole npz file.
    """

    def __init__(self, path: Path, allow_pickle: bool) -> None:
        self.path, self.allow_pickle = path, allow_pickle
        self._file = open_regular(path)
        try:
            self._archive = open_zip(self._file)
        except ValueError as error:
            self._file.close()
            raise ValueError(f"{path} is not a whole npz file: {error}") from error
        self.names = {name.removesuffix(".npy") for name in self._archive.namelist()}

    def close(self) -> None:
        self._archive.close()
        self._file.close()

    def __getitem__(self, name: str) -> Any:
        """The array called ``name``; what it holds where it is a single value or object.

        Raises:
            ValueError: there is no such member, it is broken, or it is pickled and that is not allowed.
        """
        if name not in self.names:
            raise ValueError(f"{self.path} must hold {name!r}")
        try:
            value, pickled = self._read(f"{name}.npy")
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path}: {name!r} cannot be read: {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # broken members may do any
            raise ValueError(f"{self.path}: {name!r} is not whole: {error!r}") from error
        if pickled and not self.allow_pickle:
            raise ValueError(
                f"{self.path}: {name!r} is a pickled object, which is read only where you say so: --allow-pickle (even "
                "then it is not unpickled, which could run code: arrays and plain values in it are rebuilt)"
            )
        return value

    def _read(self, member: str) -> tuple[Any, bool]:
        """The value, and whether it is pickled; None in its place where that is not allowed."""
        length = self._archive.getinfo(member).file_size  # reading stops there, whatever the data say
        if length > _LARGEST_MEMBER:
            raise ValueError(f"{length} bytes are more than {_LARGEST_MEMBER}")
        with self._archive.open(member) as file:
            if check_npy(file, length):
                return read_object(file.read()) if self.allow_pickle else None, True
            file.seek(0)
            array = np.lib.format.read_array(file, allow_pickle=False)
        return array.item() if array.ndim == 0 else array, False
