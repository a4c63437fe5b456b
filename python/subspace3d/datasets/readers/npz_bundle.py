"""Read npz bundles member by member; pickled members only when allowed, and then only numpy arrays and plain values."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from subspace3d.formats.images import check_npy

# all that a dict of arrays and numbers needs; whatever else a pickle names is refused, so that it cannot run code
_ALLOWED = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
}

_LARGEST_MEMBER = 1 << 28  # bytes once decompressed; a 12-megapixel image is a seventh of it


class Bundle:
    """The members of an npz file, decoded when asked for.

    Args:
        path (Path): the file.
        allow_pickle (bool): decode members that are pickled Python objects.

    Raises:
        ValueError: not a whole npz file.
    """

    def __init__(self, path: Path, allow_pickle: bool) -> None:
        self.path, self.allow_pickle = path, allow_pickle
        try:
            self._archive = zipfile.ZipFile(path)
        except Exception as error:  # a broken directory of members may do any
            raise ValueError(f"{path} is not a whole npz file: {error}") from error
        self.names = {name.removesuffix(".npy") for name in self._archive.namelist()}

    def close(self) -> None:
        self._archive.close()

    def __getitem__(self, name: str) -> Any:
        """The array called ``name``; what it holds where it is a single value or object.

        Raises:
            ValueError: there is no such member, it is broken, or it is pickled and that is not allowed.
        """
        if name not in self.names:
            raise ValueError(f"{self.path} must hold {name!r}")
        try:
            length = self._archive.getinfo(f"{name}.npy").file_size  # reading stops there, whatever the data say
            if length > _LARGEST_MEMBER:
                raise ValueError(f"{length} bytes are more than {_LARGEST_MEMBER}")
            with self._archive.open(f"{name}.npy") as file:
                pickled = check_npy(file, length)
                if not pickled:
                    file.seek(0)
                    array = np.lib.format.read_array(file, allow_pickle=False)
                elif self.allow_pickle:
                    array = _PlainUnpickler(file).load()
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path}: {name!r} cannot be read: {error}") from error
        except Exception as error:  # broken members and pickles may do any
            raise ValueError(f"{self.path}: {name!r} is not whole: {error!r}") from error
        if pickled and not self.allow_pickle:
            raise ValueError(
                f"{self.path}: {name!r} is a pickled object. Pickles can run code when read, so they are left alone "
                "unless you trust the file and say so: --allow-pickle (even then only numpy arrays and plain values)"
            )
        return array.item() if isinstance(array, np.ndarray) and array.ndim == 0 else array


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, but only numpy arrays and plain values are read")
        return super().find_class(module, name)
